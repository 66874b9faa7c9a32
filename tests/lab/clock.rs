//! A wall clock that one process sees and a test sets: the machine's own must stay as it is.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Comes before the C library in the process: adds the seconds in a file to each reading of the wall clock, and to no other.
const SHIM: &str = r#"
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *time)
{
    char text[32] = { 0 };
    int result = syscall(SYS_clock_gettime, clock, time);
    if (result != 0 || (clock != CLOCK_REALTIME && clock != CLOCK_REALTIME_COARSE))
        return result;
    int file = open(getenv("FAULT_CLOCK"), O_RDONLY | O_CLOEXEC);
    if (file < 0 || read(file, text, sizeof text - 1) <= 0)
        abort();
    close(file);
    time->tv_sec += atol(text);
    return 0;
}
"#;

/// The clock of the processes that are started with it.
pub(crate) struct WallClock {
    shim: PathBuf,
    offset: PathBuf,
}

impl WallClock {
    /// As the machine's at first; its files are in `dir`.
    pub(crate) fn new(dir: &Path) -> WallClock {
        let (source, shim, offset) = (dir.join("clock.c"), dir.join("clock.so"), dir.join("clock"));
        fs::write(&source, SHIM).unwrap();
        // What Rust's own linker is.
        let compiled = Command::new("cc")
            .args(["-shared", "-fPIC", "-o"])
            .args([&shim, &source])
            .status();
        assert!(compiled.unwrap().success(), "cc does not compile {}", source.display());
        let clock = WallClock { shim, offset };
        clock.set_off_by(0);
        clock
    }

    /// So many seconds from now on, in one jump.
    pub(crate) fn set_off_by(&self, seconds: i64) {
        let new = self.offset.with_extension("new");
        fs::write(&new, seconds.to_string()).unwrap();
        fs::rename(new, &self.offset).unwrap();
    }

    /// The program, with its arguments, that runs another one by this clock.
    pub(crate) fn runner(&self) -> [String; 3] {
        [
            "env".to_owned(),
            format!("FAULT_CLOCK={}", self.offset.display()),
            format!("LD_PRELOAD={}", self.shim.display()),
        ]
    }
}
