//! The processes of one run, found while it runs: their memory and their namespaces.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::fs;

use crate::measure::private_kib;

/// Namespaces, as /proc/PID/ns calls them.
const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"];

/// What docker's daemon starts for each container; it belongs to no run by descent.
const SHIM: &str = "containerd-shim";

/// What was seen of a run's processes.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Most private memory of all of them together, in KiB.
    pub(super) peak_kib: u64,
    /// Most processes at once.
    pub(super) processes: usize,
    /// Namespaces that some of them do not share with this process.
    pub(super) namespaces: BTreeSet<&'static str>,
    /// Shims that were there before.
    others: HashSet<u32>,
}

impl Seen {
    /// To be made before the run.
    pub(super) fn before() -> Self {
        let table = table();
        let shims = table.iter().filter(|(_, (_, name))| name.starts_with(SHIM));
        Self {
            others: shims.map(|(pid, _)| *pid).collect(),
            ..Self::default()
        }
    }

    /// Looks at the processes that descend from this one, or from a shim that is new.
    pub(super) fn look(&mut self) {
        let table = table();
        let me = std::process::id();
        let is_new_shim = |pid: &u32| {
            table
                .get(pid)
                .is_some_and(|(_, name)| name.starts_with(SHIM))
                && !self.others.contains(pid)
        };
        let belongs = |pid: &u32| {
            let mut at = *pid;
            // As deep as any chain can be.
            for _ in 0..table.len() {
                match table.get(&at) {
                    _ if is_new_shim(&at) => return true,
                    Some((parent, _)) if *parent == me => return true,
                    Some((parent, _)) => at = *parent,
                    None => return false,
                }
            }
            false
        };
        let members: Vec<u32> = table
            .keys()
            .copied()
            .filter(|pid| *pid != me && belongs(pid))
            .collect();
        // One that has just ended has none.
        let kib = members
            .iter()
            .filter_map(|pid| private_kib(*pid).ok())
            .sum();
        self.peak_kib = self.peak_kib.max(kib);
        self.processes = self.processes.max(members.len());
        for kind in NAMESPACES {
            let namespace = |pid: &str| fs::read_link(format!("/proc/{pid}/ns/{kind}")).ok();
            let own = namespace("self");
            let other = |pid: &u32| namespace(&pid.to_string()).is_some_and(|it| Some(it) != own);
            if own.is_some() && !self.namespaces.contains(kind) && members.iter().any(other) {
                self.namespaces.insert(kind);
            }
        }
    }
}

/// The private memory of the processes of these names, in KiB: daemons that serve every run.
pub(super) fn daemons_kib(names: &[&str]) -> u64 {
    let table = table();
    let daemons = table
        .iter()
        .filter(|(_, (_, name))| names.contains(&name.as_str()));
    daemons.filter_map(|(pid, _)| private_kib(*pid).ok()).sum()
}

/// Every process: its parent and its name.
fn table() -> HashMap<u32, (u32, String)> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            Some((pid, parse(&stat)?))
        })
        .collect()
}

/// proc_pid_stat(5): `PID (NAME) STATE PARENT ...`, and a name may have anything in it.
fn parse(stat: &str) -> Option<(u32, String)> {
    let (start, rest) = stat.rsplit_once(')')?;
    let (_, name) = start.split_once('(')?;
    let parent = rest.split_whitespace().nth(1)?.parse().ok()?;
    Some((parent, name.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_and_its_child_are_seen() {
        assert_eq!(parse("7 (a) b) S 5 7 7 0"), Some((5, "a) b".into())));
        assert_eq!(parse("7 (a"), None);
        let mut seen = Seen::before();
        let mut child = Command::new("sh")
            .args(["-c", "sleep 1000 & echo; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = [0];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        seen.look();
        // Other tests may have children meanwhile.
        assert!(seen.processes >= 2, "{seen:?}");
        assert!(seen.peak_kib > 0);
        let table = table();
        let sleeper = table.iter().find(|(_, (parent, _))| *parent == child.id());
        let kill = format!("kill {}", sleeper.unwrap().0);
        let status = Command::new("sh").args(["-c", &kill]).status();
        assert!(status.unwrap().success());
        child.wait().unwrap();
        assert!(daemons_kib(&["no such daemon"]) == 0);
    }
}
