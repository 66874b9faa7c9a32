//! Which of root's rights over other users' files the daemon needs.
//!
//! Root reads and writes its own files by their modes, as everyone does. For those of others it takes capabilities, which are given
//! up where they are of no use: a key that only etcd's user may read is what they are kept for.

use std::{
    io,
    path::{Path, PathBuf},
};

use crate::sys::{
    access::{Mode, may},
    capabilities::{Capabilities, Held},
};

/// Files that the daemon reads and writes, now or later.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Places {
    /// To read: keys, certificates.
    pub read: Vec<PathBuf>,
    /// To make, and to put in the place of others, in their directories.
    pub write: Vec<PathBuf>,
}

/// Both kinds.
const BOTH: [Capabilities; 2] = [Capabilities::DAC_READ_SEARCH, Capabilities::DAC_OVERRIDE];

/// The rights without which one of the places could not be used.
pub(super) fn rights(places: &Places) -> Capabilities {
    let all = BOTH[0] | BOTH[1];
    let Ok(held) = Held::now() else { return all };
    let without = Held {
        effective: held.effective - all,
        ..held
    };
    if without.set().is_err() {
        return all;
    }
    let mut needed = Capabilities::NONE;
    // Whoever puts a new key in the place of one may make it his own.
    if !places.read.is_empty() {
        needed = needed | (held.permitted & Capabilities::DAC_READ_SEARCH);
    }
    for file in &places.write {
        // What is not there yet is made in the first directory above it that is.
        let above = file.ancestors().skip(1).find(|directory| directory.exists());
        let directory = above.filter(|path| *path != Path::new("")).unwrap_or(Path::new("."));
        needed = needed | at(directory, Mode::WriteAndSearch, Capabilities::DAC_OVERRIDE);
        needed = needed | at(file, Mode::Write, Capabilities::DAC_OVERRIDE);
    }
    // What was there before is allowed again.
    if held.set().is_err() {
        return all;
    }
    needed
}

/// `right` if the file is refused without it.
fn at(path: &Path, mode: Mode, right: Capabilities) -> Capabilities {
    match may(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => right,
        // A kernel that cannot tell (before Linux 5.8).
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => right,
        // What is not there, or on a read-only system, no right gives.
        _ => Capabilities::NONE,
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs::{self, Permissions},
        os::unix::fs::{PermissionsExt, chown},
    };

    use super::*;

    /// `nobody`, on all systems that have him.
    const SOMEONE: u32 = 65_534;

    struct Dir(PathBuf);

    impl Dir {
        fn new(name: &str) -> Self {
            let path = std::env::temp_dir().join(format!("flannel-rights-{name}-{}", std::process::id()));
            fs::create_dir(&path).unwrap();
            Self(path)
        }

        /// Someone else's, for himself only.
        fn others(&self, name: &str, directory: bool) -> PathBuf {
            let path = self.0.join(name);
            let mode = if directory {
                fs::create_dir(&path).unwrap();
                0o755
            } else {
                fs::write(&path, "").unwrap();
                0o600
            };
            fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            chown(&path, Some(SOMEONE), Some(SOMEONE)).unwrap();
            path
        }
    }

    impl Drop for Dir {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    fn to_read(path: PathBuf) -> Capabilities {
        rights(&Places {
            read: vec![path],
            write: vec![],
        })
    }

    fn to_write(path: PathBuf) -> Capabilities {
        rights(&Places {
            read: vec![],
            write: vec![path],
        })
    }

    #[test]
    fn roots_own_files_take_no_rights() {
        let dir = Dir::new("own");
        fs::write(dir.0.join("key"), "").unwrap();
        fs::set_permissions(dir.0.join("key"), Permissions::from_mode(0o600)).unwrap();
        for place in ["key", "new", "new/and/deeper"] {
            assert_eq!(to_write(dir.0.join(place)), Capabilities::NONE, "{place}");
        }
    }

    #[test]
    fn someone_elses_take_the_right_to_do_just_that_and_all_are_there_afterwards() {
        let dir = Dir::new("others");
        let before = Held::now().unwrap();
        // Whoever owns it now.
        let right = before.permitted & Capabilities::DAC_READ_SEARCH;
        assert_eq!(to_read(dir.0.join("key")), right);
        let home = dir.others("home", true);
        for place in ["subnet.env", "a/subnet.env"] {
            assert_eq!(to_write(home.join(place)), Capabilities::DAC_OVERRIDE, "{place}");
        }
        assert_eq!(Held::now().unwrap(), before);
    }
}
