//! Filters of system calls (seccomp(2)): each call of a thread that has one, and of all that it starts, is looked up in it.
//!
//! A filter is a program for the kernel (bpf(4), "classic"). The kernel runs it once for each call that it lets pass whatever its
//! arguments are, and remembers that (Linux 5.11), so that the length of a filter costs nothing; before, a comparison is about a
//! nanosecond. Having any filter takes 50 to 70 ns of each call (Linux 6.18, an empty read of 330 ns): with a packet of 64 bytes to a
//! call 1 to 2 % of what carrying it takes, with superpackets nothing that could be measured.
//!
//! # What becomes of a refused call
//! It fails, as another policy would make it fail. Killing the process would be the harder line, but a call that a future C library
//! makes in the place of one on the list would then take the network down.
//! - A call that is new, as of Linux 5.1, is not there (`ENOSYS`): the library goes back to the older one that it knows.
//! - A call that the library makes in the midst of starting or ending a thread, when it has blocked all signals, fails with `EPERM`.
//! - All others fail with `EPERM`, too, and are counted by their number: the kernel sends a signal (`SECCOMP_RET_TRAP`), whose
//!   [handler](watch_refusals) does both. (With the signal blocked it would kill.)
//! - Where other programs are to be started under the filter, which have no such handler, the kernel itself makes the call fail, and
//!   writes a line into its own log.

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

/// The first number of the calls that were added since Linux 5.1, which are the same on all architectures.
const NEW: u32 = 424;

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

/// A filter, ready to be installed.
#[derive(Clone, Debug)]
pub struct Filter {
    program: Vec<libc::sock_filter>,
    /// What is refused is for the kernel's log.
    logged: bool,
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

const PASS: u32 = libc::SECCOMP_RET_ALLOW;
const COUNT: u32 = libc::SECCOMP_RET_TRAP;
const FAIL: u32 = libc::SECCOMP_RET_ERRNO | libc::EPERM as u32;
const IS_NOT_THERE: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

impl Filter {
    /// Lets pass nothing but `calls`; those that come most often first. Of what it refuses, `quiet` is not counted. For threads of a
    /// process that [watches](watch_refusals). `None` for a processor whose calls are not known here.
    pub fn allowing(calls: &[Call], quiet: &[libc::c_long]) -> Option<Self> {
        let mut program = beginning(COUNT, COUNT)?;
        for call in calls {
            program.extend(decide(call, PASS, COUNT));
        }
        program.extend([branch(IF_AT_LEAST, NEW, 0, 1), step(RETURN, IS_NOT_THERE)]);
        program.extend(quiet.iter().flat_map(|&number| always(number, FAIL)));
        program.push(step(RETURN, COUNT));
        Some(Self { program, logged: false })
    }

    /// Lets pass everything but `calls`, also in the programs that are started under it. `None` for a processor whose calls are not
    /// known here.
    pub fn refusing(calls: &[libc::c_long]) -> Option<Self> {
        // A 32-bit program has other numbers, and is one of the host's own that changes traffic rules.
        let mut program = beginning(PASS, FAIL)?;
        program.extend(calls.iter().flat_map(|&number| always(number, FAIL)));
        program.push(step(RETURN, PASS));
        Some(Self { program, logged: true })
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
        // Before Linux 5.16 a filter switches off guesses of the processor in the whole thread, as a guard against code that was
        // loaded from elsewhere; there is none here.
        let wanted = libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
        let log = if self.logged { libc::SECCOMP_FILTER_FLAG_LOG } else { 0 };
        // Linux 4.14 has the one, and 4.17 the other.
        set(wanted | log).or_else(|_| set(0))
    }
}

/// What stands in front: the verdicts on calls of another architecture, and on second numbers of calls. What follows finds the call's
/// number loaded.
fn beginning(of_others: u32, second: u32) -> Option<Vec<libc::sock_filter>> {
    Some(vec![
        step(LOAD, offset_of!(libc::seccomp_data, arch) as u32),
        branch(IF_EQUAL, ARCHITECTURE?, 1, 0),
        step(RETURN, of_others),
        step(LOAD, offset_of!(libc::seccomp_data, nr) as u32),
        branch(IF_AT_LEAST, X32, 0, 1),
        step(RETURN, second),
    ])
}

/// For this call `verdict`, whatever its arguments are.
fn always(number: libc::c_long, verdict: u32) -> [libc::sock_filter; 2] {
    // Linux' numbers are small.
    [branch(IF_EQUAL, number as u32, 0, 1), step(RETURN, verdict)]
}

/// For this call `verdict` if its condition holds, `otherwise` if not; all others go on behind it.
fn decide(call: &Call, verdict: u32, otherwise: u32) -> Vec<libc::sock_filter> {
    let (index, condition) = match call.when {
        When::Always => return always(call.number, verdict).to_vec(),
        When::Is(index, value) => (index, branch(IF_EQUAL, value, 0, 1)),
        When::Lacks(index, bits) => (index, branch(IF_ANY_BIT, bits, 1, 0)),
    };
    let low_half = offset_of!(libc::seccomp_data, args) + index * size_of::<u64>();
    vec![
        branch(IF_EQUAL, call.number as u32, 0, 4),
        step(LOAD, low_half as u32),
        condition,
        step(RETURN, verdict),
        step(RETURN, otherwise),
    ]
}

/// Makes calls fail that a filter refuses to any thread of this process, and counts them: to be called before the first that
/// [allows only some](Filter::allowing) is installed, under which the process would be killed otherwise.
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

    /// Counts this call, and lets all others pass.
    fn counting(number: libc::c_long) -> Filter {
        let mut program = beginning(COUNT, COUNT).unwrap();
        program.extend(always(number, COUNT));
        program.push(step(RETURN, PASS));
        Filter { program, logged: false }
    }

    #[test]
    fn a_refused_call_fails_is_counted_and_the_thread_goes_on() {
        let filter = counting(libc::SYS_socket);
        let before = count(libc::SYS_socket);
        let codes = under(&filter, || [(); 2].map(|()| code(UdpSocket::bind("127.0.0.1:0"))));
        assert_eq!(codes, [Some(libc::EPERM); 2]);
        assert_eq!(last_refusal(), None);
        assert_eq!(count(libc::SYS_socket), before + 2);
        UdpSocket::bind("127.0.0.1:0").unwrap();
    }

    #[test]
    fn the_kernel_itself_makes_a_call_fail_where_nobody_counts() {
        let filter = Filter::refusing(&[libc::SYS_mkdirat, MKDIR]).unwrap();
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
            let filter = Filter::allowing(&[call], &[]).unwrap();
            run(&filter.program, libc::SYS_kill, arguments) == PASS
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
    fn second_numbers_are_refused_and_other_architectures_to_workers() {
        let read = Call {
            number: libc::SYS_read,
            when: When::Always,
        };
        let workers = Filter::allowing(&[read], &[]).unwrap();
        assert_eq!(run_as(&workers.program, 0x4000_0003, libc::SYS_read, [0; 6]), COUNT);
        let filter = Filter::refusing(&[libc::SYS_mount]).unwrap();
        let verdict = |number: libc::c_long| run(&filter.program, number, [0; 6]);
        assert_eq!(verdict(libc::SYS_read), PASS);
        assert_eq!(verdict(libc::SYS_mount), FAIL);
        assert_eq!(verdict(libc::SYS_read | libc::c_long::from(X32)), FAIL);
        assert_eq!(run_as(&filter.program, 0x4000_0003, libc::SYS_read, [0; 6]), PASS);
    }

    #[test]
    fn what_is_new_is_not_there_unless_it_is_on_the_list() {
        let call = Call {
            number: libc::SYS_io_uring_enter,
            when: When::Always,
        };
        let filter = Filter::allowing(&[call], &[libc::SYS_clone]).unwrap();
        for (number, expected) in [
            (libc::SYS_io_uring_enter, PASS),
            (libc::SYS_epoll_pwait2, IS_NOT_THERE),
            (9_999, IS_NOT_THERE),
            (libc::SYS_clone, FAIL),
            (libc::SYS_openat, COUNT),
        ] {
            assert_eq!(run(&filter.program, number, [0; 6]), expected, "{number}");
        }
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
