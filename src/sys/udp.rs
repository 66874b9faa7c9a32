//! The tunnel's UDP sockets: one for each worker, all on one port; batches of datagrams in one system call.

use std::{
    io, mem,
    net::{SocketAddr, UdpSocket},
    os::fd::AsRawFd,
    ptr,
    time::Duration,
};

use socket2::{Domain, Socket, Type};

/// What each socket asks the kernel to hold while its worker is busy: 4 MiB, about 20 ms of 1.5 Gbit/s of MTU-size packets
/// by the kernel's own accounting (an skb of a 1,500-byte packet is charged about 2,304 bytes).
const SOCKET_BUFFER_BYTES: libc::c_int = 4 << 20;

/// Datagrams moved by one call. 64 spreads the cost of the call to a few ns a packet; more only adds latency.
pub const BATCH: usize = 64;

/// No UDP datagram is longer (16-bit length in the UDP and IPv4 headers).
pub const MAX_DATAGRAM: usize = 65_535;

/// The distance of two receive slots. Room for the longest datagram, so that nothing is ever cut; untouched pages cost no
/// memory. The odd cache lines keep the slots' first bytes out of one cache set.
const RECV_STRIDE: usize = 65_536 + 3 * 64;

/// Binds `count` sockets to `address`, between which the kernel spreads the datagrams by their flow (`SO_REUSEPORT`).
///
/// # Errors
/// `EADDRINUSE` when any other process has the port, also one that shares ports; `EADDRNOTAVAIL` when the address is not
/// this host's.
pub fn bind_group(address: SocketAddr, count: usize) -> io::Result<Vec<UdpSocket>> {
    let mut sockets: Vec<UdpSocket> = Vec::with_capacity(count);
    for _ in 0..count {
        let socket = Socket::new(Domain::for_address(address), Type::DGRAM, None)?;
        socket.set_nonblocking(true)?;
        // The first binds without sharing: it alone can tell that no second daemon is on this port. The kernel lets the
        // others in by the option's value at their own time of binding.
        if let Some(first) = sockets.first() {
            socket.set_reuse_port(true)?;
            socket.bind(&first.local_addr()?.into())?;
        } else {
            socket.bind(&address.into())?;
            socket.set_reuse_port(true)?;
        }
        set_buffer(&socket, libc::SO_RCVBUFFORCE, libc::SO_RCVBUF);
        set_buffer(&socket, libc::SO_SNDBUFFORCE, libc::SO_SNDBUF);
        sockets.push(socket.into());
    }
    Ok(sockets)
}

/// Asks for a big buffer, past the administrator's limit if allowed; what it gets is enough to work either way.
fn set_buffer(socket: &Socket, force: libc::c_int, polite: libc::c_int) {
    for option in [force, polite] {
        // SAFETY: both options take one c_int, which lives through the call.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                option,
                ptr::from_ref(&SOCKET_BUFFER_BYTES).cast(),
                mem::size_of::<libc::c_int>() as libc::socklen_t,
            )
        };
        if done == 0 {
            return;
        }
    }
}

/// Waits until `socket` takes datagrams again, at most for `limit` (rounded up to milliseconds).
pub fn wait_writable(socket: &UdpSocket, limit: Duration) {
    let mut wait = libc::pollfd {
        fd: socket.as_raw_fd(),
        events: libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd, and its count is 1. The outcome does not matter: the caller tries again and sees.
    unsafe { libc::poll(&mut wait, 1, limit.as_millis().max(1) as libc::c_int) };
}

/// An address in the form that the kernel takes.
#[repr(C)]
#[derive(Clone, Copy)]
union SockAddr {
    v4: libc::sockaddr_in,
    v6: libc::sockaddr_in6,
}

impl SockAddr {
    const ZERO: Self = Self {
        // The larger member, so that every byte of the union is set.
        v6: libc::sockaddr_in6 {
            sin6_family: 0,
            sin6_port: 0,
            sin6_flowinfo: 0,
            sin6_addr: libc::in6_addr { s6_addr: [0; 16] },
            sin6_scope_id: 0,
        },
    };

    /// Writes `address`; the length that goes with it.
    fn set(&mut self, address: SocketAddr) -> libc::socklen_t {
        match address {
            SocketAddr::V4(address) => {
                self.v4 = libc::sockaddr_in {
                    sin_family: libc::AF_INET as libc::sa_family_t,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes(address.ip().octets()),
                    },
                    sin_zero: [0; 8],
                };
                mem::size_of::<libc::sockaddr_in>() as libc::socklen_t
            }
            SocketAddr::V6(address) => {
                self.v6 = libc::sockaddr_in6 {
                    sin6_family: libc::AF_INET6 as libc::sa_family_t,
                    sin6_port: address.port().to_be(),
                    sin6_flowinfo: address.flowinfo(),
                    sin6_addr: libc::in6_addr {
                        s6_addr: address.ip().octets(),
                    },
                    sin6_scope_id: address.scope_id(),
                };
                mem::size_of::<libc::sockaddr_in6>() as libc::socklen_t
            }
        }
    }
}

const EMPTY_IOVEC: libc::iovec = libc::iovec {
    iov_base: ptr::null_mut(),
    iov_len: 0,
};

const EMPTY_HEADER: libc::mmsghdr = libc::mmsghdr {
    msg_hdr: libc::msghdr {
        msg_name: ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    },
    msg_len: 0,
};

/// Space to receive up to [`BATCH`] datagrams in one call.
pub struct RecvBatch {
    buffer: Box<[u8]>,
    headers: Box<[libc::mmsghdr; BATCH]>,
    vectors: Box<[libc::iovec; BATCH]>,
}

// SAFETY: the raw pointers in `headers` and `vectors` are written anew from the owned buffers at each call and are used by
// nothing in between.
unsafe impl Send for RecvBatch {}

impl RecvBatch {
    /// Room for [`BATCH`] datagrams of any length.
    pub fn new() -> Self {
        Self {
            buffer: vec![0; BATCH * RECV_STRIDE].into_boxed_slice(),
            headers: Box::new([EMPTY_HEADER; BATCH]),
            vectors: Box::new([EMPTY_IOVEC; BATCH]),
        }
    }

    /// Receives what is waiting, at most [`BATCH`] datagrams; how many came.
    ///
    /// # Errors
    /// `WouldBlock`: none is waiting; others as `recvmmsg(2)`.
    pub fn recv(&mut self, socket: &UdpSocket) -> io::Result<usize> {
        for ((slot, header), vector) in self
            .buffer
            .chunks_exact_mut(RECV_STRIDE)
            .zip(self.headers.iter_mut())
            .zip(self.vectors.iter_mut())
        {
            *vector = libc::iovec {
                iov_base: slot.as_mut_ptr().cast(),
                iov_len: MAX_DATAGRAM,
            };
            header.msg_hdr = libc::msghdr {
                msg_iov: vector,
                msg_iovlen: 1,
                ..EMPTY_HEADER.msg_hdr
            };
        }
        // SAFETY: every header points at one vector, and every vector at its own MAX_DATAGRAM bytes of `buffer`; all of
        // them are owned by `self` and live through the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                BATCH as libc::c_uint,
                libc::MSG_DONTWAIT,
                ptr::null_mut(),
            )
        };
        if count < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(count as usize)
        }
    }

    /// The payload of datagram `index` of the last [`Self::recv`].
    ///
    /// # Panics
    /// When `index` is not below [`BATCH`].
    pub fn datagram(&mut self, index: usize) -> &mut [u8] {
        let length = (self.headers[index].msg_len as usize).min(MAX_DATAGRAM);
        let start = index * RECV_STRIDE;
        &mut self.buffer[start..start + length]
    }
}

/// Space to send up to [`BATCH`] datagrams in one call. Borrows no packet beyond a call.
pub struct SendBatch {
    headers: Box<[libc::mmsghdr; BATCH]>,
    vectors: Box<[libc::iovec; BATCH]>,
    addresses: Box<[SockAddr; BATCH]>,
}

// SAFETY: as for `RecvBatch`: pointers are written anew at each call and used by nothing in between.
unsafe impl Send for SendBatch {}

impl SendBatch {
    /// Room for [`BATCH`] datagrams.
    pub fn new() -> Self {
        Self {
            headers: Box::new([EMPTY_HEADER; BATCH]),
            vectors: Box::new([EMPTY_IOVEC; BATCH]),
            addresses: Box::new([SockAddr::ZERO; BATCH]),
        }
    }

    /// Sends the first of `datagrams` (payload, where to), at most [`BATCH`]; how many the kernel took, at least one.
    ///
    /// # Errors
    /// Why the *first* datagram was not taken, as `sendmsg(2)`. An error of a later one shows when it is the first.
    pub fn send<'a>(
        &mut self,
        socket: &UdpSocket,
        datagrams: impl Iterator<Item = (&'a [u8], SocketAddr)>,
    ) -> io::Result<usize> {
        let mut count = 0;
        for (((payload, to), header), (vector, address)) in datagrams
            .zip(self.headers.iter_mut())
            .zip(self.vectors.iter_mut().zip(self.addresses.iter_mut()))
        {
            let name_length = address.set(to);
            *vector = libc::iovec {
                iov_base: payload.as_ptr().cast_mut().cast(),
                iov_len: payload.len(),
            };
            header.msg_hdr = libc::msghdr {
                msg_name: ptr::from_mut(address).cast(),
                msg_namelen: name_length,
                msg_iov: vector,
                msg_iovlen: 1,
                ..EMPTY_HEADER.msg_hdr
            };
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: the first `count` headers point at one vector and one address each, owned by `self`; the vectors point at
        // payloads that are borrowed for `'a`, which outlives the call; sendmmsg only reads through them.
        let sent = unsafe {
            libc::sendmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                count as libc::c_uint,
                libc::MSG_DONTWAIT,
            )
        };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(sent as usize)
        }
    }
}

impl Default for RecvBatch {
    fn default() -> Self {
        Self::new()
    }
}

impl Default for SendBatch {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn loopback() -> SocketAddr {
        "127.0.0.1:0".parse().unwrap()
    }

    #[test]
    fn a_port_in_use_is_refused_even_to_a_group() {
        let first = bind_group(loopback(), 2).unwrap();
        let address = first[0].local_addr().unwrap();
        assert_eq!(first[1].local_addr().unwrap(), address);
        assert_eq!(bind_group(address, 2).unwrap_err().kind(), io::ErrorKind::AddrInUse);
    }

    #[test]
    fn batches_keep_payloads_order_and_destinations() {
        let sockets = [
            bind_group(loopback(), 1).unwrap().remove(0),
            bind_group(loopback(), 1).unwrap().remove(0),
        ];
        let sender = bind_group(loopback(), 1).unwrap().remove(0);
        let payloads: Vec<Vec<u8>> = (0..BATCH).map(|i| vec![i as u8; 1 + i * 97]).collect();
        let to = |i: usize| sockets[i % 2].local_addr().unwrap();
        let sent = SendBatch::new()
            .send(
                &sender,
                payloads
                    .iter()
                    .enumerate()
                    .map(|(i, payload)| (payload.as_slice(), to(i))),
            )
            .unwrap();
        assert_eq!(sent, BATCH);
        let mut batch = RecvBatch::new();
        for (offset, socket) in sockets.iter().enumerate() {
            assert_eq!(batch.recv(socket).unwrap(), BATCH / 2);
            for index in 0..BATCH / 2 {
                assert_eq!(batch.datagram(index), &payloads[2 * index + offset][..]);
            }
            assert_eq!(batch.recv(socket).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        }
    }

    #[test]
    fn the_longest_datagram_arrives_whole() {
        let receiver = bind_group(loopback(), 1).unwrap().remove(0);
        let payload = vec![7; 65_507];
        receiver.send_to(&payload, receiver.local_addr().unwrap()).unwrap();
        let mut batch = RecvBatch::new();
        assert_eq!(batch.recv(&receiver).unwrap(), 1);
        assert_eq!(batch.datagram(0), &payload[..]);
    }

    #[test]
    fn an_error_of_the_first_datagram_is_told_and_later_ones_go_after_it() {
        let receiver = bind_group(loopback(), 1).unwrap().remove(0);
        let sender = bind_group(loopback(), 1).unwrap().remove(0);
        let to = receiver.local_addr().unwrap();
        let too_long = vec![0; 65_508];
        let packets: [&[u8]; 3] = [b"one", &too_long, b"three"];
        let mut batch = SendBatch::new();
        assert_eq!(batch.send(&sender, packets.iter().map(|p| (*p, to))).unwrap(), 1);
        let error = batch.send(&sender, packets[1..].iter().map(|p| (*p, to))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
        assert_eq!(batch.send(&sender, packets[2..].iter().map(|p| (*p, to))).unwrap(), 1);
    }
}
