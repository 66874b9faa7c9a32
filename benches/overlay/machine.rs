//! Where and when the figures were taken.

use super::processors;
use flannel::lab;
use serde::Serialize;
use std::{fs, process::Command};

/// What a reader must know to compare figures.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct Machine {
    /// The processor's model.
    pub(crate) processor: String,
    /// How many of them are at work.
    pub(crate) processors: usize,
    /// The kernel's release.
    pub(crate) kernel: String,
    /// The day, UTC.
    pub(crate) date: String,
    /// The commit that was built, `-dirty` if files of it were changed.
    pub(crate) commit: String,
    /// TCP's congestion control.
    pub(crate) congestion_control: String,
    /// The version of iperf3.
    pub(crate) iperf3: String,
}

impl Machine {
    /// This one, now. What cannot be found out is `unknown`.
    pub(crate) fn look() -> Machine {
        Machine {
            processor: or_unknown(fs::read_to_string("/proc/cpuinfo").ok().as_deref().and_then(model)),
            processors: processors::count(),
            kernel: or_unknown(fs::read_to_string("/proc/sys/kernel/osrelease").ok().as_deref()),
            date: or_unknown(output(lab::command("date").args(["--utc", "+%Y-%m-%d"])).as_deref()),
            commit: commit(),
            congestion_control: or_unknown(
                fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")
                    .ok()
                    .as_deref(),
            ),
            iperf3: or_unknown(
                output(lab::command("iperf3").arg("--version"))
                    .as_deref()
                    .and_then(|text| text.lines().next()),
            ),
        }
    }

    /// In one line, for people.
    pub(crate) fn describe(&self) -> String {
        format!(
            "{}, {} processors, Linux {}, {}, commit {}",
            self.processor, self.processors, self.kernel, self.date, self.commit
        )
    }
}

fn or_unknown(text: Option<&str>) -> String {
    text.map(str::trim)
        .filter(|text| !text.is_empty())
        .unwrap_or("unknown")
        .to_owned()
}

fn output(command: &mut Command) -> Option<String> {
    lab::run(command).ok()
}

/// `model name : ...` of /proc/cpuinfo, of the first processor.
fn model(cpuinfo: &str) -> Option<&str> {
    let line = cpuinfo.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1)
}

fn commit() -> String {
    let git = |arguments: &[&str]| {
        // Run through sudo, the repository is somebody else's, and git does not read that without being told to.
        let own = ["-c", "safe.directory=*", "-C", env!("CARGO_MANIFEST_DIR")];
        output(lab::command("git").args(own).args(arguments))
    };
    let Some(hash) = git(&["rev-parse", "--short=10", "HEAD"]) else {
        return or_unknown(None);
    };
    // The results of an earlier run do not change what was built.
    let changed = git(&[
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ".",
        ":!docs/bench",
    ]);
    let dirty = changed.is_none_or(|changed| !changed.trim().is_empty());
    format!("{}{}", hash.trim(), if dirty { "-dirty" } else { "" })
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn model_of_the_processor_is_read() {
        let cpuinfo = "processor\t: 0\nmodel\t\t: 106\nmodel name\t: Some Processor @ 2.90GHz\nprocessor\t: 1\n";
        assert_eq!(or_unknown(model(cpuinfo)), "Some Processor @ 2.90GHz");
        assert_eq!(or_unknown(model("processor : 0\nBogoMIPS : 50.00\n")), "unknown");
    }
}
