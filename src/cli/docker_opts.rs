//! `flanneld docker-opts`: Docker's options from the subnet file, as `mk-docker-opts.sh` writes them, without a shell.

use std::{collections::BTreeMap, env, fs, io, path::PathBuf};

use clap::Args;

use crate::subnet_file;

/// `flanneld docker-opts`. The flags are those of the script, which are all short.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub struct DockerOptsArgs {
    /// The subnet file
    #[arg(short = 'f', value_name = "FILE", default_value = "/run/flannel/subnet.env")]
    pub subnet_file: PathBuf,
    /// The file to write
    #[arg(short = 'd', value_name = "FILE", default_value = "/run/docker_opts.env")]
    pub docker_file: PathBuf,
    /// Only a variable for each option
    #[arg(short = 'i')]
    pub individual: bool,
    /// Only one variable with all options
    #[arg(short = 'c')]
    pub combined: bool,
    /// Leave out --ip-masq
    #[arg(short = 'm')]
    pub without_ip_masq: bool,
    /// The name of the variable with all options
    #[arg(short = 'k', value_name = "NAME", default_value = "DOCKER_OPTS", value_parser = variable)]
    pub key: String,
}

/// A name that shells and systemd accept for a variable.
fn variable(text: &str) -> Result<String, String> {
    let characters = text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_');
    let begins_well = text.starts_with(|c: char| !c.is_ascii_digit());
    if characters && begins_well {
        Ok(text.to_owned())
    } else {
        Err("give the name of a variable, such as DOCKER_OPTS".to_owned())
    }
}

/// Why there are no options.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The subnet file cannot be read.
    #[error(
        "cannot read {path}: flanneld writes it when it is ready (`systemctl status flanneld`); -f names another one"
    )]
    Read {
        /// Which file.
        path: PathBuf,
        /// As the system says.
        source: io::Error,
    },
    /// The options cannot be written.
    #[error("cannot write {path}; -d names another file")]
    Write {
        /// Which file.
        path: PathBuf,
        /// As the system says.
        source: io::Error,
    },
}

/// Writes the file.
///
/// # Errors
/// When one of the two files cannot be read or written.
pub fn run(args: &DockerOptsArgs) -> Result<(), Error> {
    let read = |source| Error::Read {
        path: args.subnet_file.clone(),
        source,
    };
    let text = fs::read_to_string(&args.subnet_file).map_err(read)?;
    // A variable that is no text is none that was meant for Docker.
    let environment =
        env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
    let options = render(args, &text, &environment.collect());
    let write = |source| Error::Write {
        path: args.docker_file.clone(),
        source,
    };
    if let Some(dir) = args.docker_file.parent() {
        fs::create_dir_all(dir).map_err(write)?;
    }
    fs::write(&args.docker_file, options).map_err(write)
}

/// What an option's own variable begins with.
const OPTION: &str = "DOCKER_OPT_";

/// The text of the file, from that of the subnet file and the environment, whose options stay.
fn render(args: &DockerOptsArgs, subnet_file: &str, environment: &BTreeMap<String, String>) -> String {
    let said: BTreeMap<&str, &str> = subnet_file::variables(subnet_file).collect();
    let flannel = |name| said.get(name).filter(|value| !value.is_empty());
    let environment = environment.iter().map(|(name, value)| (name.as_str(), value.as_str()));
    let mut options: BTreeMap<&str, String> = environment
        .clone()
        .chain(said.iter().map(|(&name, &value)| (name, value)))
        .filter(|(name, _)| name.starts_with(OPTION))
        .map(|(name, value)| (name, value.to_owned()))
        .collect();
    if let Some(subnet) = flannel("FLANNEL_SUBNET") {
        options.insert("DOCKER_OPT_BIP", format!("--bip={subnet}"));
    }
    if let Some(mtu) = flannel("FLANNEL_MTU") {
        options.insert("DOCKER_OPT_MTU", format!("--mtu={mtu}"));
    }
    if let Some(&ours) = flannel("FLANNEL_IPMASQ")
        && !args.without_ip_masq
    {
        // One of the two masquerades what leaves the overlay.
        options.insert("DOCKER_OPT_IPMASQ", format!("--ip-masq={}", ours != "true"));
    }

    let both = args.individual == args.combined;
    let mut text = String::new();
    if args.individual || both {
        text.extend(options.iter().map(|(name, value)| format!("{name}=\"{value}\"\n")));
    }
    if args.combined || both {
        let mut known = environment.chain(said.iter().map(|(&name, &value)| (name, value)));
        // The subnet file's word comes last, and counts.
        let before = known.by_ref().filter(|(name, _)| *name == args.key).last();
        let all: String = options.values().map(|value| format!(" {value}")).collect();
        text.push_str(&format!(
            "{}=\"{}{all}\"\n",
            args.key,
            before.map_or("", |(_, value)| value)
        ));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const SUBNET_FILE: &str =
        "FLANNEL_NETWORK=10.5.0.0/16\nFLANNEL_SUBNET=10.5.34.1/24\nFLANNEL_MTU=1472\nFLANNEL_IPMASQ=true\n";

    fn args() -> DockerOptsArgs {
        DockerOptsArgs {
            subnet_file: "/run/flannel/subnet.env".into(),
            docker_file: "/run/docker_opts.env".into(),
            individual: false,
            combined: false,
            without_ip_masq: false,
            key: "DOCKER_OPTS".to_owned(),
        }
    }

    #[test]
    fn who_masquerades_is_decided_by_the_subnet_file() {
        let none = BTreeMap::new();
        assert_eq!(
            render(&args(), SUBNET_FILE, &none),
            "DOCKER_OPT_BIP=\"--bip=10.5.34.1/24\"\nDOCKER_OPT_IPMASQ=\"--ip-masq=false\"\nDOCKER_OPT_MTU=\"--mtu=1472\"\n\
             DOCKER_OPTS=\" --bip=10.5.34.1/24 --ip-masq=false --mtu=1472\"\n"
        );
        let docker = render(&args(), &SUBNET_FILE.replace("true", "false"), &none);
        assert!(docker.contains(" --ip-masq=true "), "{docker}");
    }

    #[test]
    fn options_of_the_environment_stay() {
        let environment = [("DOCKER_OPT_LOG", "--debug"), ("MINE", "--tls"), ("OTHER", "x")];
        let environment = environment.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let args = DockerOptsArgs {
            combined: true,
            key: "MINE".to_owned(),
            ..args()
        };
        assert_eq!(
            render(&args, "FLANNEL_MTU=1450\n", &environment.into()),
            "MINE=\"--tls --debug --mtu=1450\"\n"
        );
    }

    #[test]
    fn names_are_those_of_variables() {
        assert!(variable("DOCKER_NETWORK_OPTIONS").is_ok() && variable("_1").is_ok());
        for wrong in ["", "1A", "A-B", "A=B", "A B"] {
            assert!(variable(wrong).is_err(), "{wrong}");
        }
    }
}
