//! This start of the machine: its name, and how long ago it was.

use std::{fs, io, time::Duration};

use nix::time::{ClockId, clock_gettime};

/// The kernel's name for a start of the machine (random(4)).
pub const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The name: the same on all that runs on one machine since it started.
///
/// # Errors
/// When `/proc` is not there.
pub fn id() -> io::Result<String> {
    Ok(fs::read_to_string(BOOT_ID)?.trim().to_owned())
}

/// How long the machine has been up, suspended or not: all of its processes agree on it, and nobody sets it.
pub fn uptime() -> Duration {
    // Linux has this clock since 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}
