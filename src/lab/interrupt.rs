//! Ctrl-C and its like, as a flag that every wait of a lab's owner looks at.

use nix::sys::signal::Signal;
use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicI32, Ordering},
    },
    thread,
};
use tokio::{
    runtime, select,
    signal::unix::{SignalKind, signal},
};

/// Remembers the first signal that asked this process to end, in place of ending it: the lab must be removed first.
/// The default one never sees any.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    /// The signal's number; 0: none yet.
    seen: Arc<AtomicI32>,
}

impl Interrupt {
    /// From now on SIGINT, SIGTERM and SIGHUP (the terminal is closed) only raise the flag.
    ///
    /// # Errors
    /// When the handlers, or the thread that waits for them, cannot be set up.
    pub fn install() -> io::Result<Interrupt> {
        let seen = Arc::new(AtomicI32::new(0));
        let runtime = runtime::Builder::new_current_thread().enable_all().build()?;
        let (mut int, mut term, mut hup) = {
            let _inside = runtime.enter();
            (
                signal(SignalKind::interrupt())?,
                signal(SignalKind::terminate())?,
                signal(SignalKind::hangup())?,
            )
        };
        let flag = Arc::clone(&seen);
        thread::Builder::new().name("signals".to_owned()).spawn(move || {
            runtime.block_on(async {
                loop {
                    let signal = select! {
                        _ = int.recv() => Signal::SIGINT,
                        _ = term.recv() => Signal::SIGTERM,
                        _ = hup.recv() => Signal::SIGHUP,
                    };
                    // The first one says how the process ends; a second Ctrl-C must not stop the clearing up.
                    let _ = flag.compare_exchange(0, signal as i32, Ordering::Relaxed, Ordering::Relaxed);
                }
            });
        })?;
        Ok(Interrupt { seen })
    }

    /// The signal that has come, if one has.
    pub fn signal(&self) -> Option<Signal> {
        Signal::try_from(self.seen.load(Ordering::Relaxed)).ok()
    }
}
