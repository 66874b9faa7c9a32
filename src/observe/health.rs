//! The health port: `/healthz` answers 200 while the process runs, `/readyz` 503 until the daemon serves, then 200.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use axum::{Router, http::StatusCode, routing::get};
use tokio::net::TcpListener;

/// Whether the daemon serves: subnet file written, backend running. Clones share the state.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicBool>);

impl Readiness {
    /// From now on the daemon serves.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

/// The health port could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the health port {address} (--healthz-ip, --healthz-port)")]
pub struct Error {
    address: SocketAddr,
    source: io::Error,
}

/// Opens the port and answers on it for as long as the runtime runs.
///
/// # Errors
/// When the address is in use or not this host's.
pub async fn serve(address: SocketAddr, readiness: Readiness) -> Result<(), Error> {
    let listener = TcpListener::bind(address)
        .await
        .map_err(|source| Error { address, source })?;
    let app = Router::new().route("/healthz", get(|| async { "ok\n" })).route(
        "/readyz",
        get(move || async move {
            if readiness.is_set() {
                (StatusCode::OK, "ok\n")
            } else {
                (StatusCode::SERVICE_UNAVAILABLE, "not ready\n")
            }
        }),
    );
    tokio::spawn(async move { axum::serve(listener, app).await });
    Ok(())
}
