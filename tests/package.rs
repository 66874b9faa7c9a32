//! The Debian package: built by `scripts/package-deb`, and installed on a clean Debian. Needs root.

mod lab;

use flannel::lab::{Host, Lab, Process, SubnetEnv, command, has_program, run, tail, wait_until, without_daemon_env};
use lab::{CONFIG, FLANNELD, PATIENCE, new_lab, not_tested};
use nix::sys::signal::Signal;
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
};

const TOP: &str = env!("CARGO_MANIFEST_DIR");

/// How long, in seconds, a clean Debian may take to be fetched and set up; then the mirror is taken to be away.
const DEBIAN_LIMIT: &str = "300";

/// Builds the package of the binary under test.
fn build(lab: &Lab) -> PathBuf {
    let mut script = command(&format!("{TOP}/scripts/package-deb"));
    script
        .args(["--binary", FLANNELD, "--revision", "7", "--output"])
        .arg(lab.dir())
        .envs([("DEBFULLNAME", "Test"), ("DEBEMAIL", "test@flannel.test")])
        // The test's binary is a large one, and the package of no use but here.
        .envs([("DPKG_DEB_COMPRESSOR_TYPE", "gzip"), ("DPKG_DEB_COMPRESSOR_LEVEL", "1")]);
    let path = PathBuf::from(run(&mut script).unwrap().trim_end());
    let name = path.file_name().unwrap().to_str().unwrap();
    let expected = concat!("flanneld_", env!("CARGO_PKG_VERSION"), "-7_");
    assert!(name.starts_with(expected) && name.ends_with(".deb"), "{name}");
    path
}

/// The value of a field of the package's control file.
fn field(package: &Path, name: &str) -> String {
    let value = run(command("dpkg-deb").arg("--field").arg(package).arg(name)).unwrap();
    value.trim_end().to_owned()
}

/// The packages that have the libraries which a program loads, as the dynamic linker finds them.
fn packages_of_libraries(program: &Path) -> BTreeSet<String> {
    let listed = run(command("ldd").arg(program)).unwrap();
    let paths = listed.lines().filter_map(|line| {
        let path = line.split_once("=> ").map_or(line, |(_, path)| path);
        // The vDSO is the kernel's, and in no file.
        path.trim().strip_prefix('/').and_then(|path| path.split(' ').next())
    });
    paths
        .map(|path| {
            // dpkg knows the files by the places they had before /lib was merged into /usr, or by those after it.
            let path = fs::canonicalize(format!("/{path}")).unwrap();
            let name = format!("*/{}", path.file_name().unwrap().to_str().unwrap());
            let found = run(command("dpkg-query").args(["--search", &name])).unwrap();
            found.split(':').next().unwrap().to_owned()
        })
        .collect()
}

#[test]
fn package_has_everything_in_its_place() {
    let lab = new_lab("package_content");
    let package = build(&lab);
    let root = lab.dir().join("root");
    run(command("dpkg-deb").arg("--extract").arg(&package).arg(&root)).unwrap();
    let read = |path: &str| fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));

    let version = run(command(root.join("usr/bin/flanneld").to_str().unwrap()).arg("--version")).unwrap();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    let size = |path: &Path| fs::metadata(path).unwrap().len();
    assert!(
        size(&root.join("usr/bin/flanneld")) < size(Path::new(FLANNELD)) / 2,
        "it is not stripped"
    );
    // What the drop-in for Docker runs is where the package has put it.
    let drop_in = read("usr/share/doc/flanneld/examples/docker.service.d/flannel.conf");
    let script = drop_in
        .lines()
        .filter_map(|line| line.strip_prefix("ExecStartPre="))
        .flat_map(|command| command.split(' '))
        .find(|word| word.ends_with("mk-docker-opts.sh"))
        .unwrap();
    let script = root.join(script.trim_start_matches('/'));
    assert_eq!(fs::metadata(&script).unwrap().permissions().mode() & 0o777, 0o755);
    let unit = ["lib/systemd/system", "usr/lib/systemd/system"].map(|dir| root.join(dir).join("flanneld.service"));
    let unit = unit.iter().find(|path| path.exists()).expect("no unit");
    let unit = fs::read_to_string(unit).unwrap();
    assert!(unit.contains("ExecStart=/usr/bin/flanneld ") && unit.contains("EnvironmentFile=-/etc/default/flanneld"));
    // As installed, it says nothing: all of it are comments.
    let defaults = read("etc/default/flanneld");
    assert!(defaults.contains("FLANNEL_ETCD_ENDPOINTS"), "{defaults}");
    assert!(
        defaults.lines().all(|line| line.is_empty() || line.starts_with('#')),
        "{defaults}"
    );
    for page in ["flanneld", "flanneld-network-set", "flanneld-docker-opts"] {
        let page = root.join(format!("usr/share/man/man8/{page}.8.gz"));
        let text = run(command("gzip").arg("-dc").arg(&page)).unwrap();
        assert!(text.contains(".SH NAME"), "{text}");
    }
    for completions in [
        "usr/share/bash-completion/completions/flanneld",
        "usr/share/zsh/vendor-completions/_flanneld",
        "usr/share/fish/vendor_completions.d/flanneld.fish",
    ] {
        assert!(read(completions).contains("etcd-endpoints"), "{completions}");
    }
    assert!(read("usr/share/doc/flanneld/copyright").contains("License: Apache-2.0"));

    let depends = field(&package, "Depends");
    let depends: BTreeSet<String> = depends
        .split(", ")
        .map(|package| package.split(' ').next().unwrap().to_owned())
        .collect();
    assert_eq!(depends, packages_of_libraries(&root.join("usr/bin/flanneld")));
    assert_eq!(field(&package, "Recommends"), "iptables | nftables");
    let conffiles = run(command("dpkg-deb").args(["--info"]).arg(&package).arg("conffiles")).unwrap();
    assert_eq!(conffiles, "/etc/default/flanneld\n");
}

/// A Debian with nothing but its essential packages, in a directory.
struct CleanDebian(PathBuf);

impl CleanDebian {
    /// The release of this machine, from its own mirror; an error says why that cannot be had.
    fn make(dir: PathBuf) -> Result<CleanDebian, String> {
        let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
        let value = |key: &str| {
            release
                .lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
        };
        if value("ID") != Some("debian") {
            return Err("this machine is no Debian".to_owned());
        }
        let codename = value("VERSION_CODENAME").ok_or("this Debian has no name in /etc/os-release")?;
        if !has_program("mmdebstrap") {
            return Err("mmdebstrap is not installed".to_owned());
        }
        let sources = ["/etc/apt/sources.list.d/debian.sources", "/etc/apt/sources.list"];
        let sources = sources.into_iter().filter(|path| Path::new(path).exists());
        let mut bootstrap = command("timeout");
        bootstrap
            .args([
                DEBIAN_LIMIT,
                "mmdebstrap",
                "--quiet",
                "--mode=root",
                "--variant=essential",
                codename,
            ])
            .arg(&dir)
            .args(sources);
        run(&mut bootstrap).map_err(|error| format!("no clean Debian is to be had: {error}"))?;
        Ok(CleanDebian(dir))
    }

    fn path(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// A command in it, with nothing of this machine's environment.
    fn command(&self, program: &str) -> Command {
        let mut inside = command("chroot");
        inside
            .arg(&self.0)
            .arg(program)
            .env_clear()
            .env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        inside
    }

    /// `dpkg` in it.
    fn dpkg(&self, arguments: &[&str]) {
        run(self.command("dpkg").args(arguments)).unwrap();
    }

    /// Lets it look as if systemd ran there, with programs that only write down how they are called.
    fn pretend_systemd(&self) {
        fs::create_dir_all(self.path("run/systemd/system")).unwrap();
        for program in ["systemctl", "deb-systemd-invoke"] {
            let path = self.path("usr/local/bin").join(program);
            fs::write(&path, "#!/bin/sh\necho \"${0##*/} $*\" >>/called\n").unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    /// How those were called since the last time this was asked.
    fn called(&self) -> Vec<String> {
        let text = fs::read_to_string(self.path("called")).unwrap_or_default();
        fs::write(self.path("called"), "").unwrap();
        text.lines().map(str::to_owned).collect()
    }

    /// Starts the installed daemon on a host of the lab, with this Debian's own files and this machine's devices.
    fn start_daemon(&self, host: &Host, log: &Path) -> Process {
        let mut daemon = host.ns().command("unshare");
        without_daemon_env(&mut daemon);
        let enter =
            r#"mount --rbind /dev "$1/dev" && mount -t proc proc "$1/proc" && exec chroot "$1" /usr/bin/flanneld "$2""#;
        daemon
            .args(["--mount", "--", "sh", "-ec", enter, "enter"])
            .arg(&self.0)
            .arg("--registry-dir=/var/lib/flannel");
        Process::spawn("flanneld", daemon, log).unwrap()
    }
}

#[test]
fn package_installs_and_runs_on_a_clean_debian() {
    let mut lab = new_lab("package_install");
    let debian = match CleanDebian::make(lab.dir().join("debian")) {
        Ok(debian) => debian,
        Err(reason) => {
            not_tested(&format!("installing the package: {reason}"));
            return;
        }
    };
    fs::rename(build(&lab), debian.path("flanneld.deb")).unwrap();
    debian.pretend_systemd();

    debian.dpkg(&["--install", "/flanneld.deb"]);

    // Not started, and not from the next boot on: it has no configuration yet.
    assert_eq!(debian.called(), ["systemctl --system daemon-reload"]);
    assert!(
        !debian
            .path("etc/systemd/system/multi-user.target.wants/flanneld.service")
            .exists()
    );
    let version = run(debian.command("flanneld").arg("--version")).unwrap();
    assert!(version.contains(env!("CARGO_PKG_VERSION")), "{version}");
    assert_eq!(fs::metadata(debian.path("usr/bin/flanneld")).unwrap().uid(), 0);

    run(debian
        .command("flanneld")
        .args(["network", "set", CONFIG, "--registry-dir=/var/lib/flannel"]))
    .unwrap();
    let host = lab.host("h1").unwrap();
    let log = lab.dir().join("flanneld.log");
    let mut daemon = debian.start_daemon(&host, &log);
    let subnet_file = debian.path("run/flannel/subnet.env");
    wait_until(PATIENCE, "the installed daemon's subnet file", || {
        let exited = daemon.exited();
        assert!(exited.is_none(), "{exited:?}: {}", tail(&daemon.log(), 20));
        subnet_file.exists()
    })
    .unwrap();
    let subnet = SubnetEnv::read(&subnet_file).unwrap();
    run(debian.command("/usr/lib/flannel/mk-docker-opts.sh").arg("-c")).unwrap();
    let options = fs::read_to_string(debian.path("run/docker_opts.env")).unwrap();
    let expected = format!("--bip={} --ip-masq=true --mtu={}", subnet.subnet, subnet.mtu);
    assert!(options.contains(&expected), "{options}");
    daemon.signal(Signal::SIGTERM);
    let status = daemon.wait(PATIENCE).unwrap();
    assert!(status.success(), "{status}: {}", tail(&daemon.log(), 20));

    fs::write(debian.path("etc/default/flanneld"), "FLANNEL_OPTIONS=--ip-masq\n").unwrap();
    // Of the same version, which is to the package as an upgrade is.
    debian.dpkg(&["--install", "/flanneld.deb"]);
    // Only where it runs.
    assert_eq!(
        debian.called(),
        [
            "systemctl --system daemon-reload",
            "deb-systemd-invoke try-restart flanneld.service"
        ]
    );
    let kept = fs::read_to_string(debian.path("etc/default/flanneld")).unwrap();
    assert_eq!(kept, "FLANNEL_OPTIONS=--ip-masq\n");

    debian.dpkg(&["--remove", "flanneld"]);
    assert_eq!(
        debian.called(),
        [
            "deb-systemd-invoke stop flanneld.service",
            "systemctl --system daemon-reload"
        ]
    );
    assert!(!debian.path("usr/bin/flanneld").exists());
    assert!(
        debian.path("etc/default/flanneld").exists(),
        "the user's settings are gone"
    );

    debian.dpkg(&["--purge", "flanneld"]);
    assert!(!debian.path("etc/default/flanneld").exists());
    assert!(!debian.path("usr/lib/flannel").exists());
}
