//! TUN devices: opening queues, reading and writing one IP packet a call.

use std::{
    ffi::CStr,
    fs::{File, OpenOptions},
    io::{self, IoSlice, Read, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
    sync::Arc,
};

/// Where the kernel lets processes make TUN devices (Documentation/networking/tuntap.rst).
const CLONE_DEVICE: &str = "/dev/net/tun";

/// One queue of a TUN device in non-blocking mode. The device goes when its last queue is closed.
#[derive(Debug)]
pub struct TunQueue {
    file: File,
    /// A virtio header stands in front of each packet.
    headers: bool,
}

/// A TUN device with its queues.
#[derive(Debug)]
pub struct Tun {
    /// The interface's name, as the kernel chose it (`flannel0`).
    pub name: String,
    /// At least one.
    pub queues: Vec<Arc<TunQueue>>,
    /// Whether it may have more of them.
    pub multi_queue: bool,
}

/// What a device hands over and takes besides packets of its MTU (`TUNSETOFFLOAD`), from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TunOffload {
    /// Nothing, and no virtio header in front of packets.
    None,
    /// Packets whose checksum is not computed yet, and superpackets of TCP.
    Tcp,
    /// Superpackets of UDP too: Linux 6.2.
    TcpUdp,
}

impl TunQueue {
    /// Whether a virtio header stands in front of each packet that is read, and must in front of each that is sent.
    pub fn has_headers(&self) -> bool {
        self.headers
    }

    /// Reads one IP packet into `buffer`; its length. A longer packet is cut.
    ///
    /// # Errors
    /// `WouldBlock`: none is waiting. `EBADFD`: the device is gone.
    pub fn recv(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Hands one IP packet to the kernel as received on the device.
    ///
    /// # Errors
    /// `EINVAL`: not an IP packet. `EIO`: the device is down. `EBADFD`: the device is gone.
    pub fn send(&self, packet: &[u8]) -> io::Result<()> {
        (&self.file).write(packet).map(drop)
    }

    /// The same with a packet in parts, the first of which begins with the virtio header: for a device from
    /// [`open_offload`]. At most 1,024 parts.
    ///
    /// # Errors
    /// As [`send`](Self::send); `EINVAL` also when the kernel does not like the virtio header, as some kernels do not like
    /// that of UDP superpackets.
    pub fn send_parts(&self, parts: &[IoSlice<'_>]) -> io::Result<()> {
        (&self.file).write_vectored(parts).map(drop)
    }

    /// Sets what the device hands over: it belongs to the device and not to the queue.
    ///
    /// Only for a queue with virtio headers; they stay, also with [`TunOffload::None`].
    ///
    /// # Errors
    /// `EINVAL`: the kernel does not know one of the kinds, and nothing has changed.
    pub fn set_offload(&self, offload: TunOffload) -> io::Result<()> {
        // With TSO_ECN the kernel leaves segments that carry CWR in one piece too.
        let tcp = libc::TUN_F_CSUM | libc::TUN_F_TSO4 | libc::TUN_F_TSO6 | libc::TUN_F_TSO_ECN;
        let flags = match offload {
            TunOffload::None => 0,
            TunOffload::Tcp => tcp,
            TunOffload::TcpUdp => tcp | libc::TUN_F_USO4 | libc::TUN_F_USO6,
        };
        // SAFETY: TUNSETOFFLOAD takes its argument by value and touches no memory of this process.
        let result = unsafe {
            libc::ioctl(
                self.file.as_raw_fd(),
                libc::TUNSETOFFLOAD as _,
                libc::c_ulong::from(flags),
            )
        };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

impl Tun {
    /// The device whose queues these are, which another process has opened: they hold what has come meanwhile. Those of a device
    /// that is gone are closed, if there are others.
    ///
    /// # Errors
    /// `EBADFD`: the device is gone. `InvalidInput`: not the queues of one TUN device as they are made here.
    pub fn adopt(queues: Vec<OwnedFd>) -> io::Result<Self> {
        let mut device: Option<Self> = None;
        let mut gone = None;
        for queue in queues {
            let (name, flags) = match interface_of(&queue) {
                Err(error) if error.raw_os_error() == Some(libc::EBADFD) => {
                    gone = Some(error);
                    continue;
                }
                found => found?,
            };
            let is = |flag| flags & flag != 0;
            if !is(libc::IFF_TUN) || !is(libc::IFF_NO_PI) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a TUN device's queue"));
            }
            let device = device.get_or_insert_with(|| Self {
                name: name.clone(),
                queues: Vec::new(),
                multi_queue: is(libc::IFF_MULTI_QUEUE),
            });
            if device.name != name {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "queues of several devices"));
            }
            device.queues.push(Arc::new(TunQueue {
                file: File::from(queue),
                headers: is(libc::IFF_VNET_HDR),
            }));
        }
        let none = || gone.unwrap_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "no queue"));
        device.ok_or_else(none)
    }

    /// Whether virtio headers stand in front of its packets.
    pub fn has_headers(&self) -> bool {
        self.queues.iter().any(|queue| queue.has_headers())
    }

    /// Adds a queue, which the kernel gives its part of the flows at once.
    ///
    /// # Errors
    /// As [`open_multi_queue`]; `EINVAL` from a device that may have one only.
    pub fn add_queue(&mut self) -> io::Result<()> {
        let headers = if self.has_headers() { libc::IFF_VNET_HDR } else { 0 };
        let (_, queue) = attach(&self.name, libc::IFF_MULTI_QUEUE | headers)?;
        self.queues.push(Arc::new(queue));
        Ok(())
    }

    /// Switches on the most offload that the kernel has; which that is. `None`: not even the least, so that the virtio headers
    /// are of no use.
    pub fn set_most_offload(&self) -> Option<TunOffload> {
        // After the last queue was attached: attaching may reset it.
        let first = self.queues.first()?;
        [TunOffload::TcpUdp, TunOffload::Tcp]
            .into_iter()
            .find(|offload| first.set_offload(*offload).is_ok())
    }
}

/// For tests: anything that keeps packets apart.
#[cfg(test)]
impl From<File> for TunQueue {
    fn from(file: File) -> Self {
        Self { file, headers: false }
    }
}

impl AsRawFd for TunQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for TunQueue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// Makes a TUN device with `queues` queues; no packet information header.
///
/// `pattern` is a name or, with `%d`, the kernel's choice of the first free number (`flannel%d`).
///
/// # Errors
/// `EINVAL` from a kernel without multi-queue (before Linux 3.8); `ENOENT` without the `tun` module; `EPERM` without
/// `CAP_NET_ADMIN`; `EBUSY` when a device of that name exists.
pub fn open_multi_queue(pattern: &str, queues: usize) -> io::Result<Tun> {
    open_queues(pattern, queues, libc::IFF_MULTI_QUEUE)
}

/// Makes a TUN device like [`open_multi_queue`], with the most offload the kernel has; which that is. Unless it is
/// [`TunOffload::None`], every packet read or written has a virtio header in front ([`crate::offload::virtio`]) and a read
/// brings up to 64 KiB.
///
/// # Errors
/// As [`open_multi_queue`].
pub fn open_offload(pattern: &str, queues: usize) -> io::Result<(Tun, TunOffload)> {
    // EINVAL here is a kernel without virtio headers, or one without multi-queue: the plain way tells which.
    if let Ok(device) = open_queues(pattern, queues, libc::IFF_MULTI_QUEUE | libc::IFF_VNET_HDR)
        && let Some(offload) = device.set_most_offload()
    {
        return Ok((device, offload));
    }
    Ok((open_multi_queue(pattern, queues)?, TunOffload::None))
}

fn open_queues(pattern: &str, queues: usize, flags: libc::c_int) -> io::Result<Tun> {
    // IFF_TUN_EXCL: never become a queue of a device that another process made, which would take part of its traffic.
    let (name, first) = attach(pattern, flags | libc::IFF_TUN_EXCL)?;
    let mut device = Tun {
        name,
        queues: vec![Arc::new(first)],
        multi_queue: true,
    };
    for _ in 1..queues {
        device.add_queue()?;
    }
    Ok(device)
}

/// Makes a TUN device with a single queue through the `tun-tap` crate: the path for kernels that refuse
/// [`open_multi_queue`], and the baseline that it is measured against.
///
/// # Errors
/// As [`open_multi_queue`].
pub fn open_plain(pattern: &str) -> io::Result<Tun> {
    let interface = tun_tap::Iface::without_packet_info(pattern, tun_tap::Mode::Tun)?;
    let name = interface.name().to_owned();
    // SAFETY: `into_raw_fd` gives up the crate's ownership of a descriptor that it has just opened, so that this is the
    // only owner.
    let descriptor = unsafe { OwnedFd::from_raw_fd(interface.into_raw_fd()) };
    // The crate opens neither non-blocking nor close-on-exec.
    // SAFETY: plain fcntl calls with integer arguments on a descriptor that lives through both.
    let set = unsafe {
        libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFL, libc::O_NONBLOCK) == 0
            && libc::fcntl(descriptor.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) == 0
    };
    if !set {
        return Err(io::Error::last_os_error());
    }
    Ok(Tun {
        name,
        queues: vec![Arc::new(TunQueue {
            file: File::from(descriptor),
            headers: false,
        })],
        multi_queue: false,
    })
}

/// Opens the clone device and makes it a queue of the device `name`; the device's real name with it.
fn attach(name: &str, flags: libc::c_int) -> io::Result<(String, TunQueue)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CLONE_DEVICE)?;
    let mut request = empty_request();
    // The last byte stays 0: the kernel takes at most IFNAMSIZ - 1 characters.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("interface name {name} is too long"),
        ));
    }
    for (slot, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *slot = byte as libc::c_char;
    }
    // All flags lie in the low 16 bits (IFF_TUN_EXCL is 0x8000, the sign bit), so that the cast loses nothing.
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI | flags) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes one `ifreq`, which lives here through the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let queue = TunQueue {
        file,
        headers: flags & libc::IFF_VNET_HDR != 0,
    };
    Ok((name_in(&request), queue))
}

/// The name and the flags of the device that this is a queue of.
fn interface_of(queue: &OwnedFd) -> io::Result<(String, libc::c_int)> {
    let mut request = empty_request();
    // SAFETY: TUNGETIFF writes one `ifreq`, which lives here through the call. Other files do not know the number.
    if unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNGETIFF as _, &mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has set the flags, of which any bits are valid.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    Ok((name_in(&request), libc::c_int::from(flags)))
}

fn empty_request() -> libc::ifreq {
    // SAFETY: `ifreq` is plain data, for which all zeros is a valid value.
    unsafe { std::mem::zeroed() }
}

/// What the kernel has answered.
fn name_in(request: &libc::ifreq) -> String {
    // SAFETY: the kernel has written a name that ends with 0 inside the array.
    let name = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    name.to_string_lossy().into_owned()
}
