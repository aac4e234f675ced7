//! How much this host lets a process have: memory, huge pages, file descriptors.

use std::fs;

use super::Check;
use crate::boot::MIB;

/// Less free memory than this is worth a word: the default VM and something to spare.
const LITTLE_MEMORY: u64 = 256 * MIB;
/// Fewer descriptors than this are worth a word: a VM takes a few for each device and vCPU.
const FEW_FILES: u64 = 256;

/// Checks memory, huge pages and resource limits.
pub(super) fn check_limits() -> Vec<Check> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut checks = Vec::new();
    checks.extend(check_memory(
        &read("/proc/meminfo"),
        cgroup_limit(&read("/proc/self/cgroup"), read),
    ));
    checks.extend(check_huge_pages(&read(
        "/sys/kernel/mm/transparent_hugepage/enabled",
    )));
    checks.extend(check_rlimits(&read("/proc/self/limits")));
    checks
}

fn check_memory(meminfo: &str, cgroup_limit: Option<u64>) -> Vec<Check> {
    let available = meminfo.lines().find_map(|line| {
        let kib: u64 = line
            .strip_prefix("MemAvailable:")?
            .trim()
            .strip_suffix("kB")?
            .trim()
            .parse()
            .ok()?;
        kib.checked_mul(1024)
    });
    let line = |subject: &str, bytes: u64, hint: &str| {
        let found = format!("{} MiB", bytes / MIB);
        if bytes < LITTLE_MEMORY {
            Check::warn(subject, found).hint(hint)
        } else {
            Check::ok(subject, found)
        }
    };
    let available = available.map(|bytes| {
        line(
            "free memory",
            bytes,
            "end other programs or give the guest little memory",
        )
    });
    let limit = cgroup_limit.map(|bytes| {
        line(
            "cgroup memory limit",
            bytes,
            "raise the limit of this container or service",
        )
    });
    available.into_iter().chain(limit).collect()
}

/// The memory limit of this process's own cgroup, in bytes (cgroup-v2.rst "memory.max"; v1 memory.rst). Limits further
/// up are not looked at.
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

fn check_huge_pages(enabled: &str) -> Option<Check> {
    let (_, rest) = enabled.split_once('[')?;
    let (mode, _) = rest.split_once(']')?;
    let subject = "transparent huge pages";
    Some(match mode {
        "always" | "madvise" => Check::ok(subject, mode),
        _ => Check::info(subject, format!("{mode}: guests boot slower"))
            .hint("echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"),
    })
}

fn check_rlimits(limits: &str) -> Vec<Check> {
    let soft = |name: &str| {
        let value = limits
            .lines()
            .find_map(|line| line.strip_prefix(name))?
            .split_whitespace()
            .next()?;
        // `None` inside: no limit.
        Some(value.parse::<u64>().ok())
    };
    let mut checks = Vec::new();
    if let Some(files) = soft("Max open files") {
        checks.push(match files {
            Some(files) if files < FEW_FILES => {
                Check::warn("open files", format!("{files} at most")).hint("ulimit -n 1024")
            }
            Some(files) => Check::ok("open files", format!("{files} at most")),
            None => Check::ok("open files", "no limit"),
        });
    }
    if let Some(locked) = soft("Max locked memory") {
        checks.push(Check::info("locked memory", amount(locked)));
    }
    if let Some(space) = soft("Max address space") {
        checks.push(match space {
            Some(_) => Check::warn(
                "address space",
                format!("{}: the guest's memory counts", amount(space)),
            )
            .hint("ulimit -v unlimited"),
            None => Check::ok("address space", "no limit"),
        });
    }
    checks
}

fn amount(limit: Option<u64>) -> String {
    limit.map_or("no limit".to_owned(), |bytes| {
        format!("{} MiB at most", bytes / MIB)
    })
}

#[cfg(test)]
mod tests {
    use super::super::Verdict;
    use super::*;

    #[test]
    fn memory() {
        let checks = check_memory(
            "MemTotal: 1 kB\nMemAvailable:  102400 kB\n",
            Some(512 * MIB),
        );
        assert_eq!(checks[0].found, "100 MiB");
        assert_eq!(checks[0].verdict, Verdict::Warn);
        assert_eq!(checks[1], Check::ok("cgroup memory limit", "512 MiB"));
        assert!(check_memory("", None).is_empty());
    }

    #[test]
    fn cgroups_of_both_versions() {
        let read = |path: &str| match path {
            "/sys/fs/cgroup/a/memory.max" => "1048576\n".to_owned(),
            "/sys/fs/cgroup/memory/b/memory.limit_in_bytes" => "9223372036854771712\n".to_owned(),
            _ => String::new(),
        };
        assert_eq!(cgroup_limit("0::/a\n", read), Some(MIB));
        assert_eq!(cgroup_limit("4:memory:/b\n3:cpu:/\n", read), None);
        assert_eq!(cgroup_limit("4:memory:/b\n0::/a\n", read), Some(MIB));
    }

    #[test]
    fn huge_pages_and_limits() {
        assert_eq!(
            check_huge_pages("always [madvise] never").map(|check| check.verdict),
            Some(Verdict::Ok)
        );
        assert_eq!(
            check_huge_pages("always madvise [never]").map(|check| check.verdict),
            Some(Verdict::Info)
        );
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files  64  1024  files\nMax locked memory  8388608  8388608  bytes\nMax address space  unlimited  unlimited  bytes\n";
        let checks = check_rlimits(limits);
        assert_eq!(checks[0].verdict, Verdict::Warn);
        assert_eq!(checks[1].found, "8 MiB at most");
        assert_eq!(checks[2].found, "no limit");
    }
}
