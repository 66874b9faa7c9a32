//! Filters of system calls (seccomp(2)): each call of a thread that has one, and of all that it starts, is looked up in it.
//!
//! A filter is a program for the kernel (bpf(4), "classic"). The kernel runs it once for each call that it lets pass whatever its
//! arguments are, and remembers that (Linux 5.11), so that the length of a filter costs nothing; before, a comparison is about a
//! nanosecond.
//!
//! # What becomes of a refused call
//! It fails with `EPERM`, as a firewall or another policy would make it, and is counted by its number. Killing the process would
//! be the harder line, but a call that a future libc or kernel uses in the place of one on the list would then take the network
//! down. In a thread of this process the kernel signals (`SECCOMP_RET_TRAP`), and the [handler](watch_refusals) counts and makes the
//! call fail; where programs are started under the filter (`SECCOMP_RET_ERRNO`) the kernel does it, and writes a line into its
//! own log.

use std::{
    cell::Cell,
    io,
    mem::{self, offset_of},
    ptr,
    sync::atomic::{AtomicU32, Ordering::Relaxed},
};

/// Of this kernel's own calls (linux/audit.h): others, of 32-bit programs, have other numbers.
#[cfg(target_arch = "x86_64")]
const ARCHITECTURE: Option<u32> = Some(0xC000_003E);
#[cfg(target_arch = "aarch64")]
const ARCHITECTURE: Option<u32> = Some(0xC000_00B7);
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const ARCHITECTURE: Option<u32> = None;

/// With this bit a number is of the x32 ABI on x86-64, where most calls have a second number. The other architectures have no
/// numbers as high.
const X32: u32 = 1 << 30;

/// Numbers that are counted one by one: more than there are calls.
const COUNTED: usize = 1_024;

/// How often each call was refused.
static REFUSED: [AtomicU32; COUNTED] = [const { AtomicU32::new(0) }; COUNTED];

thread_local! {
    /// The call that was last refused to this thread. A plain place in the thread's memory, which a signal handler may write to:
    /// nothing is set up at the first use, and nothing is left to do at the end.
    static LAST: Cell<Option<libc::c_long>> = const { Cell::new(None) };
}

/// A system call, under a condition or without one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: libc::c_long,
    /// What must hold for its arguments.
    pub when: When,
}

/// A condition on the low 32 bits of an argument.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// None.
    Always,
    /// The argument of this number, from 0, is this.
    Is(usize, u32),
    /// It has none of these bits.
    Lacks(usize, u32),
}

/// What a filter does with a call that it does not let pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The call fails and the kernel logs it: also in other programs.
    Logged,
    /// The call fails and is counted here: for threads of a process that [watches](watch_refusals).
    Counted,
}

/// A filter, ready to be installed.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    refusal: Refusal,
}

const LOAD: u16 = (libc::BPF_LD | libc::BPF_W | libc::BPF_ABS) as u16;
const IF_EQUAL: u16 = (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16;
const IF_AT_LEAST: u16 = (libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K) as u16;
const IF_ANY_BIT: u16 = (libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K) as u16;
const RETURN: u16 = (libc::BPF_RET | libc::BPF_K) as u16;

fn step(code: u16, k: u32) -> libc::sock_filter {
    branch(code, k, 0, 0)
}

/// Goes on `then` steps further if the condition holds, `otherwise` if not.
fn branch(code: u16, k: u32, then: u8, otherwise: u8) -> libc::sock_filter {
    libc::sock_filter {
        code,
        jt: then,
        jf: otherwise,
        k,
    }
}

impl Filter {
    /// Lets pass nothing but `calls`; those that come most often first. `None` for a processor whose calls are not known here.
    pub fn allowing(calls: &[Call], refusal: Refusal) -> Option<Self> {
        Self::new(calls, refusal, Verdict::Pass)
    }

    /// Lets pass everything but `calls`. `None` for a processor whose calls are not known here.
    pub fn refusing(calls: &[libc::c_long], refusal: Refusal) -> Option<Self> {
        let calls: Vec<Call> = calls
            .iter()
            .map(|&number| Call {
                number,
                when: When::Always,
            })
            .collect();
        Self::new(&calls, refusal, Verdict::Refuse)
    }

    /// `listed`: what happens to `calls`; the opposite happens to all others.
    fn new(calls: &[Call], refusal: Refusal, listed: Verdict) -> Option<Self> {
        let architecture = ARCHITECTURE?;
        let refuse = match refusal {
            Refusal::Logged => libc::SECCOMP_RET_ERRNO | libc::EPERM as u32,
            Refusal::Counted => libc::SECCOMP_RET_TRAP,
        };
        let [listed, others] = match listed {
            Verdict::Pass => [libc::SECCOMP_RET_ALLOW, refuse],
            Verdict::Refuse => [refuse, libc::SECCOMP_RET_ALLOW],
        };
        let mut program = vec![
            step(LOAD, offset_of!(libc::seccomp_data, arch) as u32),
            branch(IF_EQUAL, architecture, 1, 0),
            step(RETURN, refuse),
            step(LOAD, offset_of!(libc::seccomp_data, nr) as u32),
            // A second number of a call that is on the list must not get past it.
            branch(IF_AT_LEAST, X32, 0, 1),
            step(RETURN, refuse),
        ];
        for Call { number, when } in calls {
            // Linux' numbers are small.
            let number = *number as u32;
            let argument = |index: usize| {
                let low = offset_of!(libc::seccomp_data, args) + index * size_of::<u64>();
                step(LOAD, low as u32)
            };
            match *when {
                When::Always => program.extend([branch(IF_EQUAL, number, 0, 1), step(RETURN, listed)]),
                When::Is(index, value) => program.extend([
                    branch(IF_EQUAL, number, 0, 4),
                    argument(index),
                    branch(IF_EQUAL, value, 0, 1),
                    step(RETURN, listed),
                    step(RETURN, others),
                ]),
                When::Lacks(index, bits) => program.extend([
                    branch(IF_EQUAL, number, 0, 4),
                    argument(index),
                    branch(IF_ANY_BIT, bits, 1, 0),
                    step(RETURN, listed),
                    step(RETURN, others),
                ]),
            }
        }
        program.push(step(RETURN, others));
        Some(Self { program, refusal })
    }

    /// Puts the calling thread under the filter, for ever, beside those that it is under already.
    ///
    /// # Errors
    /// `ENOSYS` or `EINVAL` from a kernel without filters; `EACCES` without `no_new_privs` and `CAP_SYS_ADMIN`; or what another
    /// filter says.
    pub fn install(&self) -> io::Result<()> {
        let program = libc::sock_fprog {
            len: self.program.len() as libc::c_ushort,
            filter: self.program.as_ptr().cast_mut(),
        };
        let set = |flags: libc::c_ulong| {
            // SAFETY: the kernel copies the program, which both pointers lead to and which lives through the call.
            let done = unsafe {
                libc::syscall(
                    libc::SYS_seccomp,
                    libc::SECCOMP_SET_MODE_FILTER,
                    flags,
                    &raw const program,
                )
            };
            if done == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        };
        match self.refusal {
            // Before Linux 4.14 refusals cannot be logged.
            Refusal::Logged => set(libc::SECCOMP_FILTER_FLAG_LOG).or_else(|_| set(0)),
            Refusal::Counted => set(0),
        }
    }
}

#[derive(Clone, Copy)]
enum Verdict {
    Pass,
    Refuse,
}

/// Makes calls fail that a filter with [`Refusal::Counted`] refuses, in any thread of this process: to be called before the first
/// of those is installed, without which the process would be killed.
///
/// # Errors
/// As sigaction(2).
pub fn watch_refusals() -> io::Result<()> {
    // SAFETY: `sigaction` is plain data, for which all zeros is a valid value: no flags, and no signal blocked meanwhile.
    let mut action: libc::sigaction = unsafe { mem::zeroed() };
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = refused;
    action.sa_sigaction = handler as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action lives through the call, and its handler has the form that SA_SIGINFO asks for, and does nothing that a
    // signal handler may not do.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, ptr::null_mut()) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The calls that were refused so far, with how often.
pub fn refusals() -> impl Iterator<Item = (libc::c_long, u32)> {
    let counts = REFUSED.iter().map(|count| count.load(Relaxed));
    (0..).zip(counts).filter(|(_, count)| *count > 0)
}

/// The call that was last refused to the calling thread.
pub fn last_refusal() -> Option<libc::c_long> {
    LAST.get()
}

/// SIGSYS: a filter has refused a call of this thread. Counts it and makes it fail with `EPERM`.
extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // linux/signal.h: by a filter, and not by kill(2).
    const SYS_SECCOMP: libc::c_int = 1;
    // SAFETY: for a handler with SA_SIGINFO the kernel gives a valid description of the signal.
    if unsafe { (*info).si_code } != SYS_SECCOMP {
        return;
    }
    // SAFETY: for such a handler the third argument is the interrupted thread's `ucontext_t`, whose registers are put back when
    // this returns. They lie, as integers of 64 bits, from the beginning of the machine context on: what libraries call them
    // differs, their place is the kernel's.
    let registers = unsafe { (&raw mut (*context.cast::<libc::ucontext_t>()).uc_mcontext).cast::<u64>() };
    // SAFETY: both places lie within the registers of that architecture.
    let number = unsafe { *registers.add(NUMBER) };
    LAST.set(Some(number as libc::c_long));
    if let Some(count) = usize::try_from(number).ok().and_then(|number| REFUSED.get(number)) {
        count.fetch_add(1, Relaxed);
    }
    // SAFETY: as above.
    unsafe { *registers.add(RESULT) = -i64::from(libc::EPERM) as u64 };
}

/// Where a call's number and its result are among the registers: in one, RAX, to which the kernel has put the number back.
#[cfg(target_arch = "x86_64")]
const NUMBER: usize = libc::REG_RAX as usize;
#[cfg(target_arch = "x86_64")]
const RESULT: usize = libc::REG_RAX as usize;

/// x8 and x0, behind the address of a fault.
#[cfg(target_arch = "aarch64")]
const NUMBER: usize = 1 + 8;
#[cfg(target_arch = "aarch64")]
const RESULT: usize = 1;

/// There are no filters, and so no refusals.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const NUMBER: usize = 0;
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
const RESULT: usize = 0;

#[cfg(test)]
mod tests {
    use std::{fs, net::UdpSocket, thread};

    use super::*;
    use crate::sys::capabilities::gain_no_more;

    /// In a thread of its own, which keeps the filter.
    fn under<T: Send>(filter: &Filter, work: impl FnOnce() -> T + Send) -> T {
        watch_refusals().unwrap();
        thread::scope(|scope| {
            let work = scope.spawn(|| {
                gain_no_more().unwrap();
                filter.install().unwrap();
                work()
            });
            work.join().unwrap()
        })
    }

    fn count(number: libc::c_long) -> u32 {
        let all = refusals().find(|(refused, _)| *refused == number);
        all.map_or(0, |(_, count)| count)
    }

    fn code<T: std::fmt::Debug>(result: io::Result<T>) -> Option<i32> {
        result.unwrap_err().raw_os_error()
    }

    #[test]
    fn a_refused_call_fails_is_counted_and_the_thread_goes_on() {
        let filter = Filter::refusing(&[libc::SYS_socket], Refusal::Counted).unwrap();
        let before = count(libc::SYS_socket);
        let codes = under(&filter, || [(); 2].map(|()| code(UdpSocket::bind("127.0.0.1:0"))));
        assert_eq!(codes, [Some(libc::EPERM); 2]);
        assert_eq!(last_refusal(), None);
        assert_eq!(count(libc::SYS_socket), before + 2);
        UdpSocket::bind("127.0.0.1:0").unwrap();
    }

    #[test]
    fn the_kernel_itself_makes_a_call_fail_where_nobody_counts() {
        let filter = Filter::refusing(&[libc::SYS_mkdirat, MKDIR], Refusal::Logged).unwrap();
        let code = under(&filter, || code(fs::create_dir("/tmp/flannel-never-made")));
        assert_eq!(code, Some(libc::EPERM));
    }

    #[cfg(target_arch = "x86_64")]
    const MKDIR: libc::c_long = libc::SYS_mkdir;
    #[cfg(not(target_arch = "x86_64"))]
    const MKDIR: libc::c_long = libc::SYS_mkdirat;

    #[test]
    fn a_call_may_pass_by_its_arguments() {
        let passes = |when, arguments| {
            let call = Call {
                number: libc::SYS_kill,
                when,
            };
            let filter = Filter::allowing(&[call], Refusal::Counted).unwrap();
            run(&filter.program, libc::SYS_kill, arguments) == libc::SECCOMP_RET_ALLOW
        };
        for (process, expected) in [(42, true), (43, false), (0, false)] {
            assert_eq!(passes(When::Is(0, 42), [process, 9, 0, 0, 0, 0]), expected, "{process}");
        }
        for (signal, expected) in [(0, true), (1, false), (0x10, false), (0x20, true)] {
            assert_eq!(
                passes(When::Lacks(1, 0x1f), [42, signal, 0, 0, 0, 0]),
                expected,
                "{signal}"
            );
        }
    }

    #[test]
    fn other_architectures_and_second_numbers_are_refused() {
        let filter = Filter::refusing(&[libc::SYS_mount], Refusal::Counted).unwrap();
        let pass = |number: libc::c_long| run(&filter.program, number, [0; 6]) == libc::SECCOMP_RET_ALLOW;
        assert!(pass(libc::SYS_read) && !pass(libc::SYS_mount));
        assert!(!pass(libc::SYS_read | libc::c_long::from(X32)));
        let foreign = run_as(&filter.program, 0x4000_0003, libc::SYS_read, [0; 6]);
        assert_eq!(foreign, libc::SECCOMP_RET_TRAP);
    }

    fn run(program: &[libc::sock_filter], number: libc::c_long, arguments: [u64; 6]) -> u32 {
        run_as(program, ARCHITECTURE.unwrap(), number, arguments)
    }

    /// What the kernel's machine makes of a call.
    fn run_as(program: &[libc::sock_filter], architecture: u32, number: libc::c_long, arguments: [u64; 6]) -> u32 {
        let mut data = vec![0; size_of::<libc::seccomp_data>()];
        data[..4].copy_from_slice(&(number as u32).to_ne_bytes());
        data[4..8].copy_from_slice(&architecture.to_ne_bytes());
        for (slot, argument) in data[16..].chunks_exact_mut(8).zip(arguments) {
            slot.copy_from_slice(&argument.to_ne_bytes());
        }
        let (mut at, mut loaded) = (0, 0);
        loop {
            let step = program[at];
            at += 1;
            let holds = match step.code {
                LOAD => {
                    loaded = u32::from_ne_bytes(data[step.k as usize..][..4].try_into().unwrap());
                    continue;
                }
                RETURN => return step.k,
                IF_EQUAL => loaded == step.k,
                IF_AT_LEAST => loaded >= step.k,
                IF_ANY_BIT => loaded & step.k != 0,
                other => panic!("no such step: {other}"),
            };
            at += usize::from(if holds { step.jt } else { step.jf });
        }
    }
}
