//! What the machine's processors do, and for whom.

use flannel::lab::Namespace;
use serde::Serialize;
use std::{collections::BTreeSet, fs, os::unix::fs::MetadataExt, process, time::Instant};

/// The kernel counts processor time in these for user space, on every architecture that Rust knows (`USER_HZ`, time(7)).
const TICKS_PER_SECOND: f64 = 100.0;

/// Processor time since boot, in seconds of one processor.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Counters {
    /// Nothing to do, or nothing but waiting for a disk.
    idle: f64,
    /// Taken by the hypervisor for others.
    steal: f64,
}

/// What happened between two looks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(crate) struct Usage {
    /// The time that went by, seconds.
    pub(crate) wall: f64,
    /// Processor time used by anything at all, seconds.
    pub(crate) busy: f64,
    /// Processor time used by processes that have nothing to do with the benchmark, or taken by the hypervisor, as a share of
    /// all that there was.
    pub(crate) noise: f64,
}

/// A look at the counters, to be compared with the next.
pub(crate) struct Look {
    at: Instant,
    counters: Counters,
    foreign: f64,
}

impl Look {
    /// Looks now; processes in `own` belong to the benchmark.
    pub(crate) fn now(own: &[&Namespace]) -> Look {
        Look {
            at: Instant::now(),
            counters: counters(&stat()).unwrap_or_default(),
            foreign: foreign(own),
        }
    }

    /// What has happened since.
    pub(crate) fn since(&self, own: &[&Namespace]) -> Usage {
        let foreign = foreign(own);
        let (wall, stat) = (self.at.elapsed().as_secs_f64(), stat());
        let now = counters(&stat).unwrap_or_default();
        let there_was = wall * processors(&stat) as f64;
        let steal = now.steal - self.counters.steal;
        let idle = now.idle - self.counters.idle;
        Usage {
            wall,
            // Not the sum of the busy counters: those are sampled at each tick, while idle time is measured.
            busy: (there_was - idle - steal).max(0.0),
            noise: (steal + (foreign - self.foreign).max(0.0)) / there_was,
        }
    }
}

fn stat() -> String {
    fs::read_to_string("/proc/stat").unwrap_or_default()
}

/// How many processors are at work.
pub(crate) fn count() -> usize {
    processors(&stat())
}

fn processors(stat: &str) -> usize {
    let is_processor = |line: &&str| line.starts_with("cpu") && !line.starts_with("cpu ");
    stat.lines().filter(is_processor).count()
}

/// From the first line of /proc/stat: `cpu user nice system idle iowait irq softirq steal ...`, see proc(5).
fn counters(stat: &str) -> Option<Counters> {
    let line = stat.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<f64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    Some(Counters {
        idle: (fields.get(3)? + fields.get(4)?) / TICKS_PER_SECOND,
        steal: fields.get(7)? / TICKS_PER_SECOND,
    })
}

/// Processor time that all processes outside the benchmark have used so far, children that have ended included; seconds.
/// Threads of the kernel are not among them: most of what those do, they do for the benchmark.
fn foreign(own: &[&Namespace]) -> f64 {
    let own: BTreeSet<u64> = own
        .iter()
        .filter_map(|ns| Some(fs::metadata(ns.path()).ok()?.ino()))
        .collect();
    let Ok(entries) = fs::read_dir("/proc") else { return 0.0 };
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    let times = pids.filter_map(|pid| {
        let process = Stat::parse(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?;
        let is_own = [pid, process.parent].contains(&process::id())
            // One that has ended and waits for its parent to notice has no namespace any more, but still has its times.
            || fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|ns| own.contains(&ns.ino()));
        (!is_own && !process.is_kernel(pid)).then_some(process.ticks)
    });
    times.sum::<u64>() as f64 / TICKS_PER_SECOND
}

/// Of /proc/<pid>/stat.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Stat {
    parent: u32,
    /// In user and kernel mode, by itself and by its children that have ended.
    ticks: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Stat> {
        // The second field, the program's name in parentheses, may itself contain spaces and parentheses.
        let (_, after_name) = text.rsplit_once(')')?;
        let fields: Vec<&str> = after_name.split_whitespace().collect();
        let ticks: Option<Vec<u64>> = fields.get(11..15)?.iter().map(|field| field.parse().ok()).collect();
        Some(Stat {
            parent: fields.get(1)?.parse().ok()?,
            ticks: ticks?.iter().sum(),
        })
    }

    /// Whether it is a thread of the kernel: all of those are children of process 2.
    fn is_kernel(&self, pid: u32) -> bool {
        const KTHREADD: u32 = 2;
        pid == KTHREADD || self.parent == KTHREADD
    }
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::*;

    #[test]
    fn processor_times_are_read() {
        let stat = "\
cpu  1000 0 500 20000 300 10 90 40 0 0
cpu0 500 0 250 10000 150 5 45 20 0 0
cpu1 500 0 250 10000 150 5 45 20 0 0
intr 1 2 3
ctxt 5";
        let expected = Counters {
            idle: 203.0,
            steal: 0.4,
        };
        assert_eq!(counters(stat), Some(expected));
        assert_eq!(processors(stat), 2);
        assert_eq!(counters("cpu  1 2 3"), None);
    }

    #[test]
    fn process_with_an_odd_name_is_read() {
        let text = "77 (a) b (c)) S 1 77 77 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 555 1000 100";
        let expected = Stat { parent: 1, ticks: 110 };
        assert_eq!(Stat::parse(text), Some(expected));
        assert!(!expected.is_kernel(77));
    }

    #[test]
    fn threads_of_the_kernel_are_told_from_processes() {
        let thread = Stat::parse("30 (kworker/0:1) I 2 0 0 0 -1 69238880 0 0 0 0 0 5 0 0 20 0").unwrap();
        assert!(thread.is_kernel(30));
    }
}
