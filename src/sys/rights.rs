//! Descriptors that come from another process: over a Unix socket (`SCM_RIGHTS`, unix(7)), or from the supervisor that has
//! started this one (`LISTEN_FDS`, sd_listen_fds(3)).

use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::atomic::{AtomicBool, Ordering},
};

use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};

/// How many descriptors one message takes (`SCM_MAX_FD`, include/net/scm.h).
pub const MOST: usize = 253;

/// Sends `bytes`, at least one, with copies of `descriptors`, at most [`MOST`] of them; how many bytes were taken. The
/// descriptors go with the first.
///
/// # Errors
/// As `sendmsg(2)`; `WouldBlock` from a socket that does not block or has a time limit.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let raw: Vec<_> = descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control = if raw.is_empty() { &[] } else { &rights[..] };
    let sent = sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    Ok(sent?)
}

/// Receives into `buffer`; how many bytes came, 0 at the end of a stream, and the descriptors that came with them.
///
/// # Errors
/// As `recvmsg(2)`.
pub fn recv(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut control = cmsg_space!([std::os::fd::RawFd; MOST]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut slices,
        Some(&mut control),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let mut descriptors = Vec::new();
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(raw) = part {
            // SAFETY: the kernel has just made these for this process, and nobody else knows of them.
            descriptors.extend(raw.into_iter().map(|raw| unsafe { OwnedFd::from_raw_fd(raw) }));
        }
    }
    Ok((message.bytes, descriptors))
}

/// Whether the other end of a stream is open still, whatever there is to be received from it.
pub fn is_open(stream: BorrowedFd<'_>) -> bool {
    // The end is told without being asked for (poll(2)).
    let mut poll = libc::pollfd {
        fd: stream.as_raw_fd(),
        events: 0,
        revents: 0,
    };
    // SAFETY: one valid pollfd, and its count is 1; with a time of 0 it does not wait.
    unsafe { libc::poll(&mut poll, 1, 0) == 0 }
}

/// The descriptors that this process was started with by a supervisor, each with its name, closed on exec from now on; none
/// if it was started without any, and at the second call.
///
/// # Errors
/// When the supervisor's variables contradict each other or the descriptors are not there.
pub fn inherited() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    if TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let named = sd_notify::listen_fds_with_names()?;
    // SAFETY: the variables are addressed to this process by its id, and say that these descriptors are meant for it; they are
    // open, since the crate has just set a flag on each, and are given an owner this once only.
    Ok(named
        .map(|(raw, name)| (name, unsafe { OwnedFd::from_raw_fd(raw) }))
        .collect())
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::{fd::AsFd, unix::net::UnixStream},
    };

    use super::*;

    #[test]
    fn descriptors_arrive_with_their_bytes_and_work() {
        let (one, other) = UnixStream::pair().unwrap();
        let (mut kept, given) = UnixStream::pair().unwrap();
        assert_eq!(send(one.as_fd(), b"two", &[given.as_fd(), given.as_fd()]).unwrap(), 3);
        assert_eq!(send(one.as_fd(), b"none", &[]).unwrap(), 4);
        drop((one, given));
        let mut buffer = [0; 16];
        let (length, mut descriptors) = recv(other.as_fd(), &mut buffer).unwrap();
        // What came with descriptors is not mixed with what came without.
        assert_eq!((&buffer[..length], descriptors.len()), (&b"two"[..], 2));
        let mut through = UnixStream::from(descriptors.remove(0));
        through.write_all(b"hello").unwrap();
        let mut heard = [0; 5];
        kept.read_exact(&mut heard).unwrap();
        assert_eq!(&heard, b"hello");
        assert_eq!(recv(other.as_fd(), &mut buffer).unwrap().0, 4);
        assert_eq!(recv(other.as_fd(), &mut buffer).unwrap().0, 0);
    }

    #[test]
    fn as_many_descriptors_as_a_message_takes_arrive() {
        let (one, other) = UnixStream::pair().unwrap();
        assert_eq!(send(one.as_fd(), b"x", &[one.as_fd(); MOST]).unwrap(), 1);
        let (_, descriptors) = recv(other.as_fd(), &mut [0; 1]).unwrap();
        assert_eq!(descriptors.len(), MOST);
    }
}
