//! What a container's security policy does.

use std::{io, os::unix::process::CommandExt, process::Command};

/// Refuses the system call of this number with `EPERM` to the command and all that it starts, as Docker's seccomp profile does with
/// some.
pub(crate) fn refuse(command: &mut Command, call: libc::c_long) {
    const LOAD_WORD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
    const JUMP_IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
    const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;
    let instruction = |code, k, jt| libc::sock_filter { code, jt, jf: 0, k };
    let filter = [
        // The call's number is what seccomp_data begins with.
        instruction(LOAD_WORD, 0, 0),
        instruction(JUMP_IF_EQUAL, call as u32, 1),
        instruction(RETURN, libc::SECCOMP_RET_ALLOW, 0),
        instruction(RETURN, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32, 0),
    ];
    // SAFETY: between fork and exec the closure only makes a system call, with memory that it owns.
    unsafe {
        command.pre_exec(move || {
            let program = libc::sock_fprog {
                len: filter.len() as u16,
                filter: filter.as_ptr().cast_mut(),
            };
            match libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &program) {
                0 => Ok(()),
                _ => Err(io::Error::last_os_error()),
            }
        });
    }
}
