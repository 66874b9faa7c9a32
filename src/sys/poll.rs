//! Waiting for files, `ppoll(2)`.

use std::{io, os::fd::RawFd, ptr, time::Duration};

/// Waits until one of the files can be read or has an error to tell, or a signal comes, at most for `limit` (`None`: for ever): which of
/// them.
///
/// # Errors
/// When it cannot be waited.
pub fn wait_readable<const N: usize>(files: [RawFd; N], limit: Option<Duration>) -> io::Result<[bool; N]> {
    let mut waited = files.map(|fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    });
    let limit = limit.map(|limit| libc::timespec {
        tv_sec: libc::time_t::try_from(limit.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(limit.subsec_nanos() as i32),
    });
    // SAFETY: the array has as many entries as is said, and the limit, if there is one, lives through the call.
    let done = unsafe {
        libc::ppoll(
            waited.as_mut_ptr(),
            N as libc::nfds_t,
            limit.as_ref().map_or(ptr::null(), ptr::from_ref),
            ptr::null(),
        )
    };
    match io::Error::last_os_error() {
        error if done < 0 && error.kind() != io::ErrorKind::Interrupted => Err(error),
        _ if done < 0 => Ok([false; N]),
        _ => Ok(waited.map(|waited| waited.revents != 0)),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::fd::AsRawFd,
        time::Instant,
    };

    use super::*;

    #[test]
    fn what_can_be_read_or_has_ended_is_told_and_a_limit_is_kept() {
        let (mut one, mut into_one) = io::pipe().unwrap();
        let (two, into_two) = io::pipe().unwrap();
        let files = [one.as_raw_fd(), two.as_raw_fd()];
        assert_eq!(wait_readable(files, Some(Duration::ZERO)).unwrap(), [false, false]);
        into_one.write_all(b"x").unwrap();
        assert_eq!(wait_readable(files, None).unwrap(), [true, false]);
        drop(into_two);
        assert_eq!(wait_readable(files, None).unwrap(), [true, true]);
        one.read_exact(&mut [0]).unwrap();
        let (begun, limit) = (Instant::now(), Duration::from_millis(20));
        assert_eq!(wait_readable([one.as_raw_fd()], Some(limit)).unwrap(), [false]);
        assert!(begun.elapsed() >= limit);
    }
}
