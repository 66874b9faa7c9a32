//! The tunnel's UDP sockets: one for each worker, all on one port; batches of datagrams in one system call.

use std::{
    io, mem,
    net::{IpAddr, SocketAddr, UdpSocket},
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
    ptr,
    time::Duration,
};

use socket2::{Domain, Protocol, SockRef, Socket, Type};

/// What each socket asks the kernel to hold while its worker is busy: 4 MiB, about 20 ms of 1.5 Gbit/s of MTU-size packets
/// by the kernel's own accounting (an skb of a 1,500-byte packet is charged about 2,304 bytes).
const SOCKET_BUFFER_BYTES: libc::c_int = 4 << 20;

/// Messages moved by one call. 64 spreads the cost of the call to a few ns a packet; more only adds latency.
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
    let mut sockets = Vec::with_capacity(count);
    grow_group(&mut sockets, address, count)?;
    Ok(sockets)
}

/// Binds more sockets, as [`bind_group`] does, until the group has `count` of them.
///
/// # Errors
/// As [`bind_group`].
pub fn grow_group(sockets: &mut Vec<UdpSocket>, address: SocketAddr, count: usize) -> io::Result<()> {
    while sockets.len() < count {
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
    Ok(())
}

/// Binds `count` sockets for sending only to `address` and one port of the kernel's choice: what leaves by them is told apart
/// by that port.
///
/// # Errors
/// As [`bind_group`]; `EADDRINUSE` when there are no free ports.
pub fn bind_source(address: IpAddr, count: usize) -> io::Result<Vec<UdpSocket>> {
    let mut sockets = Vec::with_capacity(count);
    grow_source(&mut sockets, address, count)?;
    Ok(sockets)
}

/// Binds more sockets, as [`bind_source`] does, until there are `count` of them on the port.
///
/// # Errors
/// As [`bind_source`].
pub fn grow_source(sockets: &mut Vec<UdpSocket>, address: IpAddr, count: usize) -> io::Result<()> {
    grow_group(sockets, SocketAddr::new(address, 0), count)?;
    for socket in sockets {
        // Nothing is to come there, and what comes all the same is not to be kept: the kernel makes it its least.
        SockRef::from(&*socket).set_recv_buffer_size(1)?;
    }
    Ok(())
}

/// The UDP socket that this is, which another process has bound: it holds what has come meanwhile.
///
/// # Errors
/// `InvalidInput`: it is no UDP socket.
pub fn adopt(descriptor: OwnedFd) -> io::Result<UdpSocket> {
    let socket = Socket::from(descriptor);
    if (socket.r#type()?, socket.protocol()?) != (Type::DGRAM, Some(Protocol::UDP)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a UDP socket"));
    }
    Ok(socket.into())
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

    /// The IP address; unspecified for a family that is neither IPv4 nor IPv6.
    fn ip(&self) -> IpAddr {
        // SAFETY: every byte of the union is always set, any bytes are valid in both members, and both begin with the family.
        let (v4, v6) = unsafe { (self.v4, self.v6) };
        match libc::c_int::from(v4.sin_family) {
            libc::AF_INET => IpAddr::from(v4.sin_addr.s_addr.to_ne_bytes()),
            libc::AF_INET6 => IpAddr::from(v6.sin6_addr.s6_addr),
            _ => IpAddr::from([0; 4]),
        }
    }

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

/// Room for one control message whose value is no longer than a `c_int`: a segment size. (cmsg(3): header of 16 bytes,
/// value, padding to 8.)
#[repr(C, align(8))]
#[derive(Clone, Copy)]
struct Control([u8; 24]);

const EMPTY_CONTROL: Control = Control([0; 24]);

/// Space to receive up to [`BATCH`] messages in one call: each one datagram, or what GRO has made of several.
pub struct RecvBatch {
    buffer: Box<[u8]>,
    headers: Box<[libc::mmsghdr; BATCH]>,
    vectors: Box<[libc::iovec; BATCH]>,
    addresses: Box<[SockAddr; BATCH]>,
    controls: Box<[Control; BATCH]>,
}

// SAFETY: the raw pointers in `headers` and `vectors` are written anew from the owned buffers at each call and are used by
// nothing in between.
unsafe impl Send for RecvBatch {}

/// A message that was received: a datagram, or several of one length (the last may be shorter) that GRO has merged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Where it is in the arena.
    pub bytes: Range<usize>,
    /// Length in bytes of each datagram but the last.
    pub segment: usize,
    /// The sender's address.
    pub from: IpAddr,
}

impl RecvBatch {
    /// Room for [`BATCH`] messages of any length.
    pub fn new() -> Self {
        Self {
            buffer: vec![0; BATCH * RECV_STRIDE].into_boxed_slice(),
            headers: Box::new([EMPTY_HEADER; BATCH]),
            vectors: Box::new([EMPTY_IOVEC; BATCH]),
            addresses: Box::new([SockAddr::ZERO; BATCH]),
            controls: Box::new([EMPTY_CONTROL; BATCH]),
        }
    }

    /// Receives what is waiting, at most `most` messages ([`BATCH`] is the limit); how many came.
    ///
    /// # Errors
    /// `WouldBlock`: none is waiting; others as `recvmmsg(2)`.
    pub fn recv(&mut self, socket: &UdpSocket, most: usize) -> io::Result<usize> {
        let most = most.min(BATCH);
        let slots = self.buffer.chunks_exact_mut(RECV_STRIDE);
        let space = self.vectors.iter_mut().zip(self.controls.iter_mut());
        let space = space.zip(self.addresses.iter_mut());
        for ((slot, header), ((vector, control), address)) in slots.zip(self.headers.iter_mut()).zip(space).take(most) {
            *vector = libc::iovec {
                iov_base: slot.as_mut_ptr().cast(),
                iov_len: MAX_DATAGRAM,
            };
            header.msg_hdr = libc::msghdr {
                msg_name: ptr::from_mut(address).cast(),
                msg_namelen: mem::size_of::<SockAddr>() as libc::socklen_t,
                msg_iov: vector,
                msg_iovlen: 1,
                msg_control: ptr::from_mut(control).cast(),
                msg_controllen: mem::size_of::<Control>(),
                ..EMPTY_HEADER.msg_hdr
            };
        }
        // SAFETY: each of the first `most` headers points at one vector, one address and one control buffer, each with its own
        // size, and each vector at its own MAX_DATAGRAM bytes of `buffer`; all of them are owned by `self` and live through the call.
        let count = unsafe {
            libc::recvmmsg(
                socket.as_raw_fd(),
                self.headers.as_mut_ptr(),
                most as libc::c_uint,
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

    /// The buffer that the ranges of [`Self::message`] lie in.
    pub fn arena(&mut self) -> &mut [u8] {
        &mut self.buffer
    }

    /// Message `index` of the last [`Self::recv`].
    ///
    /// # Panics
    /// When `index` is not below [`BATCH`].
    #[inline]
    pub fn message(&self, index: usize) -> Received {
        let length = (self.headers[index].msg_len as usize).min(MAX_DATAGRAM);
        let start = index * RECV_STRIDE;
        Received {
            bytes: start..start + length,
            segment: self.segment(index).unwrap_or(length),
            from: self.addresses[index].ip(),
        }
    }

    /// What GRO says of message `index`: the length of its datagrams.
    fn segment(&self, index: usize) -> Option<usize> {
        let header = &self.headers[index].msg_hdr;
        // SAFETY: `msg_control` points at the `Control` that `recv` gave it, which is owned by `self`, aligned, and of at
        // least `msg_controllen` bytes: the kernel has set that to what it wrote, and never raises it. CMSG_FIRSTHDR gives
        // null when that is less than a header.
        let message = unsafe { libc::CMSG_FIRSTHDR(header).as_ref() }?;
        if (message.cmsg_level, message.cmsg_type) != (libc::SOL_UDP, libc::UDP_GRO) {
            return None;
        }
        // SAFETY: a UDP_GRO message carries one c_int (udp(7)), and the kernel has written it whole or cut the message off.
        let size = unsafe { libc::CMSG_DATA(message).cast::<libc::c_int>().read_unaligned() };
        usize::try_from(size).ok().filter(|size| *size > 0)
    }
}

/// One call's worth of a message to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Where to.
    pub to: SocketAddr,
    /// How many slices its bytes are made of, one behind another; at most [`MAX_SLICES`].
    pub slices: usize,
    /// `Some`: the bytes are several datagrams of this length (the last may be shorter), and the kernel cuts them
    /// (`UDP_SEGMENT`).
    pub segment: Option<u16>,
}

/// Slices in one message (`UIO_MAXIOV`).
pub const MAX_SLICES: usize = 1_024;

/// Space to send up to [`BATCH`] messages in one call. Borrows no packet beyond that.
pub struct SendBatch {
    headers: Box<[libc::mmsghdr; BATCH]>,
    vectors: Vec<libc::iovec>,
    addresses: Box<[SockAddr; BATCH]>,
    controls: Box<[Control; BATCH]>,
}

// SAFETY: as for `RecvBatch`: pointers are written anew at each call and used by nothing in between.
unsafe impl Send for SendBatch {}

impl SendBatch {
    /// Room for [`BATCH`] messages.
    pub fn new() -> Self {
        Self {
            headers: Box::new([EMPTY_HEADER; BATCH]),
            vectors: Vec::new(),
            addresses: Box::new([SockAddr::ZERO; BATCH]),
            controls: Box::new([EMPTY_CONTROL; BATCH]),
        }
    }

    /// Sends `messages` (at most [`BATCH`] of them count), whose bytes are the next of `slices`, each in its turn; how many
    /// of them the kernel took, at least one unless there are none.
    ///
    /// # Errors
    /// Why the *first* was not taken, as `sendmsg(2)`. An error of a later one shows when it is the first.
    pub fn send<'bytes>(
        &mut self,
        socket: &UdpSocket,
        messages: &[Message],
        slices: impl Iterator<Item = &'bytes [u8]>,
    ) -> io::Result<usize> {
        self.vectors.clear();
        self.vectors.extend(slices.map(|slice| libc::iovec {
            iov_base: slice.as_ptr().cast_mut().cast(),
            iov_len: slice.len(),
        }));
        let mut rest = &mut self.vectors[..];
        let mut count = 0;
        let space = self.addresses.iter_mut().zip(self.controls.iter_mut());
        for ((message, header), (address, control)) in messages.iter().zip(self.headers.iter_mut()).zip(space) {
            // No vector is given twice, and none that is not there.
            let (vectors, after) = rest.split_at_mut(message.slices.min(rest.len()));
            rest = after;
            header.msg_hdr = libc::msghdr {
                msg_namelen: address.set(message.to),
                msg_name: ptr::from_mut(address).cast(),
                msg_iov: vectors.as_mut_ptr(),
                msg_iovlen: vectors.len(),
                ..EMPTY_HEADER.msg_hdr
            };
            if let Some(segment) = message.segment {
                header.msg_hdr.msg_control = ptr::from_mut(control).cast();
                // SAFETY: CMSG_LEN and CMSG_SPACE only compute; CMSG_FIRSTHDR points into `control`, which is aligned for a
                // cmsghdr and has room for one with two bytes of data (24 bytes); CMSG_DATA points behind it.
                unsafe {
                    header.msg_hdr.msg_controllen = libc::CMSG_SPACE(mem::size_of::<u16>() as libc::c_uint) as usize;
                    let first = libc::CMSG_FIRSTHDR(&header.msg_hdr);
                    (*first).cmsg_level = libc::SOL_UDP;
                    (*first).cmsg_type = libc::UDP_SEGMENT;
                    (*first).cmsg_len = libc::CMSG_LEN(mem::size_of::<u16>() as libc::c_uint) as usize;
                    libc::CMSG_DATA(first).cast::<u16>().write_unaligned(segment);
                }
            }
            count += 1;
        }
        if count == 0 {
            return Ok(0);
        }
        // SAFETY: each of the first `count` headers was laid out above to point at vectors, an address and a control buffer of
        // `self`, and the vectors point at slices that outlive this call; sendmmsg only reads through them.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), self.headers.as_mut_ptr(), count, libc::MSG_DONTWAIT) };
        if sent < 0 {
            Err(io::Error::last_os_error())
        } else {
            Ok(sent as usize)
        }
    }
}

/// How many datagrams the kernel has dropped because the socket's buffer was full (`SO_MEMINFO`, Linux 4.12). Wraps around.
///
/// # Errors
/// `ENOPROTOOPT` from an older kernel.
pub fn dropped(socket: &UdpSocket) -> io::Result<u32> {
    // include/uapi/linux/sock_diag.h: SK_MEMINFO_VARS numbers, of which SK_MEMINFO_DROPS is the last.
    const NUMBERS: usize = 9;
    let mut numbers = [0u32; NUMBERS];
    let mut length = mem::size_of_val(&numbers) as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes to `numbers`, and the length that it has written to `length`.
    let done = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            numbers.as_mut_ptr().cast(),
            &mut length,
        )
    };
    if done == 0 {
        Ok(numbers[NUMBERS - 1])
    } else {
        Err(io::Error::last_os_error())
    }
}

/// Whether the kernel cuts long sends into datagrams (`UDP_SEGMENT`, Linux 4.18).
pub fn can_segment(socket: &UdpSocket) -> bool {
    // Zero is the default: no segmentation unless a message asks for it.
    set_udp_option(socket, libc::UDP_SEGMENT, 0).is_ok()
}

/// Asks the kernel to hand over several datagrams of one flow as one message (`UDP_GRO`, Linux 5.0).
///
/// # Errors
/// `ENOPROTOOPT` from an older kernel.
pub fn enable_gro(socket: &UdpSocket) -> io::Result<()> {
    set_udp_option(socket, libc::UDP_GRO, 1)
}

/// Asks the kernel to hand over each datagram by itself, as it does at first.
///
/// # Errors
/// `ENOPROTOOPT` from a kernel that knows nothing else.
pub fn disable_gro(socket: &UdpSocket) -> io::Result<()> {
    set_udp_option(socket, libc::UDP_GRO, 0)
}

fn set_udp_option(socket: &UdpSocket, option: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: both options take one c_int, which lives through the call.
    let done = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_UDP,
            option,
            ptr::from_ref(&value).cast(),
            mem::size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if done == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
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

    fn socket() -> UdpSocket {
        bind_group(loopback(), 1).unwrap().remove(0)
    }

    impl RecvBatch {
        fn bytes(&mut self, index: usize) -> (&[u8], usize) {
            let received = self.message(index);
            (&self.buffer[received.bytes], received.segment)
        }
    }

    fn single(to: SocketAddr) -> Message {
        Message {
            to,
            slices: 1,
            segment: None,
        }
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
        let (receivers, sender) = ([socket(), socket()], socket());
        let payloads: Vec<Vec<u8>> = (0..BATCH).map(|i| vec![i as u8; 1 + i * 97]).collect();
        let messages: Vec<Message> = (0..BATCH)
            .map(|i| single(receivers[i % 2].local_addr().unwrap()))
            .collect();
        let mut batch = SendBatch::new();
        let slices = payloads.iter().map(Vec::as_slice);
        assert_eq!(batch.send(&sender, &messages, slices).unwrap(), BATCH);
        assert_eq!(batch.send(&sender, &[], std::iter::empty()).unwrap(), 0);
        let mut batch = RecvBatch::new();
        for (offset, receiver) in receivers.iter().enumerate() {
            assert_eq!(batch.recv(receiver, BATCH).unwrap(), BATCH / 2);
            for index in 0..BATCH / 2 {
                let payload = &payloads[2 * index + offset];
                assert_eq!(batch.bytes(index), (&payload[..], payload.len()));
                assert_eq!(batch.message(index).from, sender.local_addr().unwrap().ip());
            }
            assert_eq!(
                batch.recv(receiver, BATCH).unwrap_err().kind(),
                io::ErrorKind::WouldBlock
            );
        }
    }

    #[test]
    fn what_a_full_buffer_drops_is_counted() {
        let (receiver, sender) = (socket(), socket());
        assert_eq!(dropped(&receiver).unwrap(), 0);
        let small = Socket::from(receiver);
        small.set_recv_buffer_size(4_096).unwrap();
        let receiver = UdpSocket::from(small);
        for _ in 0..100 {
            sender.send_to(&[0; 1_000], receiver.local_addr().unwrap()).unwrap();
        }
        let mut arrived = 0;
        let mut batch = RecvBatch::new();
        while let Ok(count) = batch.recv(&receiver, BATCH) {
            arrived += count;
        }
        assert_eq!(dropped(&receiver).unwrap() as usize, 100 - arrived);
        assert!(arrived < 100);
    }

    #[test]
    fn no_more_are_received_than_asked_for() {
        let receiver = socket();
        for _ in 0..5 {
            receiver.send_to(b"x", receiver.local_addr().unwrap()).unwrap();
        }
        let mut batch = RecvBatch::new();
        assert_eq!(batch.recv(&receiver, 3).unwrap(), 3);
        assert_eq!(batch.recv(&receiver, 1_000).unwrap(), 2);
    }

    #[test]
    fn the_longest_datagram_arrives_whole() {
        let receiver = socket();
        let payload = vec![7; 65_507];
        receiver.send_to(&payload, receiver.local_addr().unwrap()).unwrap();
        let mut batch = RecvBatch::new();
        assert_eq!(batch.recv(&receiver, BATCH).unwrap(), 1);
        assert_eq!(batch.bytes(0).0, payload);
    }

    #[test]
    fn a_segmented_message_is_several_datagrams_to_one_and_one_message_to_another() {
        let sender = socket();
        assert!(can_segment(&sender));
        let (plain, merging) = (socket(), socket());
        enable_gro(&merging).unwrap();
        // Three slices that no boundary of a datagram coincides with.
        let payload: Vec<u8> = (0..2_500u32).map(|i| i as u8).collect();
        let slices = [&payload[..700], &payload[700..701], &payload[701..]];
        let message = |to: &UdpSocket| Message {
            to: to.local_addr().unwrap(),
            slices: 3,
            segment: Some(1_000),
        };
        let messages = [message(&plain), message(&merging), single(plain.local_addr().unwrap())];
        let mut batch = SendBatch::new();
        let all = slices.into_iter().chain(slices).chain([&b"single"[..]]);
        assert_eq!(batch.send(&sender, &messages, all).unwrap(), 3);

        let mut batch = RecvBatch::new();
        assert_eq!(batch.recv(&plain, BATCH).unwrap(), 4);
        for (index, expected) in payload.chunks(1_000).chain([&b"single"[..]]).enumerate() {
            assert_eq!(batch.bytes(index).0, expected);
        }
        assert_eq!(batch.recv(&merging, BATCH).unwrap(), 1);
        assert_eq!(batch.bytes(0), (&payload[..], 1_000));
    }

    #[test]
    fn an_error_of_the_first_message_is_told_and_later_ones_go_after_it() {
        let (receiver, sender) = (socket(), socket());
        let to = receiver.local_addr().unwrap();
        let too_long = vec![0; 65_508];
        let mut batch = SendBatch::new();
        let slices = [&b"one"[..], &too_long, b"three"];
        let mut send = |from: usize| batch.send(&sender, &[single(to); 3][from..], slices[from..].iter().copied());
        assert_eq!(send(0).unwrap(), 1);
        assert_eq!(send(1).unwrap_err().raw_os_error(), Some(libc::EMSGSIZE));
        assert_eq!(send(2).unwrap(), 1);
    }
}
