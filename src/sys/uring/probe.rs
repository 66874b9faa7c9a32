//! Whether io_uring is there, and why not.

use std::{
    fs, io,
    os::unix::net::UnixDatagram,
    time::{Duration, Instant},
};

use io_uring::{Probe, opcode};

use super::{Ring, Targets, Writer, set_up};

/// 0: everybody may use io_uring, 1: the privileged, 2: nobody (Documentation/admin-guide/sysctl/kernel.rst).
const SWITCH: &str = "/proc/sys/kernel/io_uring_disabled";

/// A message between two sockets of one process takes microseconds; on a machine that is so busy that it takes this long, the
/// other way will do.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why there is no io_uring.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// `ENOSYS`.
    #[error("this kernel is built without it, or a container's seccomp filter hides it")]
    Absent,
    /// `EPERM`, and the switch is on.
    #[error(
        "the sysctl kernel.io_uring_disabled is {0}; with 1 it takes CAP_SYS_ADMIN, which only --sandbox=off keeps"
    )]
    SwitchedOff(String),
    /// `EPERM` without that.
    #[error("a security policy, such as a container's seccomp filter, forbids it")]
    Forbidden,
    /// `EINVAL`, or requests that are not there.
    #[error("this kernel has only part of it: Linux 6.7 is needed")]
    Old,
    /// Anything else that the kernel says.
    #[error("{0}")]
    Failed(#[from] io::Error),
    /// What is sent does not arrive.
    #[error("a message that is sent through it does not arrive")]
    Silent,
}

/// Whether a [`Ring`] and a [`Writer`] work here: makes both, and sends a message through them.
///
/// # Errors
/// Why not.
pub fn probe() -> Result<(), Refused> {
    let uring = set_up(1, 2).map_err(why)?;
    let mut known = Probe::new();
    uring.submitter().register_probe(&mut known).map_err(why)?;
    let needed = [
        opcode::ReadMulti::CODE,
        opcode::RecvMsgMulti::CODE,
        opcode::PollAdd::CODE,
        opcode::Writev::CODE,
    ];
    if !needed.iter().all(|code| known.is_supported(*code)) {
        return Err(Refused::Old);
    }
    round_trip().map_err(why)?.then_some(()).ok_or(Refused::Silent)
}

/// What an error at the set-up means.
pub(super) fn why(error: io::Error) -> Refused {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => Refused::Absent,
        Some(libc::EPERM | libc::EACCES) => match fs::read_to_string(SWITCH) {
            Ok(value) if value.trim() != "0" => Refused::SwitchedOff(value.trim().to_owned()),
            _ => Refused::Forbidden,
        },
        Some(libc::EINVAL) => Refused::Old,
        _ => Refused::Failed(error),
    }
}

/// Sends a message to each side of a ring; whether both arrive.
fn round_trip() -> io::Result<bool> {
    let (device, far_device) = UnixDatagram::pair()?;
    let (socket, far_socket) = UnixDatagram::pair()?;
    let targets = Targets {
        packets: 1,
        datagrams: 1,
    };
    let mut ring = Ring::new(vec![device], 0, socket, targets)?;
    let mut writer = Writer::new(vec![far_device])?;
    let mut batch = writer.batch();
    batch.add(0, std::iter::once(&b"packet"[..]));
    batch.write().collect::<io::Result<()>>()?;
    far_socket.send(b"datagram")?;
    let (mut packet, mut datagram) = (None, None);
    let begun = Instant::now();
    while (packet.is_none() || datagram.is_none()) && begun.elapsed() < PATIENCE {
        ring.wait(Some(PATIENCE))?;
        let (packets, datagrams) = ring.sources();
        if let Ok((range, _)) = packets.recv() {
            packet = Some(packets.arena()[range] == *b"packet");
        }
        if datagrams.recv(1).is_ok() {
            let range = datagrams.message(0).bytes;
            datagram = Some(datagrams.arena()[range] == *b"datagram");
        }
    }
    Ok(packet == Some(true) && datagram == Some(true))
}
