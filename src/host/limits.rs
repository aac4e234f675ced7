//! How much memory and disk this host lets a process have.

use std::fs;
use std::path::Path;

use procfs::{Current, Meminfo};

/// Memory in bytes that is available to programs; `None` without /proc.
pub fn available_memory() -> Option<u64> {
    Meminfo::current().ok()?.mem_available
}

/// Bytes that this user may still write to the file system of `dir`; `None` if it does not say.
pub fn free_bytes(dir: &Path) -> Option<u64> {
    let stat = rustix::fs::statvfs(dir).ok()?;
    // Some that are somewhere else have no size.
    (stat.f_blocks > 0).then(|| stat.f_bavail.saturating_mul(stat.f_frsize))
}

/// The memory limit of this process's own cgroup, in bytes. Limits of parent cgroups are not read.
pub fn cgroup_memory() -> Option<u64> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    cgroup_limit(&read("/proc/self/cgroup"), read)
}

/// cgroup-v2.rst "memory.max"; v1 memory.rst
fn cgroup_limit(cgroups: &str, read: impl Fn(&str) -> String) -> Option<u64> {
    cgroups.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let file = if controllers.is_empty() {
            format!("/sys/fs/cgroup{path}/memory.max")
        } else if controllers.split(',').any(|name| name == "memory") {
            format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")
        } else {
            return None;
        };
        // "max", and in version 1 a number next to 2^63, mean that there is none.
        read(&file)
            .trim()
            .parse()
            .ok()
            .filter(|bytes| *bytes < 1 << 60)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_of_both_versions() {
        let read = |path: &str| match path {
            "/sys/fs/cgroup/a/memory.max" => "1048576\n".to_owned(),
            "/sys/fs/cgroup/memory/b/memory.limit_in_bytes" => "9223372036854771712\n".to_owned(),
            _ => String::new(),
        };
        assert_eq!(cgroup_limit("0::/a\n", read), Some(1 << 20));
        assert_eq!(cgroup_limit("4:memory:/b\n3:cpu:/\n", read), None);
        assert_eq!(cgroup_limit("4:memory:/b\n0::/a\n", read), Some(1 << 20));
    }
}
