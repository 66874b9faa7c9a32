//! One network namespace: the commands in it, the processes in it.

use super::process::{command, run};
use super::{LabError, RUN_NETNS};
use nix::sched::{CloneFlags, setns};
use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    panic,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
};

/// A network namespace by its name; a handle that is cheap to clone. The [`Lab`](super::Lab) makes and removes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    name: String,
}

impl Namespace {
    /// Makes the namespace, with `lo` up: without it a host cannot reach its own addresses.
    pub(super) fn create(name: String) -> Result<Namespace, LabError> {
        run(command("ip").args(["netns", "add", &name]))?;
        let namespace = Namespace { name };
        namespace.ip("link set lo up")?;
        Ok(namespace)
    }

    /// The handle of one that is there.
    pub(super) fn existing(name: String) -> Namespace {
        Namespace { name }
    }

    /// The name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file that stands for the namespace.
    pub fn path(&self) -> PathBuf {
        Path::new(RUN_NETNS).join(&self.name)
    }

    /// A command that runs `program` inside and dies with its parent.
    ///
    /// `setpriv` and `nsenter` replace themselves by `exec`, so the child's pid is the program's own. It is in a process
    /// group of its own (a terminal's Ctrl-C does not reach it) and is killed when the **thread** that spawned it ends,
    /// however that happens: PDEATHSIG follows the thread, see prctl(2).
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = command("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter"]);
        self.enter(command, program.as_ref())
    }

    /// A command that runs `program` inside and outlives its parent, in a session of its own so that a closing terminal
    /// does not end it.
    pub fn detached_command(&self, program: impl AsRef<Path>) -> Command {
        // No process group of its own: for a group leader setsid would fork, and the pid be that of the parent.
        let mut command = Command::new("setsid");
        command.stdin(Stdio::null()).arg("nsenter");
        self.enter(command, program.as_ref())
    }

    fn enter(&self, mut command: Command, program: &Path) -> Command {
        command
            .arg(format!("--net={}", self.path().display()))
            .arg("--")
            .arg(program);
        command
    }

    /// Runs `work` in a thread inside the namespace: sockets, devices and threads that it makes stay there.
    ///
    /// # Errors
    /// When the namespace is gone, or without root. A panic of `work` goes on here.
    pub fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // Only this thread changes its namespace, and it ends here.
                setns(File::open(self.path())?, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            thread.join().unwrap_or_else(|payload| panic::resume_unwind(payload))
        })
    }

    /// Runs `ip` inside, with the words of `arguments` (`link set eth0 up`), and returns what it printed.
    ///
    /// # Errors
    /// [`LabError::Start`] or [`LabError::Failed`].
    pub fn ip(&self, arguments: &str) -> Result<String, LabError> {
        run(command("ip")
            .args(["-n", &self.name])
            .args(arguments.split_whitespace()))
    }

    /// Writes `/proc/sys/net/<key>` of this namespace (`ipv4/ip_forward`).
    ///
    /// # Errors
    /// [`LabError::Start`] or [`LabError::Failed`].
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), LabError> {
        // /proc/sys/net shows the namespace of the process that opens it, so a process inside must do the writing.
        let script = r#"printf '%s\n' "$1" > "/proc/sys/net/$2""#;
        run(self.command("sh").args(["-c", script, "sysctl", value, key])).map(drop)
    }
}

/// The pids of the processes that are in one of `namespaces`.
pub(super) fn processes_in(namespaces: &[Namespace]) -> Vec<i32> {
    let wanted: Vec<(u64, u64)> = namespaces
        .iter()
        .filter_map(|ns| fs::metadata(ns.path()).ok())
        .map(|meta| (meta.dev(), meta.ino()))
        .collect();
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok());
    // A process that has ended but was not waited for has no namespace any more: it does not count.
    pids.filter(|pid| {
        fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|meta| wanted.contains(&(meta.dev(), meta.ino())))
    })
    .collect()
}
