//! The health port: `/healthz` answers 200 while the process runs, `/readyz` 503 and why until the daemon serves, then 200,
//! `/metrics` in the format of Prometheus.
//!
//! A daemon that serves by what it last knew, because the registry is away, is ready all the same: its packets flow, and who
//! takes the host out of service for that makes things worse. Its answer says `ok, but degraded` and why.

use std::{collections::HashMap, io, net::SocketAddr, os::fd::OwnedFd};

use axum::{
    Router,
    extract::Query,
    http::{StatusCode, header},
    routing::get,
};
use tokio::net::TcpListener;

use super::{board::Board, limit::Limited, metrics};

/// The health port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the health port {address} (--healthz-ip, --healthz-port)")]
pub struct Error {
    address: SocketAddr,
    source: io::Error,
}

/// The open port.
#[derive(Debug)]
pub struct Port {
    address: SocketAddr,
    listener: std::net::TcpListener,
}

impl Port {
    /// # Errors
    /// When the address is in use or not this host's.
    pub async fn open(address: SocketAddr) -> Result<Self, Error> {
        let opened = TcpListener::bind(address).await.and_then(TcpListener::into_std);
        let listener = opened.map_err(|source| Error { address, source })?;
        Ok(Self { address, listener })
    }

    /// The port that another process has opened, if it is the one of `address`.
    pub fn adopt(address: SocketAddr, descriptor: OwnedFd) -> Option<Self> {
        let listener = std::net::TcpListener::from(descriptor);
        let is_it = listener.local_addr().is_ok_and(|local| local == address);
        is_it.then_some(Self { address, listener })
    }

    /// The same port, for another process.
    ///
    /// # Errors
    /// Out of descriptors.
    pub fn hand(&self) -> io::Result<OwnedFd> {
        Ok(self.listener.try_clone()?.into())
    }
}

/// Answers on the port for as long as the runtime runs.
///
/// # Errors
/// Out of descriptors.
pub fn serve(port: &Port, board: Board) -> Result<(), Error> {
    let listener = port.listener.try_clone().and_then(TcpListener::from_std);
    let listener = listener.map_err(|source| Error {
        address: port.address,
        source,
    })?;
    let readiness = board.clone();
    let app = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route(
            "/readyz",
            get(async move |Query(query): Query<HashMap<String, String>>| {
                ready(&readiness, query.contains_key("verbose"))
            }),
        )
        .route(
            "/metrics",
            get(async move || {
                (
                    [(header::CONTENT_TYPE, metrics::CONTENT_TYPE)],
                    metrics::render(&board.status()),
                )
            }),
        );
    tokio::spawn(async move { axum::serve(Limited::new(listener), app).await });
    Ok(())
}

/// The answer to `/readyz`; with `?verbose`, each thing that readiness is made of.
fn ready(board: &Board, verbose: bool) -> (StatusCode, String) {
    let (ready, why) = board.readiness();
    let code = if ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let mut text = match (ready, why) {
        (true, None) => "ok\n".to_owned(),
        (true, Some(why)) => format!("ok, but degraded: {why}\n"),
        (false, Some(what)) => format!("not ready: waiting for {what}\n"),
        (false, None) => "not ready\n".to_owned(),
    };
    if verbose {
        let status = board.status();
        let registry = &status.registry;
        let lines = [
            ("interface", status.external.map(|external| external.interface)),
            ("lease", status.lease.map(|lease| lease.subnet)),
            ("backend", status.backend.map(|backend| backend.kind)),
            ("registry", registry.connected.then(|| registry.name.clone())),
        ];
        for (what, there) in lines {
            text += &match there {
                Some(there) => format!("[+] {what} ok: {there}\n"),
                None => format!("[-] {what} not there\n"),
            };
        }
        if let Some(trouble) = &registry.trouble {
            text += &format!("    {trouble}\n");
        }
    }
    (code, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_says_what_is_waited_for() {
        let board = Board::new("a test".to_owned());
        board.waiting_for("the network's configuration");
        assert_eq!(
            ready(&board, false),
            (
                StatusCode::SERVICE_UNAVAILABLE,
                "not ready: waiting for the network's configuration\n".to_owned()
            )
        );
        let (_, text) = ready(&board, true);
        assert!(
            text.contains("[-] lease not there\n[-] backend not there\n[-] registry not there\n"),
            "{text}"
        );
        board.ready();
        assert_eq!(ready(&board, false), (StatusCode::OK, "ok\n".to_owned()));
        board.degraded(Some("etcd is away".to_owned()));
        let degraded = (StatusCode::OK, "ok, but degraded: etcd is away\n".to_owned());
        assert_eq!(ready(&board, false), degraded);
    }
}
