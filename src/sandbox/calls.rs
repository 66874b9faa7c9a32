//! Which system calls are made, and which never.

use crate::sys::seccomp::{Call, When};

/// A system call by the name that it has in `libc`.
macro_rules! calls {
    ($($name:ident)*) => { [$((stringify!($name), libc::$name)),*] };
}

/// What moves packets, the most frequent first: on the device, on the sockets, and to sleep.
const MOVING: &[(&str, libc::c_long)] = &calls!(
    SYS_read SYS_writev SYS_sendmmsg SYS_recvmmsg SYS_ppoll SYS_write SYS_sendto SYS_epoll_pwait SYS_futex SYS_clock_gettime
);

/// The same by their older names, which aarch64 does not have.
#[cfg(target_arch = "x86_64")]
const MOVING_ONCE: &[(&str, libc::c_long)] = &calls!(SYS_epoll_wait SYS_poll);
#[cfg(not(target_arch = "x86_64"))]
const MOVING_ONCE: &[(&str, libc::c_long)] = &[];

/// What the allocator, the standard library, signals, and the end of a thread take, also one that panics: it writes its message,
/// unwinds, and lets go of its files. `rt_sigaction`: upon a memory fault the standard library puts the system's own handler back, and
/// would meet the same fault for ever without. `restart_syscall` is the kernel's, for a wait that a stop of the process has
/// interrupted.
const LIVING: &[(&str, libc::c_long)] = &calls!(
    SYS_munmap SYS_mremap SYS_madvise SYS_brk SYS_getrandom SYS_sched_yield SYS_restart_syscall SYS_rt_sigreturn
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_sigaltstack SYS_gettid SYS_getpid SYS_close SYS_exit SYS_exit_group
);

/// What io_uring takes besides: entering a ring, and taking one down.
const RING: &[(&str, libc::c_long)] = &calls!(SYS_io_uring_enter SYS_io_uring_register);

/// What no part of the daemon, and none of the programs that it starts, does once it serves: reach into other processes, into the
/// kernel, its modules, clocks and keys, change what is mounted where, or change to other namespaces.
const NEVER: &[(&str, libc::c_long)] = &calls!(
    SYS_acct SYS_add_key SYS_adjtimex SYS_bpf SYS_chroot SYS_clock_adjtime SYS_clock_settime SYS_delete_module
    SYS_fanotify_init SYS_finit_module SYS_fsconfig SYS_fsmount SYS_fsopen SYS_fspick SYS_init_module SYS_kcmp SYS_kexec_load
    SYS_keyctl SYS_mount SYS_mount_setattr SYS_move_mount SYS_move_pages SYS_open_by_handle_at SYS_open_tree
    SYS_perf_event_open SYS_pidfd_getfd SYS_pivot_root SYS_process_vm_readv SYS_process_vm_writev SYS_ptrace SYS_quotactl
    SYS_reboot SYS_request_key SYS_setdomainname SYS_sethostname SYS_setns SYS_settimeofday SYS_swapoff SYS_swapon SYS_syslog
    SYS_umount2 SYS_unshare SYS_userfaultfd SYS_vhangup
);

#[cfg(target_arch = "x86_64")]
const NEVER_HERE: &[(&str, libc::c_long)] = &calls!(SYS_ioperm SYS_iopl SYS_kexec_file_load);
#[cfg(not(target_arch = "x86_64"))]
const NEVER_HERE: &[(&str, libc::c_long)] = &[];

/// What makes a ring: an interface to most of the kernel, for those who use it.
const RINGS: &[(&str, libc::c_long)] = &calls!(SYS_io_uring_setup SYS_io_uring_enter SYS_io_uring_register);

/// What the C library does, or may come to do, when a thread starts or ends and all signals are blocked.
const QUIET: &[(&str, libc::c_long)] = &calls!(
    SYS_clone SYS_kill SYS_membarrier SYS_prctl SYS_prlimit64 SYS_rseq SYS_rt_sigtimedwait
    SYS_sched_getaffinity SYS_sched_setaffinity SYS_sched_setparam SYS_sched_setscheduler SYS_set_robust_list
    SYS_set_tid_address SYS_tkill SYS_wait4 SYS_waitid
);

#[cfg(target_arch = "x86_64")]
const QUIET_HERE: &[(&str, libc::c_long)] = &calls!(SYS_arch_prctl SYS_fork SYS_vfork);
#[cfg(not(target_arch = "x86_64"))]
const QUIET_HERE: &[(&str, libc::c_long)] = &[];

/// Others that somebody who has taken over a worker would try first: to be told by their names.
const TEMPTING: &[(&str, libc::c_long)] = &calls!(
    SYS_accept4 SYS_bind SYS_capset SYS_connect SYS_dup SYS_dup3 SYS_epoll_ctl SYS_eventfd2 SYS_execve
    SYS_execveat SYS_fcntl SYS_fstat SYS_getsockopt SYS_ioctl SYS_listen SYS_memfd_create SYS_mmap
    SYS_mprotect SYS_newfstatat SYS_openat SYS_pipe2 SYS_readlinkat SYS_readv SYS_recvfrom
    SYS_recvmsg SYS_seccomp SYS_sendmsg SYS_setsockopt SYS_setuid SYS_socket SYS_socketpair SYS_statx
    SYS_tgkill SYS_unlinkat
);

/// What a worker may do, which moves packets by io_uring or not.
pub fn of_workers(io_uring: bool) -> Vec<Call> {
    let ring = if io_uring { RING } else { &[] };
    let always = [MOVING, MOVING_ONCE, ring, LIVING].concat();
    let mut calls: Vec<Call> = always
        .into_iter()
        .map(|(_, number)| Call {
            number,
            when: When::Always,
        })
        .collect();
    let executable = libc::PROT_EXEC as u32;
    calls.extend([
        // Memory, but none that code could be written into.
        Call {
            number: libc::SYS_mmap,
            when: When::Lacks(2, executable),
        },
        Call {
            number: libc::SYS_mprotect,
            when: When::Lacks(2, executable),
        },
        // How a process ends itself, and not another.
        Call {
            number: libc::SYS_tgkill,
            when: When::Is(0, std::process::id()),
        },
        // Whether a file is open, which the standard library asks before it closes it where assertions are on.
        Call {
            number: libc::SYS_fcntl,
            when: When::Is(1, libc::F_GETFD as u32),
        },
    ]);
    calls
}

/// What is refused to workers without being counted.
pub fn quiet() -> Vec<libc::c_long> {
    let all = [QUIET, QUIET_HERE].concat();
    all.into_iter().map(|(_, number)| number).collect()
}

/// What the control plane never does while it serves, and neither do the programs that it starts.
pub fn never(io_uring: bool) -> Vec<libc::c_long> {
    let rings = if io_uring { &[] } else { RINGS };
    let all = [NEVER, NEVER_HERE, rings].concat();
    all.into_iter().map(|(_, number)| number).collect()
}

/// A call's name, as in `openat`; of one that has none here, its number.
pub fn name(number: libc::c_long) -> String {
    let lists = [MOVING, MOVING_ONCE, LIVING, RING, RINGS, NEVER, NEVER_HERE, TEMPTING];
    let known = lists.into_iter().flatten().find(|(_, known)| *known == number);
    known.map_or_else(
        || format!("number {number}"),
        |(name, _)| name.trim_start_matches("SYS_").to_owned(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_named() {
        assert_eq!(name(libc::SYS_openat), "openat");
        assert_eq!(name(libc::SYS_sendmmsg), "sendmmsg");
        assert_eq!(name(9_999), "number 9999");
    }

    #[test]
    fn nothing_is_both_needed_and_never_done() {
        for io_uring in [false, true] {
            let needed = of_workers(io_uring);
            for number in never(io_uring) {
                assert!(needed.iter().all(|call| call.number != number), "{}", name(number));
            }
        }
    }

    #[test]
    fn rings_are_for_those_who_use_them() {
        assert!(never(false).contains(&libc::SYS_io_uring_setup));
        assert!(!never(true).contains(&libc::SYS_io_uring_setup));
        let enters = |io_uring| {
            of_workers(io_uring)
                .iter()
                .any(|call| call.number == libc::SYS_io_uring_enter)
        };
        assert!(enters(true) && !enters(false));
    }
}
