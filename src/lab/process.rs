//! Programs of the lab: run to the end, or kept running with their log in a file.

use super::LabError;
use nix::{
    sys::signal::{self, Signal},
    unistd::Pid,
};
use std::{
    env,
    fs::{self, File},
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

/// How often something that announces itself by no event (another process's file, a port, an exit) is looked at again.
/// Short against everything waited for here, long enough to cost no noticeable processor time.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

/// A command in a process group of its own and without input: a terminal's Ctrl-C reaches the lab's owner only, which
/// then takes everything down in order.
pub fn command(program: &str) -> Command {
    let mut command = Command::new(program);
    command.process_group(0).stdin(Stdio::null());
    command
}

/// Whether `program` is on the PATH.
pub fn has_program(program: &str) -> bool {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// Takes what could set a flanneld's flags (`FLANNELD_*`) or make it report to this process's supervisor out of the
/// environment of `command`: a daemon of the lab is what its command line says.
pub fn without_daemon_env(command: &mut Command) -> &mut Command {
    for (name, _) in env::vars_os() {
        if name.as_encoded_bytes().starts_with(b"FLANNELD_") {
            command.env_remove(name);
        }
    }
    command.env_remove("NOTIFY_SOCKET")
}

/// Runs `command` to its end and returns its standard output.
///
/// # Errors
/// [`LabError::Start`], or [`LabError::Failed`] with what it wrote when it does not exit with 0.
pub fn run(command: &mut Command) -> Result<String, LabError> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .map_err(|source| LabError::Start {
            command: command_line(command),
            source,
        })?;
    succeeded(command, output)
}

/// As [`run`], for a program that may hang: it is killed after `limit`, or when `watch`, which is called all the while,
/// returns an error.
///
/// # Errors
/// Those of [`run`], [`LabError::TimedOut`], and what `watch` fails with.
pub fn run_within<E: From<LabError>>(
    command: &mut Command,
    limit: Duration,
    mut watch: impl FnMut() -> Result<(), E>,
) -> Result<String, E> {
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|source| LabError::Start {
            command: command_line(command),
            source,
        })?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let output = thread::scope(|scope| {
        // Read all the while: a program whose output nobody takes would wait for that, and never end.
        let (out, err) = (scope.spawn(|| read_all(out)), scope.spawn(|| read_all(err)));
        let what = format!("`{}` to end", command_line(command));
        let ended = wait_for(limit, &what, || -> Result<_, E> {
            watch()?;
            // Nobody else waits for this child, so that cannot fail.
            Ok(child.try_wait().ok().flatten())
        });
        if ended.is_err() {
            // Fails only when it has ended just now; and then there is nothing to wait for either.
            let _ = child.kill().and_then(|()| child.wait().map(drop));
        }
        // A reader that panicked has nothing to give.
        let (stdout, stderr) = (out.join().unwrap_or_default(), err.join().unwrap_or_default());
        ended.map(|status| Output { status, stdout, stderr })
    })?;
    Ok(succeeded(command, output)?)
}

/// What can be read until the other end is closed.
fn read_all(source: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut source) = source {
        // What came before an error is still worth showing.
        let _ = source.read_to_end(&mut bytes);
    }
    bytes
}

/// The standard output of a command that exited with 0.
fn succeeded(command: &Command, output: Output) -> Result<String, LabError> {
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() {
        return Ok(stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let said = if stderr.trim().is_empty() {
        stdout.as_str()
    } else {
        stderr.as_ref()
    };
    Err(LabError::Failed {
        command: command_line(command),
        status: output.status,
        output: one_line(said),
    })
}

/// Calls `look` until it returns a value.
///
/// # Errors
/// [`LabError::TimedOut`] naming `what` once `limit` is over, and whatever `look` fails with.
pub fn wait_for<T, E: From<LabError>>(
    limit: Duration,
    what: &str,
    mut look: impl FnMut() -> Result<Option<T>, E>,
) -> Result<T, E> {
    let start = Instant::now();
    loop {
        if let Some(value) = look()? {
            return Ok(value);
        }
        if start.elapsed() >= limit {
            return Err(LabError::TimedOut {
                what: what.to_owned(),
                limit,
            }
            .into());
        }
        thread::sleep(LOOK_AGAIN);
    }
}

/// Waits until `holds` returns true.
///
/// # Errors
/// [`LabError::TimedOut`] naming `what` once `limit` is over.
pub fn wait_until(limit: Duration, what: &str, mut holds: impl FnMut() -> bool) -> Result<(), LabError> {
    wait_for(limit, what, || Ok(holds().then_some(())))
}

/// The last `lines` lines of `text`.
pub fn tail(text: &str, lines: usize) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}

/// A program running in the lab, both its outputs going to one log file.
///
/// Dropping it kills the program, unless it was spawned from
/// [`Namespace::detached_command`](super::Namespace::detached_command) and [`Process::detach`]ed.
#[derive(Debug)]
pub struct Process {
    name: String,
    command: String,
    log: PathBuf,
    child: Child,
    detached: bool,
}

impl Process {
    /// Starts `command`; `log` is made, or appended to when the same program runs a second time.
    ///
    /// # Errors
    /// [`LabError::File`] for the log, [`LabError::Start`] for the program.
    pub fn spawn(name: &str, mut command: Command, log: &Path) -> Result<Process, LabError> {
        let failed = |source| LabError::File {
            action: "write",
            path: log.to_owned(),
            source,
        };
        let out = File::options().create(true).append(true).open(log).map_err(failed)?;
        let err = out.try_clone().map_err(failed)?;
        let child = command
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(err)
            .spawn()
            .map_err(|source| LabError::Start {
                command: command_line(&command),
                source,
            })?;
        let command = command_line(&command);
        Ok(Process {
            name: name.to_owned(),
            command,
            log: log.to_owned(),
            child,
            detached: false,
        })
    }

    /// The name given at the start, for messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process id: that of the program itself, since everything before it in the command was replaced by `exec`.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where both outputs go.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// What the program has written so far; empty when the log cannot be read.
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// How the program ended, or `None` while it runs.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        // The only way to fail is that the child was reaped elsewhere, which nothing here does.
        self.child.try_wait().ok().flatten()
    }

    /// Sends a signal; a program that has ended already is left alone.
    pub fn signal(&mut self, signal: Signal) {
        if self.exited().is_none() {
            // A pid fits; the process is not reaped, so the number cannot have gone to someone else.
            let pid = Pid::from_raw(self.pid().cast_signed());
            if let Err(error) = signal::kill(pid, signal) {
                tracing::warn!("cannot send {signal} to {} (pid {pid}): {error}", self.name);
            }
        }
    }

    /// Waits for the program to end by itself.
    ///
    /// # Errors
    /// [`LabError::TimedOut`] once `limit` is over.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, LabError> {
        let what = format!("`{}` to end", self.command);
        wait_for(limit, &what, || Ok(self.exited()))
    }

    /// Asks the program to end (SIGTERM) and waits for it; kills it when it does not.
    ///
    /// # Errors
    /// [`LabError::TimedOut`] when it had to be killed after `limit`.
    pub fn stop(&mut self, limit: Duration) -> Result<ExitStatus, LabError> {
        self.signal(Signal::SIGTERM);
        let ended = self.wait(limit);
        if ended.is_err() {
            self.kill();
        }
        ended
    }

    /// Kills the program (SIGKILL) and waits until it is gone.
    pub fn kill(&mut self) {
        self.signal(Signal::SIGKILL);
        if let Err(error) = self.child.wait() {
            tracing::warn!("cannot wait for {}: {error}", self.name);
        }
    }

    /// From now on the program outlives this value and this process. Best called last, when the lab is sure to be kept:
    /// a program that was only just started is not in its namespace yet, where removing the lab would find it.
    pub fn detach(&mut self) {
        self.detached = true;
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.detached && self.exited().is_none() {
            self.kill();
        }
    }
}

/// The command as a person would type it.
fn command_line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Errors are shown on one line each.
pub(super) fn one_line(text: &str) -> String {
    text.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect::<Vec<_>>()
        .join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::process::ExitStatusExt;

    fn sh(script: &str) -> Command {
        let mut sh = command("sh");
        sh.args(["-c", script]);
        sh
    }

    #[test]
    fn output_of_a_command_is_returned() {
        assert_eq!(run(&mut sh("echo one; echo two >&2")).unwrap(), "one\n");
    }

    #[test]
    fn failure_names_command_status_and_what_it_wrote() {
        let error = run(&mut sh("echo first >&2; echo second >&2; exit 3"))
            .unwrap_err()
            .to_string();
        assert!(error.contains("sh -c") && error.contains("exit status: 3"), "{error}");
        assert!(error.ends_with("first; second"), "{error}");
    }

    #[test]
    fn program_that_is_not_there_is_named() {
        let error = run(&mut command("no-such-program-here")).unwrap_err().to_string();
        assert!(error.starts_with("cannot start `no-such-program-here`"), "{error}");
    }

    #[test]
    fn program_that_hangs_is_killed() {
        let watch = || Ok::<(), LabError>(());
        assert_eq!(
            run_within(&mut sh("echo quick"), Duration::from_secs(5), watch).unwrap(),
            "quick\n"
        );
        let error = run_within(&mut sh("echo $$; exec sleep 600"), Duration::from_millis(50), watch).unwrap_err();
        assert!(matches!(error, LabError::TimedOut { .. }), "{error}");
        let watch = || {
            Err(LabError::Name {
                name: "as the test wants".to_owned(),
            })
        };
        let error = run_within(&mut sh("exec sleep 600"), Duration::from_secs(600), watch).unwrap_err();
        assert!(matches!(error, LabError::Name { .. }), "{error}");
    }

    #[test]
    fn more_output_than_a_pipe_holds_is_taken() {
        let watch = || Ok::<(), LabError>(());
        let output = run_within(&mut sh("head -c 300000 /dev/zero"), Duration::from_secs(5), watch).unwrap();
        assert_eq!(output.len(), 300_000);
    }

    #[test]
    fn waiting_in_vain_says_for_what() {
        let error = wait_until(Duration::ZERO, "the end of time", || false)
            .unwrap_err()
            .to_string();
        assert_eq!(error, "waited 0 s for the end of time in vain");
    }

    #[test]
    fn tail_keeps_the_last_lines() {
        assert_eq!(tail("1\n2\n3\n", 2), "2\n3");
        assert_eq!(tail("1", 5), "1");
    }

    #[test]
    fn both_outputs_of_a_process_go_to_its_log() {
        let log = std::env::temp_dir().join(format!("flannel-process-test-{}.log", std::process::id()));
        let mut process = Process::spawn("both", sh("echo out; echo err >&2"), &log).unwrap();
        assert!(process.wait(Duration::from_secs(5)).unwrap().success());
        assert_eq!(process.log(), "out\nerr\n");
        fs::remove_file(log).unwrap();
    }

    #[test]
    fn stop_asks_before_it_kills() {
        let log = std::env::temp_dir().join(format!("flannel-stop-test-{}.log", std::process::id()));
        let script = "trap 'echo asked; exit 7' TERM; echo ready; while :; do sleep 0.01; done";
        let mut process = Process::spawn("stop", sh(script), &log).unwrap();
        wait_until(Duration::from_secs(5), "the trap", || process.log().contains("ready")).unwrap();
        assert_eq!(process.stop(Duration::from_secs(5)).unwrap().code(), Some(7));

        let mut deaf = Process::spawn(
            "deaf",
            sh("trap '' TERM; echo deaf; while :; do sleep 0.01; done"),
            &log,
        )
        .unwrap();
        wait_until(Duration::from_secs(5), "the trap", || deaf.log().contains("deaf")).unwrap();
        assert!(deaf.stop(Duration::from_millis(50)).is_err());
        assert_eq!(deaf.exited().unwrap().signal(), Some(9));
        fs::remove_file(log).unwrap();
    }
}
