//! What this host's kernel has for the sandbox around a VM's threads, and what they are spared of.

use rustix::process::geteuid;

use super::check::Check;
use crate::sandbox;

/// Checks seccomp, Landlock and whose process it is.
pub(super) fn check_sandbox() -> Vec<Check> {
    vec![
        check_seccomp(sandbox::has_seccomp()),
        check_landlock(sandbox::landlock_version()),
        check_user(geteuid().is_root()),
    ]
}

fn check_seccomp(available: bool) -> Check {
    if available {
        Check::ok("seccomp", "filters each thread's system calls")
    } else {
        Check::warn("seccomp", "missing: nothing but KVM contains a guest")
            .hint("use a kernel with CONFIG_SECCOMP_FILTER (Linux 4.14 or later), in a container one whose profile allows seccomp(2)")
    }
}

fn check_landlock(version: Option<u32>) -> Check {
    match version {
        Some(version) => Check::ok(
            "Landlock",
            format!("keeps files from threads (ABI {version})"),
        ),
        None => Check::warn("Landlock", "missing: the sandbox goes without it")
            .hint("boot Linux 5.13 or later with landlock in the list that lsm= gives"),
    }
}

fn check_user(is_root: bool) -> Check {
    if is_root {
        Check::info(
            "privileges",
            "root: a VM's threads give up all capabilities, and stay root",
        )
        .hint("run it as a user in the group that owns /dev/kvm")
    } else {
        Check::ok("privileges", "an ordinary user's")
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Verdict;
    use super::*;

    #[test]
    fn what_is_missing_is_a_warning_with_a_hint() {
        for check in [check_seccomp(false), check_landlock(None)] {
            assert_eq!(check.verdict, Verdict::Warn, "{check:?}");
            assert!(
                check.found.contains("missing") && check.hint.is_some(),
                "{check:?}"
            );
        }
        for check in [
            check_seccomp(true),
            check_landlock(Some(4)),
            check_user(false),
        ] {
            assert_eq!(check.verdict, Verdict::Ok, "{check:?}");
        }
        assert!(check_landlock(Some(4)).found.contains("ABI 4"));
        assert_eq!(check_user(true).verdict, Verdict::Info);
    }
}
