//! The running daemon's part in handing over to a new one.

use std::{os::fd::OwnedFd, process};

use tracing::{info, warn};

use super::{Claims, Error, Run, doors::Doors};
use crate::{
    backend::Descriptors,
    handover::{
        self,
        server::{Heir, Offering},
        wire::{Hello, Kind, Offer},
    },
    observe::status::Counts,
    supervisor::Supervisor,
};

/// How far this daemon has got in the place of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stage {
    /// The other still carries the packets.
    Preparing,
    /// This one does, and the other may yet go on.
    Carrying,
    /// There is no other.
    Alone,
}

impl Run<'_> {
    /// Whether this daemon could carry the packets in the place of the other.
    pub(super) fn is_prepared(&self) -> bool {
        self.stage == Stage::Preparing && self.ruled && self.picture.is_some()
    }

    /// Carries the packets, now that the other daemon does not, and goes on counting. Nobody does until this is done, so that all
    /// else is to come later: the peers are known to the backend already.
    pub(super) fn carry_on(&mut self, counts: &Counts) -> Result<(), Error> {
        self.backend.count_from(counts);
        self.board.count_from(counts);
        self.stage = Stage::Carrying;
        Ok(self.backend.resume()?)
    }

    /// The other daemon is gone, and who ran it runs this one, unless that has a supervisor of its own.
    pub(super) fn is_alone(&mut self, theirs: Option<&Supervisor>) {
        if let Some(theirs) = theirs
            && self.supervisor.borrow().is_none()
        {
            self.supervisor.replace(theirs.clone());
        }
        self.stage = Stage::Alone;
        self.park();
        self.become_ready();
    }

    /// Lets the supervisor keep what packets are carried through, if that is not what it keeps already.
    pub(super) fn park(&mut self) {
        let generation = self.backend.generation();
        if self.stage != Stage::Alone || Some(generation) == self.parked {
            return;
        }
        self.parked = Some(generation);
        match self.backend.descriptors() {
            Ok(descriptors) => self.supervisor.borrow().park(&descriptors),
            Err(error) => {
                warn!("cannot copy descriptors for the supervisor, so that a restart will lose packets: {error}")
            }
        }
    }

    /// What a new daemon would go on with, or why it cannot just now.
    pub(super) fn offer(&mut self, doors: &Doors, claims: &Claims) -> Result<Offering, String> {
        let public_ip = self.lease.value.public_ip;
        if self.external.public_ip != public_ip {
            return Err("this host's address is just changing: try again in a minute".to_owned());
        }
        let out_of_descriptors = |error| format!("the running flanneld cannot copy its descriptors: {error}");
        let Descriptors { queues, sockets, .. } = self.backend.descriptors().map_err(out_of_descriptors)?;
        let named = |kind: Kind| move |descriptor: OwnedFd| (kind, descriptor);
        let queues = queues.into_iter().map(named(Kind::Queue));
        let mut descriptors: Vec<_> = queues.chain(sockets.into_iter().map(named(Kind::Socket))).collect();
        descriptors.extend(doors.hand().map_err(out_of_descriptors)?);
        let claims = claims.borrow();
        let claim = claims.iter().find(|claim| claim.public_ip() == public_ip);
        let claim = claim
            .map(|claim| claim.hand())
            .transpose()
            .map_err(out_of_descriptors)?;
        let claim = claim.map(|handed| {
            descriptors.push((Kind::Claim, handed.alive));
            handed.instance
        });
        self.offered = Some((self.backend.generation(), self.lease.clone()));
        Ok(Offering {
            offer: Offer {
                hello: Hello::own(),
                pid: process::id(),
                network_namespace: handover::network_namespace()
                    .map_err(|error| format!("the running flanneld cannot read /proc/self/ns/net: {error}"))?,
                backend: self.backend.kind().name().to_owned(),
                public_ip,
                subnets: self.lease.subnets.to_string(),
                claim,
                supervisor: self.supervisor.borrow().clone(),
                descriptors: Vec::new(),
            },
            descriptors,
        })
    }

    /// Lets a new daemon that is prepared go on in this one's place; whether it does.
    ///
    /// # Errors
    /// When it does not and this one cannot go on either.
    pub(super) async fn hand_over(
        &mut self,
        mut heir: Heir,
        doors: &mut Doors,
        claims: &Claims,
    ) -> Result<bool, Error> {
        if self.offered != Some((self.backend.generation(), self.lease.clone())) {
            let reason = "this host's lease, address or device has changed meanwhile: try again".to_owned();
            warn!("not handing over: {reason}");
            heir.take_back(reason).await;
            return Ok(false);
        }
        // From here on they are the new daemon's, unless it fails: it goes on with them if this one ends in the midst.
        let claimed = claims.take();
        doors.leave();
        self.backend.pause();
        let given = match heir.install(self.board.counts()).await {
            Ok(()) => self.release(&mut heir).await,
            Err(reason) => Err(reason),
        };
        let Err(reason) = given else {
            info!("handed everything over to a new flanneld: ending");
            return Ok(true);
        };
        doors.stay();
        claims.replace(claimed);
        self.backend.resume()?;
        warn!("not handed over: {reason}; going on");
        heir.take_back(reason).await;
        Ok(false)
    }

    /// Leaves everything to the new daemon, if it is still there.
    async fn release(&self, heir: &mut Heir) -> Result<(), String> {
        let Some(process) = heir.process else {
            return heir.release().await;
        };
        // First, since a supervisor listens to its main process only.
        self.supervisor.borrow().tell_main_process(process);
        let released = heir.release().await;
        if released.is_err() {
            self.supervisor.borrow().tell_main_process(process::id());
        }
        released
    }
}
