//! A supervisor as systemd is one: it runs a daemon, listens to what that tells it (`NOTIFY_SOCKET`) and to nobody else
//! (`NotifyAccess=main`), keeps descriptors for it in a store, and hands them to the next process (`LISTEN_FDS`).

use super::{Daemon, PATIENCE};
use flannel::{lab::wait_until, sys::rights};
use nix::{
    cmsg_space,
    sys::socket::{ControlMessageOwned, MsgFlags, UnixCredentials, recvmsg, setsockopt, sockopt::PassCred},
};
use std::{
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
        unix::{net::UnixDatagram, process::CommandExt},
    },
    process::{self, Command},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

/// Where the descriptors begin that a process is started with (sd_listen_fds(3)).
const FIRST: RawFd = 3;

/// Beyond all descriptors that a test program has.
const OUT_OF_THE_WAY: RawFd = 600;

/// A supervisor with a store. It listens until it is dropped.
#[derive(Debug)]
pub(crate) struct Supervisor {
    heard: Arc<Mutex<Heard>>,
    most: usize,
    ending: Arc<AtomicBool>,
    listener: Option<JoinHandle<()>>,
}

/// What it was told, and given.
#[derive(Debug, Default)]
pub(crate) struct Heard {
    /// Each assignment of each message, in order.
    pub(crate) told: Vec<String>,
    /// What others than the main process have said, which is not listened to.
    refused: Vec<String>,
    /// The main process; `None` while it is being started.
    main: Option<u32>,
    store: Vec<Kept>,
}

#[derive(Debug)]
struct Kept {
    name: String,
    descriptor: OwnedFd,
    /// Whether it stays when it reports an error or its end.
    polled: bool,
}

impl Supervisor {
    /// Listens on `socket`, with a store that takes `most` descriptors.
    pub(crate) fn listen(socket: UnixDatagram, most: usize) -> Supervisor {
        // Short, since between two messages the store is looked at, as systemd does all the time.
        socket.set_read_timeout(Some(Duration::from_millis(20))).unwrap();
        setsockopt(&socket, PassCred, &true).unwrap();
        let heard = Arc::new(Mutex::new(Heard::default()));
        let ending = Arc::new(AtomicBool::new(false));
        let (shared, end) = (Arc::clone(&heard), Arc::clone(&ending));
        let listener = thread::spawn(move || {
            let mut buffer = [0; 4_096];
            while !end.load(Ordering::Relaxed) {
                match recv(&socket, &mut buffer) {
                    Ok((length, descriptors, sender)) => {
                        let message = String::from_utf8_lossy(&buffer[..length]).into_owned();
                        shared.lock().unwrap().hear(&message, descriptors, sender, most);
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => panic!("the supervisor cannot listen: {error}"),
                }
                shared.lock().unwrap().let_go_of_the_dead();
            }
        });
        Supervisor {
            heard,
            most,
            ending,
            listener: Some(listener),
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap()
    }

    /// Waits until it was told this since the last time it [forgot](Self::forget_told).
    pub(crate) fn wait_told(&self, daemon: &mut Daemon, assignment: &str) {
        let what = format!("the supervisor to be told {assignment}");
        wait_until(PATIENCE, &what, || {
            daemon.assert_running();
            self.was_told(assignment)
        })
        .unwrap();
    }

    /// Whether it was told this.
    pub(crate) fn was_told(&self, assignment: &str) -> bool {
        self.heard().told.iter().any(|told| told == assignment)
    }

    /// What others than the main process have told it.
    pub(crate) fn refused(&self) -> Vec<String> {
        self.heard().refused.clone()
    }

    /// The process that it has just started is the main one.
    pub(crate) fn has_started(&self, pid: u32) {
        self.heard().main = Some(pid);
    }

    /// Puts a descriptor into the store, as if the daemon had.
    pub(crate) fn keep(&self, name: &str, descriptor: OwnedFd) {
        self.heard().store.insert(
            0,
            Kept {
                name: name.to_owned(),
                descriptor,
                polled: false,
            },
        );
    }

    /// Before another process is started.
    pub(crate) fn forget_told(&self) {
        self.heard().told.clear();
    }

    /// The names of all that is in the store.
    pub(crate) fn stored(&self) -> Vec<String> {
        self.heard().store.iter().map(|kept| kept.name.clone()).collect()
    }

    /// Empties the store, as when a service is stopped for good.
    pub(crate) fn empty(&self) {
        self.heard().store.clear();
    }

    /// Lets `command`, whose program has to be a shell's argument, begin with all that is in the store.
    pub(crate) fn hand_to(&self, command: &mut Command) {
        command.env("FDSTORE", self.most.to_string());
        let mut heard = self.heard();
        heard.main = None;
        if heard.store.is_empty() {
            return;
        }
        let names: Vec<&str> = heard.store.iter().map(|kept| kept.name.as_str()).collect();
        command
            .env("LISTEN_FDS", names.len().to_string())
            .env("LISTEN_FDNAMES", names.join(":"));
        // Copies, since the store may change before the process begins.
        let copies: Vec<OwnedFd> = heard
            .store
            .iter()
            .map(|kept| kept.descriptor.try_clone().unwrap())
            .collect();
        // SAFETY: between fork and exec the closure only makes system calls with numbers. What it puts in the place of other
        // descriptors is in this process alone, which only goes on to its program.
        unsafe {
            command.pre_exec(move || {
                // First all out of the way, so that none is put on another's place.
                for (at, descriptor) in (OUT_OF_THE_WAY..).zip(&copies) {
                    if libc::dup2(descriptor.as_raw_fd(), at) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                }
                for (number, _) in (0..).zip(&copies) {
                    // The copy is open in the program, since dup2 does not copy the flag that closes it.
                    if libc::dup2(OUT_OF_THE_WAY + number, FIRST + number) < 0 {
                        return Err(io::Error::last_os_error());
                    }
                    libc::close(OUT_OF_THE_WAY + number);
                }
                Ok(())
            });
        }
    }
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.ending.store(true, Ordering::Relaxed);
        if let Some(listener) = self.listener.take() {
            // Its panic has been shown.
            let _ = listener.join();
        }
    }
}

impl Heard {
    fn hear(&mut self, message: &str, descriptors: Vec<OwnedFd>, sender: Option<u32>, most: usize) {
        if self.main.is_some() && sender != self.main {
            self.refused.extend(message.lines().map(str::to_owned));
            return;
        }
        let value = |name: &str| {
            let mut lines = message.lines();
            lines
                .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
                .map(str::to_owned)
        };
        self.told.extend(message.lines().map(str::to_owned));
        if let Some(main) = value("MAINPID") {
            self.main = Some(main.parse().unwrap());
        }
        let name = value("FDNAME").unwrap_or_else(|| "stored".to_owned());
        if value("FDSTOREREMOVE").as_deref() == Some("1") {
            self.store.retain(|kept| kept.name != name);
        } else if value("FDSTORE").as_deref() == Some("1") {
            let polled = value("FDPOLL").as_deref() != Some("0");
            for descriptor in descriptors {
                let known = self.store.iter().any(|kept| is_same(&kept.descriptor, &descriptor));
                if !known && self.store.len() < most {
                    // As systemd has them: the last one first.
                    let name = name.clone();
                    self.store.insert(
                        0,
                        Kept {
                            name,
                            descriptor,
                            polled,
                        },
                    );
                }
            }
        }
    }

    /// systemd lets go of descriptors that report an error or their end, unless it was told not to look.
    fn let_go_of_the_dead(&mut self) {
        self.store.retain(|kept| {
            let mut poll = libc::pollfd {
                fd: kept.descriptor.as_raw_fd(),
                events: 0,
                revents: 0,
            };
            // SAFETY: one valid pollfd, and its count is 1.
            let polled = unsafe { libc::poll(&mut poll, 1, 0) };
            !(kept.polled && polled > 0 && poll.revents & (libc::POLLHUP | libc::POLLERR) != 0)
        });
    }
}

/// The next message: its length, its descriptors, and the process that has sent it.
fn recv(socket: &UnixDatagram, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>, Option<u32>)> {
    let mut control = cmsg_space!([RawFd; rights::MOST], UnixCredentials);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let (mut descriptors, mut sender) = (Vec::new(), None);
    for part in message.cmsgs()? {
        match part {
            ControlMessageOwned::ScmRights(raw) => {
                // SAFETY: the kernel has just made these for this process, and nobody else knows of them.
                descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
            }
            ControlMessageOwned::ScmCredentials(credentials) => sender = u32::try_from(credentials.pid()).ok(),
            _ => {}
        }
    }
    Ok((message.bytes, descriptors, sender))
}

/// Whether both are one open file (kcmp(2)).
fn is_same(one: &OwnedFd, other: &OwnedFd) -> bool {
    const KCMP_FILE: libc::c_int = 0;
    let pid = process::id();
    // SAFETY: kcmp only compares numbers and touches no memory of this process.
    let order = unsafe { libc::syscall(libc::SYS_kcmp, pid, pid, KCMP_FILE, one.as_raw_fd(), other.as_raw_fd()) };
    order == 0
}
