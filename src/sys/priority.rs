//! Which threads go first when processors are scarce: nice values, setpriority(2). Linux has one for each thread, which begins with
//! that of the thread that starts it and, without `SYS_NICE`, never goes back. So whoever steps back leaves somebody behind who
//! starts threads for him.

use std::{
    io,
    sync::OnceLock,
    thread::{Builder, JoinHandle},
};

use crossbeam_channel::Sender;

/// How far the control plane steps back: where it and a worker both want a whole processor, it gets a quarter of that, and a
/// worker with a packet need not wait until the control plane's turn is over.
const STEP: libc::c_int = 5;

/// A thread's name and what it does, and where the thread itself is waited for.
type Order = (String, Box<dyn FnOnce() + Send>, Sender<io::Result<JoinHandle<()>>>);

/// To the thread that starts others.
static STARTER: OnceLock<Sender<Order>> = OnceLock::new();

/// From now on the calling thread lets others go first, and so does what it starts, programs too, unless by [`start`]. Once in a
/// process.
///
/// # Errors
/// When the system gives no thread or does not know the call; then all is as it was.
pub fn step_back() -> io::Result<()> {
    let (sender, orders) = crossbeam_channel::unbounded::<Order>();
    Builder::new().name("starter".to_owned()).spawn(move || {
        for (name, work, started) in orders {
            // Who has ordered it is waiting.
            let _ = started.send(Builder::new().name(name).spawn(work));
        }
    })?;
    // SAFETY: the call touches no memory; values above 19 are 19.
    if unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, own() + STEP) } < 0 {
        return Err(io::Error::last_os_error());
    }
    STARTER.get_or_init(|| sender);
    Ok(())
}

fn own() -> libc::c_int {
    // SAFETY: the call touches no memory. It fails for no thread that asks about itself (0).
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

/// Starts a thread of that name, which goes as far ahead of others as the process did when it began.
///
/// # Errors
/// When the system gives no thread.
pub fn start(name: String, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let Some(starter) = STARTER.get() else {
        return Builder::new().name(name).spawn(work);
    };
    let (started, thread) = crossbeam_channel::bounded(1);
    // The starter never ends.
    let gone = || io::Error::other("the thread that starts others is gone");
    starter.send((name, Box::new(work), started)).map_err(|_| gone())?;
    thread.recv().map_err(|_| gone())?
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn whoever_steps_back_starts_threads_that_go_first() {
        let first = own();
        let stepped_back = thread::spawn(move || {
            step_back().unwrap();
            let (sender, started) = crossbeam_channel::bounded(1);
            let work = move || {
                sender
                    .send((thread::current().name().map(str::to_owned), own()))
                    .unwrap()
            };
            start("first".to_owned(), work).unwrap().join().unwrap();
            (own(), started.recv().unwrap())
        });
        let started = (Some("first".to_owned()), first);
        assert_eq!(stepped_back.join().unwrap(), ((first + STEP).min(19), started));
        assert_eq!(own(), first, "other threads stay as they are");
    }
}
