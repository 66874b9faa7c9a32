//! The running daemon's side.

use std::{future::pending, io, os::fd::OwnedFd, sync::Arc, time::Duration};

use nix::unistd::geteuid;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tracing::{info, warn};

use super::{
    PATIENCE,
    wire::{Connection, Hello, Kind, MAJOR, Offer, ToHeir, ToRunning},
};
use crate::observe::{
    board::Board,
    socket::{Listener, OpenError},
    status::Counts,
};

/// How long the workers stand still for the new daemon's: half of what a device's queue of 1,000 packets holds at 1,000 a second.
const STANDSTILL: Duration = Duration::from_millis(500);

/// Listens until it is dropped.
#[derive(Debug)]
pub struct Server {
    /// The socket, which goes with the server.
    pub listener: Listener,
    events: mpsc::Receiver<Event>,
    task: JoinHandle<()>,
}

/// What the daemon has to do for a new one.
#[derive(Debug)]
pub enum Event {
    /// Offer what it has, or say why it does not.
    Asked(oneshot::Sender<Result<Offering, String>>),
    /// Stop: the new daemon is prepared.
    Prepared(Heir),
}

/// What is offered.
#[derive(Debug)]
pub struct Offering {
    /// What there is; without names of descriptors.
    pub offer: Offer,
    /// The descriptors, each with what it is.
    pub descriptors: Vec<(Kind, OwnedFd)>,
}

/// A new daemon that is prepared.
#[derive(Debug)]
pub struct Heir {
    connection: Connection,
    /// Its process, if this one can see that.
    pub process: Option<u32>,
    /// There is one heir at a time.
    _only: OwnedSemaphorePermit,
}

impl Server {
    /// Listens on behalf of a daemon that writes on `board` whether it is ready.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn open(listener: Listener, board: Board) -> Result<Self, OpenError> {
        let connections = listener.accept_connections()?;
        let (tell, events) = mpsc::channel(1);
        let task = tokio::spawn(async move {
            let only = Arc::new(Semaphore::new(1));
            let mut conversations = JoinSet::new();
            loop {
                match connections.accept().await {
                    Ok((stream, _)) => {
                        let (tell, board, only) = (tell.clone(), board.clone(), Arc::clone(&only));
                        conversations.spawn(async move {
                            if let Err(error) = converse(Connection::new(stream), &tell, &board, only).await {
                                warn!("the handover to another flanneld has come to nothing: {error}; going on");
                            }
                        });
                    }
                    // Out of descriptors, say: not worth a daemon's life.
                    Err(_) => sleep(Duration::from_millis(100)).await,
                }
                while conversations.try_join_next().is_some() {}
            }
        });
        Ok(Self { listener, events, task })
    }

    /// What there is to do next.
    pub async fn next(&mut self) -> Event {
        match self.events.recv().await {
            Some(event) => event,
            // The task is gone with the runtime.
            None => pending().await,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Until the new daemon is prepared, or has given up.
async fn converse(
    mut connection: Connection,
    tell: &mpsc::Sender<Event>,
    board: &Board,
    only: Arc<Semaphore>,
) -> io::Result<()> {
    let user = connection.user()?;
    // The socket is for its owner only; its rights may have been changed by hand.
    if user != 0 && user != geteuid().as_raw() {
        return Err(io::Error::other(format!(
            "user {user} has asked for it, and only root may"
        )));
    }
    let asked = timeout(PATIENCE, connection.recv::<ToRunning>()).await??;
    let Some(ToRunning::Hello(hello)) = asked else {
        // One that only looks whether somebody listens.
        return Ok(());
    };
    let process = connection.process();
    match offering(&hello, tell, board, &only).await {
        Err(reason) => {
            warn!("refusing to hand over to flanneld {}: {reason}", hello.version);
            connection.send(&ToHeir::Refused { reason }, &[]).await
        }
        Ok((Offering { mut offer, descriptors }, only)) => {
            info!(
                "flanneld {} (process {}) prepares to take over",
                hello.version,
                process.map_or("unknown".to_owned(), |process| process.to_string())
            );
            let (kinds, descriptors): (Vec<Kind>, Vec<OwnedFd>) = descriptors.into_iter().unzip();
            offer.descriptors = kinds.into_iter().map(|kind| kind.name().to_owned()).collect();
            connection.send(&ToHeir::Hello(Box::new(offer)), &descriptors).await?;
            drop(descriptors);
            match connection.recv().await? {
                Some(ToRunning::Prepared) => {
                    let heir = Heir {
                        connection,
                        process,
                        _only: only,
                    };
                    // The daemon ends if nobody listens.
                    drop(tell.send(Event::Prepared(heir)).await);
                    Ok(())
                }
                Some(_) => Err(io::ErrorKind::InvalidData.into()),
                None => Err(io::Error::other("it has given up before it was prepared")),
            }
        }
    }
}

/// What the daemon offers, or why it does not.
async fn offering(
    hello: &Hello,
    tell: &mpsc::Sender<Event>,
    board: &Board,
    only: &Arc<Semaphore>,
) -> Result<(Offering, OwnedSemaphorePermit), String> {
    if hello.major != MAJOR {
        return Err(format!(
            "it speaks version {} of the handover, and flanneld {} version {MAJOR}: stop this one and start the other",
            hello.major,
            env!("CARGO_PKG_VERSION")
        ));
    }
    if let (false, waiting_for) = board.readiness() {
        let what = waiting_for.unwrap_or_else(|| "its start".to_owned());
        return Err(format!("the running flanneld is not ready, it waits for {what}"));
    }
    let only = Arc::clone(only).try_acquire_owned();
    let only = only.map_err(|_| "another flanneld is just taking over".to_owned())?;
    let ending = || "the running flanneld is just ending".to_owned();
    let (reply, answer) = oneshot::channel();
    tell.send(Event::Asked(reply)).await.map_err(|_| ending())?;
    Ok((answer.await.map_err(|_| ending())??, only))
}

impl Heir {
    /// Lets the new daemon carry packets, now that this one does not; whether it does.
    ///
    /// # Errors
    /// Why it does not, for people: this daemon has to go on then, and to [say so](Self::take_back).
    pub async fn install(&mut self, counts: Counts) -> Result<(), String> {
        let installed = async {
            self.connection.send(&ToHeir::Stopped(Box::new(counts)), &[]).await?;
            self.connection.recv().await
        };
        let installed = timeout(STANDSTILL, installed).await;
        match installed {
            // One that has ended since has not taken over.
            Ok(Ok(Some(ToRunning::Running))) if self.connection.is_open() => Ok(()),
            Ok(Ok(Some(ToRunning::Running))) => {
                Err("the new flanneld has ended as soon as it carried packets".to_owned())
            }
            Ok(Ok(Some(_))) => Err("the new flanneld does not keep to the handover's order".to_owned()),
            Ok(Ok(None)) => Err("the new flanneld has ended".to_owned()),
            Ok(Err(error)) => Err(format!("the new flanneld cannot be talked to: {error}")),
            Err(_) => Err(format!(
                "the new flanneld did not start within {} ms",
                STANDSTILL.as_millis()
            )),
        }
    }

    /// The new daemon is the only one from now on, unless it is gone.
    ///
    /// # Errors
    /// That it is, for people: as with [`install`](Self::install).
    pub async fn release(&mut self) -> Result<(), String> {
        let ended = |error| format!("the new flanneld has ended as soon as it carried packets: {error}");
        match timeout(PATIENCE, self.connection.send(&ToHeir::Released, &[])).await {
            Ok(sent) => sent.map_err(ended),
            Err(_) => Err("the new flanneld does not read what it is told".to_owned()),
        }
    }

    /// Tells the new daemon that this one goes on.
    pub async fn take_back(mut self, reason: String) {
        // Most often it is gone.
        let _ = timeout(PATIENCE, self.connection.send(&ToHeir::TakenBack { reason }, &[])).await;
    }
}
