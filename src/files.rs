//! Files that others read, or a later run: replaced in one step.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process,
};

/// Which step failed, on what.
#[derive(Debug, thiserror::Error)]
#[error("cannot {doing} {}: {reason}", on.display())]
pub(crate) struct ReplaceError {
    doing: &'static str,
    on: PathBuf,
    reason: io::Error,
}

/// Puts a file of these bytes and this mode at `path`, making its directory. A reader sees the old bytes or the new ones, never
/// a part, also after a power failure.
///
/// # Errors
/// Which step failed, on what.
pub(crate) fn replace(path: &Path, bytes: &[u8], mode: u32) -> Result<(), ReplaceError> {
    let failed = |doing: &'static str, on: &Path| {
        let on = on.to_owned();
        move |reason| ReplaceError { doing, on, reason }
    };
    // A bare file name has the empty path as its directory.
    let dir = path
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    fs::create_dir_all(dir).map_err(failed("make the directory", dir))?;

    // In the same directory, since only within a file system a rename replaces in one step. The name has the process
    // in it: another daemon that is given the same file must not write into ours.
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", process::id()));
    let temporary = dir.join(name);
    let written = write(&temporary, bytes, mode).map_err(failed("write", &temporary));
    let renamed = written.and_then(|()| fs::rename(&temporary, path).map_err(failed("replace", path)));
    if renamed.is_err() {
        // It may not even be there, and the first error is the one to tell.
        let _ = fs::remove_file(&temporary);
    }
    renamed?;
    // The rename itself lasts only once the directory is on the disk.
    File::open(dir)
        .and_then(|dir| dir.sync_all())
        .map_err(failed("flush the directory", dir))
}

fn write(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut file = File::create(path)?;
    // Before there is anything in it, and whatever the umask of the daemon is.
    file.set_permissions(Permissions::from_mode(mode))?;
    file.write_all(bytes)?;
    file.sync_all()
}
