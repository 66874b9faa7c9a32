//! The new daemon's side.

use std::{io, os::fd::OwnedFd, path::Path};

use nix::unistd::geteuid;
use tokio::{net::UnixStream, time::timeout};
use tracing::{info, warn};

use super::{
    PATIENCE, network_namespace,
    wire::{Connection, Hello, Kind, MAJOR, Offer, ToHeir, ToRunning},
};
use crate::{
    backend::Descriptors,
    kernel::external::External,
    lease::{presence::Handed, record::Subnets, remembered::Remembered},
    network::Network,
    observe::status::Counts,
    supervisor::Supervisor,
};

/// The running daemon, which has offered everything and carries packets still.
#[derive(Debug)]
pub struct Predecessor {
    connection: Connection,
    offer: Offer,
    subnets: Subnets,
    descriptors: Descriptors,
    claim: Option<OwnedFd>,
    /// Its status socket.
    pub status: Option<OwnedFd>,
    /// Its socket for the next handover.
    pub handover: Option<OwnedFd>,
    /// Its health port.
    pub health: Option<OwnedFd>,
}

/// The running daemon, which carries packets no more.
#[derive(Debug)]
pub struct Stopped {
    /// `None`: it has ended.
    connection: Option<Connection>,
    /// What it has counted.
    pub counts: Counts,
}

/// Why nothing is taken over. The running daemon goes on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be talked to.
    #[error("cannot talk to the running flanneld, which goes on: {what}")]
    Connection {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// It says no.
    #[error("the running flanneld does not hand over and goes on: {0}")]
    Refused(String),
    /// It speaks another version.
    #[error(
        "the running flanneld {version} speaks version {major} of the handover, and this one version {MAJOR}: the running one goes \
         on; stop it and start this one without --handover"
    )]
    Version {
        /// The program's version.
        version: String,
        /// The protocol's.
        major: u32,
    },
    /// It does something else than this one would.
    #[error("the running flanneld (process {pid}) {what}: it goes on; stop it and start this one without --handover")]
    Other {
        /// The running one.
        pid: u32,
        /// What is different.
        what: String,
    },
    /// It went on after all.
    #[error("the running flanneld has taken everything back and goes on: {0}")]
    TakenBack(String),
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Connection { what, source }
}

/// An answer that is due at once.
async fn answer(connection: &mut Connection, what: &'static str) -> Result<Option<ToHeir>, Error> {
    let answer = timeout(PATIENCE, connection.recv()).await;
    let answer = answer.map_err(|_| failed(what)(io::ErrorKind::TimedOut.into()))?;
    answer.map_err(failed(what))
}

impl Predecessor {
    /// Asks the daemon that listens at `path` for everything; `None` when there is none.
    ///
    /// # Errors
    /// When it does not give it, or this process is not where that one is.
    pub async fn find(path: &Path) -> Result<Option<Self>, Error> {
        let what = "cannot connect to its socket";
        let stream = match UnixStream::connect(path).await {
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            stream => stream.map_err(failed(what))?,
        };
        let mut connection = Connection::new(stream);
        let user = connection.user().map_err(failed(what))?;
        if user != 0 && user != geteuid().as_raw() {
            return Err(Error::Refused(format!(
                "{} is user {user}'s, and not root's",
                path.display()
            )));
        }
        let hello = ToRunning::Hello(Hello::own());
        connection.send(&hello, &[]).await.map_err(failed(what))?;
        let what = "it does not say what it has";
        let offer = match answer(&mut connection, what).await? {
            Some(ToHeir::Hello(offer)) => *offer,
            Some(ToHeir::Refused { reason }) => return Err(Error::Refused(reason)),
            Some(_) => return Err(failed(what)(io::ErrorKind::InvalidData.into())),
            None => return Err(failed(what)(io::ErrorKind::UnexpectedEof.into())),
        };
        if offer.hello.major != MAJOR {
            return Err(Error::Version {
                version: offer.hello.version,
                major: offer.hello.major,
            });
        }
        let own = network_namespace().map_err(failed("cannot read /proc/self/ns/net"))?;
        if offer.network_namespace != own {
            return Err(Error::Other {
                pid: offer.pid,
                what: "runs in another network namespace".to_owned(),
            });
        }
        let subnets = offer
            .subnets
            .parse()
            .map_err(|_| failed(what)(io::ErrorKind::InvalidData.into()))?;
        let mut found = Self {
            connection,
            subnets,
            descriptors: Descriptors {
                shared: true,
                ..Descriptors::default()
            },
            claim: None,
            status: None,
            handover: None,
            health: None,
            offer,
        };
        found.sort().map_err(failed(what))?;
        info!(
            "taking over from flanneld {} (process {}), subnet {}",
            found.offer.hello.version,
            found.offer.pid,
            found.subnets.to_cidrs()
        );
        Ok(Some(found))
    }

    /// Puts each descriptor in its place; those that are not known are closed.
    fn sort(&mut self) -> io::Result<()> {
        for name in &self.offer.descriptors {
            let descriptor = self.connection.take().ok_or(io::ErrorKind::UnexpectedEof)?;
            match Kind::named(name) {
                Some(Kind::Queue) => self.descriptors.queues.push(descriptor),
                Some(Kind::Socket) => self.descriptors.sockets.push(descriptor),
                Some(Kind::Claim) => self.claim = Some(descriptor),
                Some(Kind::Status) => self.status = Some(descriptor),
                Some(Kind::Handover) => self.handover = Some(descriptor),
                Some(Kind::Health) => self.health = Some(descriptor),
                None => {}
            }
        }
        Ok(())
    }

    /// Its lease.
    pub fn subnets(&self) -> Subnets {
        self.subnets
    }

    /// Who runs it.
    pub fn supervisor(&self) -> Supervisor {
        self.offer.supervisor.clone()
    }

    /// What it carries packets through.
    pub fn descriptors(&mut self) -> Descriptors {
        std::mem::take(&mut self.descriptors)
    }

    /// Its claim to the PublicIP, if it has one.
    pub fn claim(&mut self) -> Option<Handed> {
        Some(Handed {
            alive: self.claim.take()?,
            instance: self.offer.claim.take()?,
        })
    }

    /// That it no longer has its lease.
    pub fn lost_its_lease(&self) -> Error {
        self.other(format!("no longer has the lease {}", self.subnets.to_cidrs()))
    }

    fn other(&self, what: String) -> Error {
        Error::Other {
            pid: self.offer.pid,
            what,
        }
    }

    /// Looks whether one can go on where the other ends. `remembered`: what this one begins with if the registry does not answer.
    ///
    /// # Errors
    /// [`Error::Other`] when this one would have another address, subnet or backend.
    pub fn fits(&self, network: &Network, external: &External, remembered: Option<&Remembered>) -> Result<(), Error> {
        if remembered.is_some_and(|remembered| remembered.own.lease.subnets != self.subnets) {
            return Err(self.other(format!(
                "has the subnet {}, which is not the one that is remembered, and the registry does not answer",
                self.subnets.to_cidrs()
            )));
        }
        let backend = network.backend().kind().name();
        if self.offer.backend != backend {
            return Err(self.other(format!(
                "uses the backend {}, and the network is configured for {backend} now",
                self.offer.backend
            )));
        }
        if self.offer.public_ip != external.public_ip {
            return Err(self.other(format!(
                "has the PublicIP {}, and this one would have {}",
                self.offer.public_ip, external.public_ip
            )));
        }
        if !self.subnets.fit(network) {
            return Err(self.other(format!(
                "has the subnet {}, which does not fit the network's configuration any more",
                self.subnets.to_cidrs()
            )));
        }
        Ok(())
    }

    /// Lets it stop. Its workers stand still from then on, until this process's [run](Stopped::tell_running).
    ///
    /// # Errors
    /// When it does not stop.
    pub async fn stop(mut self) -> Result<Stopped, Error> {
        let what = "it does not stop";
        let sent = self.connection.send(&ToRunning::Prepared, &[]).await;
        let answer = match sent {
            Ok(()) => answer(&mut self.connection, what).await?,
            // It has ended, and may have said why.
            Err(_) => self.connection.recv().await.unwrap_or(None),
        };
        match answer {
            Some(ToHeir::Stopped(counts)) => Ok(Stopped {
                connection: Some(self.connection),
                counts: *counts,
            }),
            Some(ToHeir::TakenBack { reason } | ToHeir::Refused { reason }) => Err(Error::TakenBack(reason)),
            Some(_) => Err(failed(what)(io::ErrorKind::InvalidData.into())),
            None => {
                warn!("the running flanneld has ended before it has handed over: going on in its place");
                Ok(Stopped {
                    connection: None,
                    counts: Counts::default(),
                })
            }
        }
    }
}

impl Stopped {
    /// Says that this process carries packets.
    pub async fn tell_running(&mut self) {
        if let Some(connection) = &mut self.connection {
            // If it is gone, it may have said something before, which is heard later.
            let _ = connection.send(&ToRunning::Running, &[]).await;
        }
    }

    /// Returns when the other, which was [told](Self::tell_running), has ended or is about to.
    ///
    /// # Errors
    /// [`Error::TakenBack`] when the other goes on after all.
    pub async fn settle(self) -> Result<(), Error> {
        let Some(mut connection) = self.connection else {
            return Ok(());
        };
        match connection.recv().await {
            Ok(Some(ToHeir::TakenBack { reason })) => Err(Error::TakenBack(reason)),
            Ok(Some(ToHeir::Released)) => Ok(()),
            Ok(Some(_)) => Err(failed("it does not let go")(io::ErrorKind::InvalidData.into())),
            Ok(None) | Err(_) => {
                warn!("the flanneld before has ended in the midst of the handover: going on in its place");
                Ok(())
            }
        }
    }
}
