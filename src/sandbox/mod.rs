//! Least privilege: what the daemon does not need any more it gives up, for good and in all of its threads.
//!
//! In three steps, each as early as it can be:
//!
//! | when | what is given up |
//! | --- | --- |
//! | [at the start](Sandbox::enter), before there is a second thread | all capabilities that no backend and no rule needs; gaining rights by starting a program |
//! | [each worker](Workers::confine), before its first packet | all capabilities; all system calls but those that move packets ([`calls`]) |
//! | [once the daemon serves](Sandbox::settle) | the capabilities that its own backend does not need; the system calls that no daemon of ours makes |
//!
//! The control plane is one thread; from it start those that look up names, the programs that change traffic rules and, once it has
//! settled, the thread that starts workers anew ([`crate::sys::priority`]), so that all of them are as confined as it is. (A thread
//! that was started earlier ends within moments of its last errand.) What the kernel refuses to do is said once, and the daemon goes
//! on without it: in a container, or under a supervisor, much is given up before it begins. `--sandbox=off` gives up nothing.
//!
//! All threads share one memory. Whoever takes over a worker has no power of his own, but can write to the control plane's
//! memory, and so the filter of the one is a hurdle on the way to the rights of the other, and no wall.

pub mod calls;
mod files;
mod trial;

use std::{
    collections::BTreeSet,
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tracing::{debug, info, warn};

use crate::{
    observe::status,
    sys::{
        capabilities::{self, Capabilities, Held},
        seccomp::{self, Filter},
    },
};

pub use files::Places;

/// What some backend or rule needs until the daemon serves: `NET_ADMIN` for devices, routes, rules and large socket buffers,
/// `NET_RAW` for ICMP errors and legacy iptables, `NET_BIND_SERVICE` for a port below 1024 (the tunnel's or that of
/// `--healthz-port`), `SYS_MODULE` for the modules that iptables loads; and `SETPCAP` to give up the rest.
const SET_UP: [Capabilities; 5] = [
    Capabilities::NET_ADMIN,
    Capabilities::NET_RAW,
    Capabilities::NET_BIND_SERVICE,
    Capabilities::SYS_MODULE,
    Capabilities::SETPCAP,
];

/// The first port that anyone may bind (ip(7)); there is no such file before Linux 4.11.
const FIRST_FREE_PORT: &str = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
const DEFAULT_FIRST_FREE_PORT: u16 = 1_024;

/// What the daemon needs while it serves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Needs {
    /// Raw sockets: ICMP errors of the engine, or legacy iptables.
    pub raw_sockets: bool,
    /// A UDP port that is bound anew when the external address changes.
    pub port: Option<u16>,
    /// Rings of io_uring for workers that are started anew.
    pub io_uring: bool,
}

/// The daemon's confinement. Clones share it. The default confines nothing.
#[derive(Debug, Clone, Default)]
pub struct Sandbox(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    on: bool,
    no_new_privs: bool,
    control_filter: bool,
    /// `None` until there are workers.
    worker_filter: Option<bool>,
    /// What has been tried out, for workers with io_uring or without: engines that are started anew have no time for that, and
    /// perhaps no descriptors.
    tried: [Option<Filter>; 2],
    /// For the files that are root's to read or write only by these.
    for_files: Capabilities,
    /// What the system refused.
    troubles: Vec<String>,
    /// The refused calls that were told of.
    told: BTreeSet<libc::c_long>,
}

impl Sandbox {
    /// Confines the calling thread to what setting up needs. `places`: the files that the daemon may come to read and write.
    ///
    /// To be called while there is no other thread.
    pub fn enter(places: &Places) -> Self {
        let sandbox = Self::default();
        let mut state = sandbox.state();
        state.on = true;
        state.for_files = files::rights(places);
        let kept = SET_UP.into_iter().fold(state.for_files, |all, one| all | one);
        state.limit(kept);
        match capabilities::gain_no_more() {
            Ok(()) => state.no_new_privs = true,
            Err(error) => state.trouble(format!("no_new_privs: {error}")),
        }
        drop(state);
        sandbox
    }

    /// Confines the calling thread, and what it starts from now on, to what serving needs.
    pub fn settle(&self, needs: Needs) {
        let mut state = self.state();
        if !state.on {
            return;
        }
        let mut kept = state.for_files | Capabilities::NET_ADMIN;
        if needs.raw_sockets {
            kept = kept | Capabilities::NET_RAW;
        }
        if needs.port.is_some_and(|port| port < first_free_port()) {
            kept = kept | Capabilities::NET_BIND_SERVICE;
        }
        state.limit(kept);
        match refuse(&calls::never(needs.io_uring)) {
            Ok(()) => state.control_filter = true,
            Err(reason) => state.trouble(format!("a filter of system calls: {reason}")),
        }
        let held = held();
        let workers = match state.worker_filter {
            None => "",
            Some(true) => "; the workers keep none, and the system calls that move packets",
            Some(false) => "; the workers keep none",
        };
        info!("sandbox: of root's capabilities the daemon keeps {held}{workers}");
    }

    /// What workers are to be confined by, which move packets by io_uring or not. Tries out first whether they can work so.
    pub fn workers(&self, io_uring: bool) -> Workers {
        let mut state = self.state();
        if !state.on {
            return Workers::default();
        }
        let tried = state.tried[usize::from(io_uring)].clone();
        let filter = match tried.map_or_else(|| try_out(io_uring), Ok) {
            Ok(filter) => {
                state.tried[usize::from(io_uring)] = Some(filter.clone());
                Some(filter)
            }
            Err(reason) => {
                state.trouble(format!("a filter of the workers' system calls: {reason}"));
                None
            }
        };
        state.worker_filter = Some(filter.is_some());
        Workers(Some(Arc::new(Confinement {
            filter,
            sandbox: self.clone(),
        })))
    }

    /// Says once of each system call that a filter has refused it.
    pub fn tell_of_refusals(&self) {
        let mut state = self.state();
        for (number, count) in seccomp::refusals() {
            if state.told.insert(number) {
                let name = calls::name(number);
                warn!(
                    "a worker wanted to make the system call {name}, which none of them needs, and was refused ({count} times so \
                     far): this is a bug or an attack, please report it; --sandbox=off lets it pass"
                );
            }
        }
    }

    /// This moment.
    pub fn report(&self) -> status::Sandbox {
        let state = self.state();
        status::Sandbox {
            on: state.on,
            capabilities: held().names(),
            no_new_privs: state.no_new_privs,
            control_filter: state.control_filter,
            worker_filter: state.worker_filter,
            troubles: state.troubles.clone(),
            refused: seccomp::refusals()
                .map(|(number, count)| (calls::name(number), count.into()))
                .collect(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each note is written in one step, so that a panic elsewhere leaves none half written.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// Keeps only these capabilities.
    fn limit(&mut self, kept: Capabilities) {
        match capabilities::keep_only(kept) {
            Ok(left) => debug!("sandbox: capabilities left: {left}"),
            Err(error) => self.trouble(format!("capabilities: {error}")),
        }
    }

    /// Something is not to be had.
    fn trouble(&mut self, what: String) {
        if !self.troubles.contains(&what) {
            warn!("sandbox: this system refuses {what}; the daemon goes on without");
            self.troubles.push(what);
        }
    }
}

const UNKNOWN_PROCESSOR: &str = "the system calls of this processor are not known here";

/// The workers' filter, under which they can work here.
fn try_out(io_uring: bool) -> Result<Filter, String> {
    seccomp::watch_refusals().map_err(|error| error.to_string())?;
    let filter = Filter::allowing(&calls::of_workers(io_uring), &calls::quiet()).ok_or(UNKNOWN_PROCESSOR)?;
    trial::run(&filter)?;
    Ok(filter)
}

fn refuse(calls: &[libc::c_long]) -> Result<(), String> {
    let filter = Filter::refusing(calls).ok_or(UNKNOWN_PROCESSOR)?;
    filter.install().map_err(|error| error.to_string())
}

/// What the calling thread may use; the whole daemon's, if it is not a worker.
fn held() -> Capabilities {
    // It fails for no thread that asks about itself.
    Held::now().map_or(Capabilities::NONE, |held| held.permitted)
}

fn first_free_port() -> u16 {
    let text = fs::read_to_string(FIRST_FREE_PORT).unwrap_or_default();
    text.trim().parse().unwrap_or(DEFAULT_FIRST_FREE_PORT)
}

/// What the workers of one engine are confined by. The default confines nothing.
#[derive(Debug, Clone, Default)]
pub struct Workers(Option<Arc<Confinement>>);

#[derive(Debug)]
struct Confinement {
    filter: Option<Filter>,
    sandbox: Sandbox,
}

impl Workers {
    /// Confines the calling thread, which has all that it needs.
    pub fn confine(&self) {
        let Some(confinement) = &self.0 else { return };
        let refused = |what: &str, error: std::io::Error| {
            confinement
                .sandbox
                .state()
                .trouble(format!("a worker's {what}: {error}"));
        };
        if let Err(error) = capabilities::keep_only(Capabilities::NONE) {
            refused("capabilities", error);
        }
        if let Err(error) = capabilities::gain_no_more() {
            refused("no_new_privs", error);
        }
        if let Some(filter) = &confinement.filter
            && let Err(error) = filter.install()
        {
            refused("filter of system calls", error);
            confinement.sandbox.state().worker_filter = Some(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        backtrace::Backtrace, env, fs::File, net::UdpSocket, os::unix::process::ExitStatusExt, process::Command,
        sync::mpsc, thread,
    };

    use nix::sys::signal::{Signal, raise};

    use super::*;

    /// A sandbox that was entered by a thread that is gone: this one stays as it is.
    fn entered() -> Sandbox {
        thread::spawn(|| Sandbox::enter(&Places::default())).join().unwrap()
    }

    /// What a confined worker makes of `work`.
    fn as_worker<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> thread::Result<T> {
        let sandbox = entered();
        let workers = sandbox.workers(false);
        assert_eq!(sandbox.report().troubles, [""; 0]);
        thread::spawn(move || {
            workers.confine();
            work()
        })
        .join()
    }

    fn refused(name: &str) -> u64 {
        Sandbox::default()
            .report()
            .refused
            .get(name)
            .copied()
            .unwrap_or_default()
    }

    #[test]
    fn a_worker_opens_nothing_and_starts_nothing_and_each_attempt_is_named() {
        let names = ["openat", "socket"];
        let before = names.map(refused);
        let outcomes = as_worker(|| {
            let file = File::open("/etc/hostname").unwrap_err();
            let socket = UdpSocket::bind("127.0.0.1:0").unwrap_err();
            let program = Command::new("/bin/true").status().unwrap_err();
            [file, socket, program].map(|error| error.raw_os_error())
        });
        assert_eq!(outcomes.unwrap(), [Some(libc::EPERM); 3]);
        for (name, before) in names.into_iter().zip(before) {
            assert!(refused(name) > before, "{name}");
        }
    }

    #[test]
    fn a_worker_has_no_capabilities_and_gains_none() {
        // It may not open the file itself.
        let (sender, receiver) = mpsc::channel();
        let watcher = thread::spawn(move || {
            let thread: libc::pid_t = receiver.recv().unwrap();
            fs::read_to_string(format!("/proc/self/task/{thread}/status")).unwrap()
        });
        let status = as_worker(move || {
            sender.send(nix::unistd::gettid().as_raw()).unwrap();
            watcher.join().unwrap()
        })
        .unwrap();
        for line in [
            "CapEff:\t0000000000000000",
            "CapPrm:\t0000000000000000",
            "NoNewPrivs:\t1",
            "Seccomp:\t2",
        ] {
            assert!(status.contains(line), "{line} is not in {status}");
        }
    }

    #[test]
    fn a_filter_under_which_no_worker_could_work_is_not_used() {
        seccomp::watch_refusals().unwrap();
        let calls = calls::of_workers(false);
        let without: Vec<_> = calls
            .into_iter()
            .filter(|call| call.number != libc::SYS_sendmmsg)
            .collect();
        let filter = Filter::allowing(&without, &calls::quiet()).unwrap();
        let reason = trial::run(&filter).unwrap_err();
        assert!(reason.contains("(sendmmsg)"), "{reason}");
    }

    #[test]
    fn a_worker_that_panics_is_known_to_have() {
        let panicked = as_worker(|| {
            // Names are in files, which it may not open: a trace has none, and does no harm.
            assert!(!Backtrace::force_capture().to_string().is_empty());
            panic!("a bug")
        })
        .unwrap_err();
        assert_eq!(panicked.downcast_ref::<&str>(), Some(&"a bug"));
    }

    #[test]
    fn a_worker_that_meets_a_memory_fault_ends_the_process() {
        const IN_CHILD: &str = "FLANNEL_TEST_MEMORY_FAULT";
        if env::var_os(IN_CHILD).is_some() {
            // Upon the first the standard library puts the system's own handler back, and lets the fault be met again.
            let raised = as_worker(|| [(); 2].map(|()| raise(Signal::SIGSEGV)));
            assert_eq!(raised.unwrap(), [Ok(()); 2]);
            return;
        }
        let test = "sandbox::tests::a_worker_that_meets_a_memory_fault_ends_the_process";
        let mut child = Command::new(env::current_exe().unwrap());
        child.args(["--exact", test]).env(IN_CHILD, "yes");
        let output = child.output().unwrap();
        assert_eq!(output.status.signal(), Some(libc::SIGSEGV), "{output:?}");
    }

    #[test]
    fn what_confines_nothing_refuses_nothing() {
        let workers = Sandbox::default().workers(false);
        workers.confine();
        File::open("/etc/hostname").unwrap();
        let report = Sandbox::default().report();
        assert!(!report.on && report.worker_filter.is_none());
        Sandbox::default().settle(Needs::default());
    }

    #[test]
    fn settling_keeps_what_is_needed_and_no_more() {
        let before = held();
        for (needs, more) in [
            (Needs::default(), Capabilities::NONE),
            (
                Needs {
                    raw_sockets: true,
                    ..Needs::default()
                },
                Capabilities::NET_RAW,
            ),
            (
                Needs {
                    port: Some(500),
                    ..Needs::default()
                },
                // In some containers anyone may bind any port.
                if first_free_port() > 500 {
                    Capabilities::NET_BIND_SERVICE
                } else {
                    Capabilities::NONE
                },
            ),
            (
                Needs {
                    port: Some(8_285),
                    ..Needs::default()
                },
                Capabilities::NONE,
            ),
        ] {
            let settled = thread::spawn(move || {
                let sandbox = Sandbox::enter(&Places::default());
                sandbox.settle(needs);
                (held(), sandbox.report())
            });
            let (held, report) = settled.join().unwrap();
            assert_eq!(held, before & (Capabilities::NET_ADMIN | more), "{needs:?}");
            assert!(report.on && report.no_new_privs && report.control_filter, "{report:?}");
            assert_eq!(report.troubles, [""; 0]);
        }
        assert_eq!(super::held(), before);
    }

    #[test]
    fn a_settled_daemon_still_starts_programs_which_may_do_no_more() {
        let run = |script: &str| Command::new("/bin/sh").args(["-c", script]).output().unwrap();
        // It asks for no namespace, which takes no right.
        const NEVER_MADE: &str = "unshare true";
        assert!(run(NEVER_MADE).status.success());
        let done = thread::spawn(move || {
            let sandbox = Sandbox::enter(&Places::default());
            sandbox.settle(Needs::default());
            (
                run("grep -E '^(CapEff|NoNewPrivs|Seccomp):' /proc/self/status"),
                run(NEVER_MADE),
            )
        });
        let (status, refused) = done.join().unwrap();
        let status = String::from_utf8(status.stdout).unwrap();
        assert!(
            status.contains("NoNewPrivs:\t1") && status.contains("Seccomp:\t2"),
            "{status}"
        );
        let kept = held() & Capabilities::NET_ADMIN;
        let kept = if kept == Capabilities::NONE { 0 } else { 1 << 12 };
        assert!(status.contains(&format!("CapEff:\t{kept:016x}")), "{status}");
        assert!(!refused.status.success());
        let refused = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(refused.contains("Operation not permitted"), "{refused}");
    }
}
