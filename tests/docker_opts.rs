//! Docker's options: the script under several shells, and `flanneld docker-opts`, which must write the same.

use flannel::lab::has_program;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

const FLANNELD: &str = env!("CARGO_BIN_EXE_flanneld");
const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/mk-docker-opts.sh");

const SUBNET_FILE: &str =
    "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=false\n";

/// Each way to get the options: a shell that runs the script, or none for the program itself.
fn ways() -> Vec<Option<&'static str>> {
    let shells = ["sh", "dash", "bash"].into_iter().filter(|shell| has_program(shell));
    shells.map(Some).chain([None]).collect()
}

/// A directory of a test's own, with a subnet file in it.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str, subnet_file: &str) -> Directory {
        let path = std::env::temp_dir().join(format!("flannel-docker-opts-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("subnet.env"), subnet_file).unwrap();
        Directory(path)
    }

    /// Runs one way in the directory, with these options and variables.
    fn run(&self, way: Option<&str>, options: &[&str], environment: &[(&str, &str)]) -> Output {
        let mut command = match way {
            Some(shell) => {
                let mut command = Command::new(shell);
                command.arg(SCRIPT);
                command
            }
            None => {
                let mut command = Command::new(FLANNELD);
                command.arg("docker-opts");
                command
            }
        };
        command
            .current_dir(&self.0)
            .args(options)
            .envs(environment.iter().copied())
            .output()
            .unwrap()
    }

    /// What each way writes, which must be the same.
    fn written(&self, options: &[&str], environment: &[(&str, &str)]) -> String {
        let mut texts = ways().into_iter().map(|way| {
            // In a directory that is not there yet.
            let file = Path::new("new").join(way.unwrap_or("flanneld")).join("docker.env");
            let file = file.to_str().unwrap();
            let options = [&["-f", "subnet.env", "-d", file], options].concat();
            let output = self.run(way, &options, environment);
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{way:?} {options:?}: {said}");
            (way, fs::read_to_string(self.0.join(file)).unwrap())
        });
        let (_, first) = texts.next().unwrap();
        for (way, text) in texts {
            assert_eq!(text, first, "{way:?} {options:?}");
        }
        first
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn output_is_the_originals() {
    let directory = Directory::new("original", SUBNET_FILE);
    let individual =
        "DOCKER_OPT_BIP=\"--bip=10.5.34.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n";
    let combined = "DOCKER_OPTS=\" --bip=10.5.34.1/24 --ip-masq=true --mtu=1472\"\n";
    for (options, expected) in [
        (&[][..], format!("{individual}{combined}")),
        (&["-i", "-c"], format!("{individual}{combined}")),
        (&["-i"], individual.to_owned()),
        (&["-c"], combined.to_owned()),
        (
            &["-c", "-k", "DOCKER_NETWORK_OPTIONS"],
            combined.replace("DOCKER_OPTS", "DOCKER_NETWORK_OPTIONS"),
        ),
        (&["-m", "-c"], combined.replace(" --ip-masq=true", "")),
        (&["-mck", "X"], "X=\" --bip=10.5.34.1/24 --mtu=1472\"\n".to_owned()),
    ] {
        assert_eq!(directory.written(options, &[]), expected, "{options:?}");
    }
}

#[test]
fn only_one_of_the_two_masquerades() {
    let directory = Directory::new("masquerade", &SUBNET_FILE.replace("IPMASQ=false", "IPMASQ=true"));
    assert!(directory.written(&["-c"], &[]).contains(" --ip-masq=false "));
}

#[test]
fn what_the_subnet_file_does_not_say_is_left_out() {
    let directory = Directory::new("part", "# by hand\nexport FLANNEL_MTU='1450'\n\nFLANNEL_SUBNET=\n");
    let environment = [("FLANNEL_SUBNET", "10.1.1.1/24"), ("FLANNEL_IPMASQ", "true")];
    assert_eq!(
        directory.written(&["-c"], &environment),
        "DOCKER_OPTS=\" --mtu=1450\"\n"
    );
}

#[test]
fn options_that_are_there_already_stay() {
    let directory = Directory::new("stay", SUBNET_FILE);
    let environment = [("DOCKER_OPT_A", "--log-level warn"), ("DOCKER_OPTS", "--debug")];
    assert_eq!(
        directory.written(&[], &environment),
        "DOCKER_OPT_A=\"--log-level warn\"\nDOCKER_OPT_BIP=\"--bip=10.5.34.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=true\"\n\
         DOCKER_OPT_MTU=\"--mtu=1472\"\nDOCKER_OPTS=\"--debug --log-level warn --bip=10.5.34.1/24 --ip-masq=true --mtu=1472\"\n"
    );
}

#[test]
fn mistakes_are_named_and_nothing_is_written() {
    let directory = Directory::new("mistakes", SUBNET_FILE);
    for way in ways() {
        for (options, said) in [
            (&["-f", "none.env", "-d", "docker.env"][..], "none.env"),
            (
                &["-f", "subnet.env", "-d", "docker.env", "-k", "A B"],
                "the name of a variable",
            ),
            // The script shows how it is used, the program names the mistake.
            (
                &["-f", "subnet.env", "-d", "docker.env", "-x"],
                if way.is_some() { "-k  the name" } else { "-x" },
            ),
            (
                &["-f", "subnet.env", "-d", "docker.env", "word"],
                if way.is_some() { "-k  the name" } else { "word" },
            ),
        ] {
            let output = directory.run(way, options, &[]);
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(
                !output.status.success() && text.contains(said),
                "{way:?} {options:?}: {text}"
            );
            assert!(!directory.0.join("docker.env").exists(), "{way:?} {options:?}");
        }
    }
}
