//! A TCP proxy that can hold back what passes through it, for a time or altogether: a network that is slow, or that loses
//! everything but closes nothing.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::{
    net::{SocketAddr, TcpListener as StdListener},
    sync::mpsc,
    thread,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};

/// A proxy; ends when this is dropped.
pub(crate) struct Proxy {
    address: SocketAddr,
    open: watch::Sender<bool>,
    delay: watch::Sender<Duration>,
    acceptor: JoinHandle<()>,
}

impl Proxy {
    /// A proxy on loopback to `target` that delays each piece of what the client sends by `delay`.
    pub(crate) async fn start(target: SocketAddr, delay: Duration) -> Proxy {
        Proxy::start_at("127.0.0.1:0".parse().unwrap(), target, delay)
    }

    /// As [`Proxy::start`], at this address and on a thread of its own, for callers in another network namespace.
    pub(crate) fn start_thread(address: SocketAddr, target: SocketAddr) -> Proxy {
        let (tell, told) = mpsc::channel();
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let proxy = Proxy::start_at(address, target, Duration::ZERO);
                let mut alive = proxy.open.subscribe();
                tell.send(proxy).ok().unwrap();
                while alive.changed().await.is_ok() {}
            });
        });
        told.recv().unwrap()
    }

    fn start_at(address: SocketAddr, target: SocketAddr, delay: Duration) -> Proxy {
        let listener = StdListener::bind(address).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = TcpListener::from_std(listener).unwrap();
        let address = listener.local_addr().unwrap();
        let (open, delay) = (watch::Sender::new(true), watch::Sender::new(delay));
        let (gate, late) = (open.subscribe(), delay.subscribe());
        let acceptor = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                // A target that is down closes the connection to the client.
                if let Ok(server) = TcpStream::connect(target).await {
                    let ((from_client, to_client), (from_server, to_server)) =
                        (client.into_split(), server.into_split());
                    tokio::spawn(pass(from_client, to_server, gate.clone(), Some(late.clone())));
                    tokio::spawn(pass(from_server, to_client, gate.clone(), None));
                }
            }
        });
        Proxy {
            address,
            open,
            delay,
            acceptor,
        }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Delays each piece of what the client sends by this from now on.
    pub(crate) fn delay(&self, delay: Duration) {
        self.delay.send_replace(delay);
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

async fn pass(
    mut from: OwnedReadHalf,
    mut to: OwnedWriteHalf,
    mut open: watch::Receiver<bool>,
    delay: Option<watch::Receiver<Duration>>,
) {
    let mut buffer = vec![0; 64 << 10];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let delay = delay.as_ref().map_or(Duration::ZERO, |delay| *delay.borrow());
        tokio::time::sleep(delay).await;
        if open.wait_for(|open| *open).await.is_err() || to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
}
