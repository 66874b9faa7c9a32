//! Where others reach the daemon: the health port, the status socket, and the socket on which a new daemon asks to take over.

use std::{future::pending, io, os::fd::OwnedFd};

use tracing::warn;

use super::Settings;
use crate::{
    handover::{
        self,
        heir::Predecessor,
        server::{self, Event},
        wire::Kind,
    },
    observe::{
        board::Board,
        health,
        socket::{self, Listener},
    },
};

/// The open doors; nobody answers before [`Doors::serve`].
#[derive(Debug, Default)]
pub(super) struct Doors {
    health: Option<health::Port>,
    status: Option<Listener>,
    handover: Option<Listener>,
    serving: Serving,
}

/// Who answers.
#[derive(Debug, Default)]
struct Serving {
    status: Option<socket::Server>,
    handover: Option<server::Server>,
}

impl Doors {
    /// Opens them, or takes those of the running daemon that are at the same places.
    ///
    /// # Errors
    /// When the health port cannot be opened. Whoever cannot be asked how it is can work all the same.
    pub(super) async fn open(settings: &Settings, mut before: Option<&mut Predecessor>) -> Result<Self, health::Error> {
        let mut take = |choose: fn(&mut Predecessor) -> &mut Option<OwnedFd>| {
            before.as_mut().and_then(|before| choose(before).take())
        };
        let health = match settings.health {
            Some(address) => {
                let taken = take(|before| &mut before.health).and_then(|port| health::Port::adopt(address, port));
                Some(match taken {
                    Some(port) => port,
                    None => health::Port::open(address).await?,
                })
            }
            None => None,
        };
        let path = &settings.status_socket;
        let status = take(|before| &mut before.status).and_then(|socket| Listener::adopt(path, socket));
        let path = &handover::beside(path);
        let handover = take(|before| &mut before.handover).and_then(|socket| Listener::adopt(path, socket));
        Ok(Self {
            health,
            status: status.or_else(|| opened(Listener::open(&settings.status_socket), "`flanneld status`")),
            handover: handover.or_else(|| opened(Listener::open(path), "`flanneld --handover`")),
            serving: Serving::default(),
        })
    }

    /// Answers from now on.
    ///
    /// # Errors
    /// As [`open`](Self::open), of the health port; the others answer all the same.
    pub(super) fn serve(&mut self, board: &Board) -> Result<(), health::Error> {
        let serve = |socket: Listener| socket::Server::open(socket.claim()?, board.clone());
        let status = self.status.take();
        self.serving.status = status.and_then(|socket| opened(serve(socket), "`flanneld status`"));
        let serve = |socket: Listener| server::Server::open(socket.claim()?, board.clone());
        let handover = self.handover.take();
        self.serving.handover = handover.and_then(|socket| opened(serve(socket), "`flanneld --handover`"));
        match &self.health {
            Some(port) => health::serve(port, board.clone()),
            None => Ok(()),
        }
    }

    /// What a new daemon wants next.
    pub(super) async fn next(&mut self) -> Event {
        match &mut self.serving.handover {
            Some(server) => server.next().await,
            None => pending().await,
        }
    }

    /// The same doors, for a new daemon.
    ///
    /// # Errors
    /// Out of descriptors.
    pub(super) fn hand(&self) -> io::Result<Vec<(Kind, OwnedFd)>> {
        let Serving { status, handover } = &self.serving;
        let health = self.health.as_ref().map(|port| (Kind::Health, port.hand()));
        let status = status.as_ref().map(|server| (Kind::Status, server.listener.hand()));
        let handover = handover.as_ref().map(|server| (Kind::Handover, server.listener.hand()));
        let all = health.into_iter().chain(status).chain(handover);
        all.map(|(kind, descriptor)| Ok((kind, descriptor?))).collect()
    }

    /// Leaves the names in the file system to the new daemon.
    pub(super) fn leave(&mut self) {
        self.listeners().for_each(Listener::leave);
    }

    /// The names are this daemon's after all.
    pub(super) fn stay(&mut self) {
        self.listeners().for_each(Listener::stay);
    }

    fn listeners(&mut self) -> impl Iterator<Item = &mut Listener> {
        let Serving { status, handover } = &mut self.serving;
        let status = status.iter_mut().map(|server| &mut server.listener);
        status.chain(handover.iter_mut().map(|server| &mut server.listener))
    }
}

fn opened<T>(opened: Result<T, socket::OpenError>, what_for: &str) -> Option<T> {
    opened
        .inspect_err(|error| warn!("{error}; {what_for} will not work"))
        .ok()
}
