//! Running the programs that change rules.

use std::{
    env,
    ffi::OsString,
    iter,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{io::AsyncWriteExt, process::Command, time::timeout};

use super::Error;

/// How long iptables may wait for its lock: kube-proxy holds it for a second or two when it writes thousands of rules.
pub(super) const LOCK_PATIENCE: Duration = Duration::from_secs(5);

/// How long a program may take: the wait for the lock, and as long again for the work.
const LIMIT: Duration = LOCK_PATIENCE.saturating_mul(2);

/// Where administrators' programs are; the PATH of a plain user on Debian leaves them out.
const ADMIN_DIRS: [&str; 2] = ["/usr/sbin", "/sbin"];

/// A program that is installed.
#[derive(Debug, Clone)]
pub(super) struct Tool(PathBuf);

impl Tool {
    /// Looks for it on the PATH, then where administrators' programs are.
    pub(super) fn find(name: &str) -> Option<Tool> {
        let path = env::var_os("PATH").unwrap_or_default();
        find_in(&path, name)
    }

    /// Runs it to its end; what it wrote to standard output.
    pub(super) async fn run(&self, arguments: &[&str], input: &str) -> Result<String, Error> {
        let command = || {
            let words = iter::once(self.0.to_string_lossy()).chain(arguments.iter().map(|&word| word.into()));
            words.collect::<Vec<_>>().join(" ")
        };
        let start = |source| Error::Start {
            command: command(),
            source,
        };
        let mut child = Command::new(&self.0)
            .args(arguments)
            // Its messages are looked at.
            .env("LC_ALL", "C")
            // Which it has no use for, and is seen by whoever may see its environment.
            .env_remove("FLANNELD_ETCD_PASSWORD")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            // The daemon may be told to stop at any moment. Each program does its work in one transaction, or not at all.
            .kill_on_drop(true)
            .spawn()
            .map_err(start)?;
        let stdin = child.stdin.take();
        let work = async {
            if let Some(mut stdin) = stdin {
                // A program that does not read to the end says why, and that is the better message.
                let _ = stdin.write_all(input.as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let ended = timeout(LIMIT, work).await;
        let output = ended
            .map_err(|_| Error::TimedOut {
                command: command(),
                limit: LIMIT,
            })?
            .map_err(start)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let said: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
            return Err(Error::Failed {
                command: command(),
                status: output.status,
                said: said.join("; "),
            });
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

fn find_in(path: &OsString, name: &str) -> Option<Tool> {
    let places = env::split_paths(path).chain(ADMIN_DIRS.map(PathBuf::from));
    let found = places.map(|dir| dir.join(name)).find(|file| Path::is_file(file))?;
    Some(Tool(found))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh() -> Tool {
        Tool::find("sh").unwrap()
    }

    #[tokio::test]
    async fn input_goes_in_and_output_comes_out() {
        assert_eq!(sh().run(&["-c", "cat; echo two"], "one\n").await.unwrap(), "one\ntwo\n");
        // More than a pipe holds, to a program that does not want it.
        let much = "x".repeat(1 << 20);
        assert_eq!(sh().run(&["-c", "exec <&-; echo done"], &much).await.unwrap(), "done\n");
    }

    #[tokio::test]
    async fn a_failure_says_what_the_program_said() {
        let error = sh()
            .run(&["-c", "echo one >&2; echo two >&2; exit 3"], "")
            .await
            .unwrap_err();
        let message = error.to_string();
        assert!(message.contains("exit status: 3): one; two; nothing"), "{message}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_program_that_hangs_is_given_up_and_killed() {
        // Time is the test's own: the limit passes at once.
        let error = sh().run(&["-c", "exec sleep 600"], "").await.unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
    }

    #[test]
    fn administrators_programs_are_found_whatever_the_path_is() {
        assert!(find_in(&OsString::from("/nowhere"), "no-such-program").is_none());
        let first = find_in(&OsString::from("/nowhere:/bin"), "sh").unwrap();
        assert_eq!(first.0, Path::new("/bin/sh"));
    }
}
