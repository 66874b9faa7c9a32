//! What batching and offload are worth at the sockets: every way of sending against every way of receiving, over loopback.
//!
//! One round moves [`DATAGRAMS`] datagrams that fill an overlay MTU of 1,472 bytes. On loopback nothing is cut into
//! datagrams on the way: a segmented message arrives in one piece where the receiver takes it so.

use std::net::{SocketAddr, UdpSocket};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use flannel::sys::udp::{self, BATCH, MAX_DATAGRAM, Message, RecvBatch, SendBatch};

/// Eight segmented messages, which the receiver's buffer of 4 MiB holds.
const DATAGRAMS: usize = 8 * PER_MESSAGE;

/// As many as fit one segmented message.
const PER_MESSAGE: usize = 44;

const LENGTH: usize = 1_472;

/// How datagrams are sent.
#[derive(Clone, Copy)]
enum Send {
    /// A call for each.
    Sendto,
    /// A call for [`BATCH`] of them.
    Sendmmsg,
    /// [`PER_MESSAGE`] of them in a message (`UDP_SEGMENT`), all messages in one call.
    Segmented,
}

/// How they are received.
#[derive(Clone, Copy)]
enum Receive {
    /// A call for each.
    Recv,
    /// A call for [`BATCH`] of them.
    Recvmmsg,
    /// The same where each may be many merged (`UDP_GRO`).
    Merged,
}

struct Sender {
    way: Send,
    socket: UdpSocket,
    to: SocketAddr,
    bytes: Vec<u8>,
    batch: SendBatch,
}

impl Sender {
    fn send(&mut self) {
        let message = |segment| Message {
            to: self.to,
            slices: 1,
            segment,
        };
        let (length, messages) = match self.way {
            Send::Sendto => {
                for datagram in self.bytes.chunks(LENGTH) {
                    self.socket.send_to(datagram, self.to).unwrap();
                }
                return;
            }
            Send::Sendmmsg => (LENGTH, vec![message(None); DATAGRAMS]),
            Send::Segmented => {
                let segmented = message(Some(LENGTH as u16));
                (LENGTH * PER_MESSAGE, vec![segmented; DATAGRAMS / PER_MESSAGE])
            }
        };
        let slices: Vec<&[u8]> = self.bytes.chunks(length).collect();
        for (messages, slices) in messages.chunks(BATCH).zip(slices.chunks(BATCH)) {
            let sent = self.batch.send(&self.socket, messages, slices.iter().copied());
            assert_eq!(sent.unwrap(), messages.len());
        }
    }
}

struct Receiver {
    way: Receive,
    socket: UdpSocket,
    buffer: Vec<u8>,
    batch: RecvBatch,
}

impl Receiver {
    /// Receives one round.
    fn recv(&mut self) {
        let mut bytes = 0;
        while bytes < DATAGRAMS * LENGTH {
            bytes += match self.way {
                Receive::Recv => self.socket.recv(&mut self.buffer).unwrap(),
                Receive::Recvmmsg | Receive::Merged => {
                    let count = self.batch.recv(&self.socket, BATCH).unwrap();
                    (0..count).map(|index| self.batch.message(index).bytes.len()).sum()
                }
            };
        }
    }
}

fn socket() -> UdpSocket {
    let loopback = "127.0.0.1:0".parse().unwrap();
    udp::bind_group(loopback, 1).unwrap().remove(0)
}

fn matrix(c: &mut Criterion) {
    let mut group = c.benchmark_group("udp");
    group.throughput(Throughput::Bytes((DATAGRAMS * LENGTH) as u64));
    for (send, sending) in [
        ("sendto", Send::Sendto),
        ("sendmmsg", Send::Sendmmsg),
        ("sendmmsg with UDP_SEGMENT", Send::Segmented),
    ] {
        for (receive, receiving) in [
            ("recv", Receive::Recv),
            ("recvmmsg", Receive::Recvmmsg),
            ("recvmmsg with UDP_GRO", Receive::Merged),
        ] {
            let mut receiver = Receiver {
                way: receiving,
                socket: socket(),
                buffer: vec![0; MAX_DATAGRAM],
                batch: RecvBatch::new(),
            };
            if let Receive::Merged = receiving {
                udp::enable_gro(&receiver.socket).unwrap();
            }
            let mut sender = Sender {
                way: sending,
                socket: socket(),
                to: receiver.socket.local_addr().unwrap(),
                bytes: vec![7; DATAGRAMS * LENGTH],
                batch: SendBatch::new(),
            };
            group.bench_function(format!("{send}, {receive}"), |b| {
                b.iter(|| {
                    sender.send();
                    receiver.recv();
                });
            });
        }
    }
    group.finish();
}

criterion_group!(benches, matrix);
criterion_main!(benches);
