//! TUN devices: opening queues, reading and writing one IP packet a call.

use std::{
    ffi::CStr,
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::{
        fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd},
        unix::fs::OpenOptionsExt,
    },
};

/// Where the kernel lets processes make TUN devices (Documentation/networking/tuntap.rst).
const CLONE_DEVICE: &str = "/dev/net/tun";

/// One queue of a TUN device in non-blocking mode. The device goes when its last queue is closed.
#[derive(Debug)]
pub struct TunQueue {
    file: File,
}

/// A TUN device with its queues.
#[derive(Debug)]
pub struct Tun {
    /// The interface's name, as the kernel chose it (`flannel0`).
    pub name: String,
    /// At least one.
    pub queues: Vec<TunQueue>,
}

impl TunQueue {
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
}

/// For tests: anything that keeps packets apart.
#[cfg(test)]
impl From<File> for TunQueue {
    fn from(file: File) -> Self {
        Self { file }
    }
}

impl AsRawFd for TunQueue {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

/// Makes a TUN device with `queues` queues, each for one worker; no packet information header.
///
/// `pattern` is a name or, with `%d`, the kernel's choice of the first free number (`flannel%d`).
///
/// # Errors
/// `EINVAL` from a kernel without multi-queue (before Linux 3.8); `ENOENT` without the `tun` module; `EPERM` without
/// `CAP_NET_ADMIN`; `EBUSY` when a device of that name exists.
pub fn open_multi_queue(pattern: &str, queues: usize) -> io::Result<Tun> {
    // IFF_TUN_EXCL: never become a queue of a device that another process made, which would take part of its traffic.
    let (name, first) = attach(pattern, libc::IFF_MULTI_QUEUE | libc::IFF_TUN_EXCL)?;
    let mut device = Tun {
        name,
        queues: vec![first],
    };
    for _ in 1..queues {
        let (_, queue) = attach(&device.name, libc::IFF_MULTI_QUEUE)?;
        device.queues.push(queue);
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
        queues: vec![TunQueue {
            file: File::from(descriptor),
        }],
    })
}

/// Opens the clone device and makes it a queue of the device `name`; the device's real name with it.
fn attach(name: &str, flags: libc::c_int) -> io::Result<(String, TunQueue)> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(CLONE_DEVICE)?;
    // SAFETY: `ifreq` is plain data, for which all zeros is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
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
    // SAFETY: the kernel has written a name that ends with 0 inside the array.
    let actual = unsafe { CStr::from_ptr(request.ifr_name.as_ptr()) };
    Ok((actual.to_string_lossy().into_owned(), TunQueue { file }))
}
