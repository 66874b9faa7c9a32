//! A limit to the memory of a process and of what the kernel holds for it: a control group of its own.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

/// Where version 1 has its memory controller, and where version 2 has all (cgroups(7)).
const V1: &str = "/sys/fs/cgroup/memory";
const V2: &str = "/sys/fs/cgroup";

/// Goes when it is dropped; its processes must have ended by then.
pub(crate) struct MemoryLimit {
    group: PathBuf,
    version: u8,
}

impl MemoryLimit {
    /// A group whose processes may have so many bytes together.
    ///
    /// # Errors
    /// Where this machine has no groups, or does not let us make any.
    pub(crate) fn new(name: &str, bytes: usize) -> io::Result<MemoryLimit> {
        let (version, parent, file) = if Path::new(V1).is_dir() {
            (1, own_group(":memory:", V1)?, "memory.limit_in_bytes")
        } else {
            // At the top: a group that has processes hands no memory on to those in it.
            (2, PathBuf::from(V2), "memory.max")
        };
        let limit = MemoryLimit {
            group: parent.join(format!("flannel-{name}-{}", std::process::id())),
            version,
        };
        fs::create_dir(&limit.group)?;
        fs::write(limit.group.join(file), bytes.to_string())?;
        Ok(limit)
    }

    /// The program, with its arguments, that joins the group and becomes another one.
    pub(crate) fn runner(&self) -> [String; 4] {
        let join = format!(r#"echo $$ > {}/cgroup.procs && exec "$@""#, self.group.display());
        ["sh", "-c", &join, "sh"].map(str::to_owned)
    }

    /// The most that the group has had at once, in bytes; `None` where the kernel does not tell.
    pub(crate) fn peak(&self) -> Option<u64> {
        let file = if self.version == 1 {
            "memory.max_usage_in_bytes"
        } else {
            "memory.peak"
        };
        fs::read_to_string(self.group.join(file)).ok()?.trim().parse().ok()
    }

    /// How many of its processes the kernel has killed for want of memory.
    pub(crate) fn killed(&self) -> u64 {
        let file = if self.version == 1 {
            "memory.oom_control"
        } else {
            "memory.events"
        };
        let text = fs::read_to_string(self.group.join(file)).unwrap();
        let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.unwrap_or_else(|| panic!("{text}")).parse().unwrap()
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        // What is left of it is empty and does no harm.
        let _ = fs::remove_dir(&self.group);
    }
}

/// The directory of this process's own group.
fn own_group(controller: &str, root: &str) -> io::Result<PathBuf> {
    let groups = fs::read_to_string("/proc/self/cgroup")?;
    let own = groups.lines().find_map(|line| Some(line.split_once(controller)?.1));
    let own = own.ok_or_else(|| io::Error::other(groups.clone()))?;
    Ok(PathBuf::from(format!("{root}{own}")))
}
