//! How much this host lets a process have: memory, huge pages, file descriptors.

use std::fs;

use rustix::process::{Resource, getrlimit};

use super::check::Check;
use crate::boot::MIB;
use crate::host::limits::{available_memory, cgroup_memory};

/// Less free memory than this gets a warning: the default VM and something to spare.
const LITTLE_MEMORY: u64 = 256 * MIB;
/// Fewer descriptors than this get a warning: a VM takes a few for each device and vCPU.
const FEW_FILES: u64 = 256;

/// Checks memory, huge pages and resource limits.
pub(super) fn check_limits() -> Vec<Check> {
    let huge_pages = fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    let limit = |resource| getrlimit(resource).current;
    let checks = [
        available_memory().map(|bytes| {
            let hint = "end other programs or give the guest little memory";
            check_memory("free memory", bytes, hint)
        }),
        cgroup_memory().map(|bytes| {
            let hint = "raise the limit of this container or service";
            check_memory("cgroup memory limit", bytes, hint)
        }),
        check_huge_pages(&huge_pages.unwrap_or_default()),
        Some(check_files(limit(Resource::Nofile))),
        Some(Check::info(
            "locked memory",
            amount(limit(Resource::Memlock)),
        )),
        Some(check_address_space(limit(Resource::As))),
    ];
    checks.into_iter().flatten().collect()
}

fn check_memory(subject: &str, bytes: u64, hint: &str) -> Check {
    let found = format!("{} MiB", bytes / MIB);
    if bytes < LITTLE_MEMORY {
        Check::warn(subject, found).hint(hint)
    } else {
        Check::ok(subject, found)
    }
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

fn check_files(limit: Option<u64>) -> Check {
    let found = limit.map_or("no limit".to_owned(), |files| format!("{files} at most"));
    match limit {
        Some(..FEW_FILES) => Check::warn("open files", found).hint("ulimit -n 1024"),
        _ => Check::ok("open files", found),
    }
}

fn check_address_space(limit: Option<u64>) -> Check {
    let found = amount(limit);
    match limit {
        Some(_) => Check::warn("address space", found + ": the guest's memory counts")
            .hint("ulimit -v unlimited"),
        None => Check::ok("address space", found),
    }
}

fn amount(limit: Option<u64>) -> String {
    limit.map_or("no limit".to_owned(), |bytes| {
        format!("{} MiB at most", bytes / MIB)
    })
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;

    #[test]
    fn little_memory_and_few_files_get_a_warning() {
        let check = check_memory("free memory", 100 * MIB, "end other programs");
        assert_eq!((check.verdict, &*check.found), (Verdict::Warn, "100 MiB"));
        let check = check_memory("free memory", 512 * MIB, "");
        assert_eq!(check, Check::ok("free memory", "512 MiB"));
        assert_eq!(check_files(Some(64)).verdict, Verdict::Warn);
        assert_eq!(check_files(Some(1024)).verdict, Verdict::Ok);
        assert_eq!(check_address_space(None).found, "no limit");
        let check = check_address_space(Some(8 * MIB));
        assert_eq!(check.found, "8 MiB at most: the guest's memory counts");
    }

    #[test]
    fn huge_pages() {
        for (enabled, verdict) in [
            ("always [madvise] never", Verdict::Ok),
            ("always madvise [never]", Verdict::Info),
        ] {
            let check = check_huge_pages(enabled).unwrap();
            assert_eq!(check.verdict, verdict, "{enabled}");
        }
    }
}
