//! A TCP proxy that can hold back what passes through it: a network that loses everything, but closes nothing.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::{net::SocketAddr, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// A proxy on loopback; ends when this is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    open: watch::Sender<bool>,
    acceptor: JoinHandle<()>,
}

impl Proxy {
    /// A proxy to `target` that delays each piece of what the client sends by `delay`.
    pub(crate) async fn start(target: SocketAddr, delay: Duration) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let open = watch::Sender::new(true);
        let gate = open.subscribe();
        let acceptor = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A target that is down closes the connection to the client.
                if let Ok(server) = TcpStream::connect(target).await {
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::spawn(pass(from_client, to_server, gate.clone(), delay));
                    tokio::spawn(pass(from_server, to_client, gate.clone(), Duration::ZERO));
                }
            }
        });
        Proxy {
            address,
            open,
            acceptor,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Holds everything back from now on.
    pub(crate) fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Lets everything pass again, also what was held back.
    pub(crate) fn mend(&self) {
        self.open.send_replace(true);
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.acceptor.abort();
    }
}

async fn pass(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut open: watch::Receiver<bool>, delay: Duration) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        tokio::time::sleep(delay).await;
        if open.wait_for(|open| *open).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
