//! Whether a file may be used, with the rights that the calling thread has now (faccessat2(2)).

use std::{ffi::CString, io, os::unix::ffi::OsStrExt, path::Path};

/// What it is to be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reading.
    Read,
    /// Writing.
    Write,
    /// Making files in a directory.
    WriteAndSearch,
}

/// Asks the kernel, which goes by the effective identity and capabilities.
///
/// # Errors
/// `PermissionDenied`: no. `NotFound`, `EROFS` and the like: for another reason. `ENOSYS`: before Linux 5.8.
pub fn may(path: &Path, mode: Mode) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mode = match mode {
        Mode::Read => libc::R_OK,
        Mode::Write => libc::W_OK,
        Mode::WriteAndSearch => libc::W_OK | libc::X_OK,
    };
    // The library's own function would be content with the user's number on kernels without the call.
    // SAFETY: the path ends with 0 and lives through the call, which writes nothing.
    let asked = unsafe {
        libc::syscall(
            libc::SYS_faccessat2,
            libc::AT_FDCWD,
            path.as_ptr(),
            mode,
            libc::AT_EACCESS,
        )
    };
    if asked < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
