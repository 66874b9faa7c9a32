//! Capabilities (capabilities(7)): the parts of root's power. Each thread has its own; one that it starts begins with the same.

use std::{
    fmt, io,
    ops::{BitAnd, BitOr, Sub},
};

/// By number (linux/capability.h), as of Linux 5.9, which added the last one.
const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// A set of capabilities.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Capabilities(u64);

impl Capabilities {
    /// None.
    pub const NONE: Self = Self(0);
    /// All, of this kernel and of later ones.
    pub const ALL: Self = Self(u64::MAX);
    /// To write to files whatever their mode is.
    pub const DAC_OVERRIDE: Self = Self(1 << 1);
    /// To read them, and to find them in any directory.
    pub const DAC_READ_SEARCH: Self = Self(1 << 2);
    /// To take capabilities away from what this thread may ever have.
    pub const SETPCAP: Self = Self(1 << 8);
    /// To bind ports below 1024.
    pub const NET_BIND_SERVICE: Self = Self(1 << 10);
    /// To configure the network.
    pub const NET_ADMIN: Self = Self(1 << 12);
    /// To open raw sockets.
    pub const NET_RAW: Self = Self(1 << 13);
    /// To load modules into the kernel.
    pub const SYS_MODULE: Self = Self(1 << 16);

    /// Whether all of `others` are in it.
    pub fn contains(self, others: Self) -> bool {
        self & others == others
    }

    /// Their names, without `CAP_`, by number; of one that has none here its number.
    pub fn names(self) -> Vec<String> {
        let numbers = (0..u64::BITS).filter(|number| self.0 & (1 << number) != 0);
        numbers
            .map(|number| match NAMES.get(number as usize) {
                Some(name) => (*name).to_owned(),
                None => number.to_string(),
            })
            .collect()
    }
}

impl BitOr for Capabilities {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl BitAnd for Capabilities {
    type Output = Self;

    fn bitand(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl Sub for Capabilities {
    type Output = Self;

    fn sub(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }
}

impl fmt::Display for Capabilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NONE => f.write_str("none"),
            some => f.write_str(&some.names().join(", ")),
        }
    }
}

/// What capget(2) and capset(2) are told beside the sets. The version is that of 64 bits, in two halves.
#[repr(C)]
struct Header {
    version: u32,
    /// 0: the calling thread.
    pid: libc::c_int,
}

const VERSION_3: u32 = 0x2008_0522;

/// Half of each set.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Half {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The sets of the calling thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Held {
    /// What it uses.
    pub effective: Capabilities,
    /// What it may use.
    pub permitted: Capabilities,
    /// What a program that it starts may have of that, if it is not root's.
    pub inheritable: Capabilities,
}

impl Held {
    /// What the calling thread has.
    ///
    /// # Errors
    /// As capget(2).
    pub fn now() -> io::Result<Self> {
        let mut header = Header {
            version: VERSION_3,
            pid: 0,
        };
        let mut halves = [Half::default(); 2];
        // SAFETY: the call reads one header, and writes two halves for version 3; both live here through it.
        let done = unsafe { libc::syscall(libc::SYS_capget, &raw mut header, halves.as_mut_ptr()) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        let join = |of: fn(&Half) -> u32| Capabilities(u64::from(of(&halves[1])) << 32 | u64::from(of(&halves[0])));
        Ok(Self {
            effective: join(|half| half.effective),
            permitted: join(|half| half.permitted),
            inheritable: join(|half| half.inheritable),
        })
    }

    /// Makes these the calling thread's.
    ///
    /// # Errors
    /// `EPERM` when it has less.
    pub fn set(&self) -> io::Result<()> {
        let mut header = Header {
            version: VERSION_3,
            pid: 0,
        };
        let half = |shift: u32| Half {
            effective: (self.effective.0 >> shift) as u32,
            permitted: (self.permitted.0 >> shift) as u32,
            inheritable: (self.inheritable.0 >> shift) as u32,
        };
        let halves = [half(0), half(32)];
        // SAFETY: the call reads one header and, for version 3, two halves; both live here through it.
        let done = unsafe { libc::syscall(libc::SYS_capset, &raw mut header, halves.as_ptr()) };
        if done < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// Leaves the calling thread, and what it starts, no capabilities but those of `kept` that it has. What it may ever regain by
/// starting another program, the bounding set, becomes as small where it may be changed: with `SETPCAP`.
///
/// # Errors
/// As capset(2). It is always allowed to give capabilities up.
pub fn keep_only(kept: Capabilities) -> io::Result<Capabilities> {
    let held = Held::now()?;
    if held.effective.contains(Capabilities::SETPCAP) {
        for number in (0..u64::BITS).filter(|number| kept.0 & (1 << number) == 0) {
            // SAFETY: the call touches no memory. It fails for numbers that this kernel does not have, which is as good.
            unsafe { libc::prctl(libc::PR_CAPBSET_DROP, libc::c_ulong::from(number), 0, 0, 0) };
        }
    }
    let left = Held {
        effective: held.effective & kept,
        permitted: held.permitted & kept,
        // With it goes what was ambient, so that programs of the daemon keep theirs where it is not root.
        inheritable: held.inheritable & kept,
    };
    left.set()?;
    Ok(left.permitted)
}

/// From now on no program that the calling thread starts gains rights by being set-user-ID or by its file's capabilities
/// (`PR_SET_NO_NEW_PRIVS`, Linux 3.5). Seccomp filters need it.
///
/// # Errors
/// `EINVAL` from an older kernel.
pub fn gain_no_more() -> io::Result<()> {
    // SAFETY: the call touches no memory.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn capabilities_are_named() {
        let some = Capabilities::NET_ADMIN | Capabilities::SYS_MODULE | Capabilities(1 << 63);
        assert_eq!(some.names(), ["NET_ADMIN", "SYS_MODULE", "63"]);
        assert_eq!((some - Capabilities::ALL).to_string(), "none");
        assert_eq!(NAMES[40], "CHECKPOINT_RESTORE");
        assert_eq!(Capabilities(1 << 21).to_string(), "SYS_ADMIN");
    }

    #[test]
    fn a_thread_gives_up_its_own_and_nobody_elses() {
        let before = Held::now().unwrap();
        let left = thread::spawn(|| {
            keep_only(Capabilities::NET_RAW).unwrap();
            let inherited = thread::spawn(|| Held::now().unwrap()).join().unwrap();
            assert_eq!(inherited, Held::now().unwrap());
            assert!(
                Held {
                    permitted: Capabilities::ALL,
                    ..inherited
                }
                .set()
                .is_err()
            );
            inherited
        });
        let left = left.join().unwrap();
        assert_eq!(left.permitted, before.permitted & Capabilities::NET_RAW);
        assert_eq!(left.effective, before.effective & Capabilities::NET_RAW);
        assert_eq!(Held::now().unwrap(), before);
    }
}
