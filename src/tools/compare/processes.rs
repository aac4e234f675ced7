//! The processes of a run: their memory and their namespaces, read while it runs.

use std::collections::{BTreeSet, HashMap, HashSet};

use procfs::process::{Process, all_processes};

use crate::host::memory::process_private_bytes;

/// What docker's daemon starts for each container; it belongs to no run by descent.
const SHIM: &str = "containerd-shim";

/// What was seen of a run's processes.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Most private memory of all of them together, in bytes.
    pub(super) peak_bytes: u64,
    /// Most processes at once.
    pub(super) processes: usize,
    /// Namespaces that some of them do not share with this process.
    pub(super) namespaces: BTreeSet<String>,
    /// Shims that ran before.
    others: HashSet<i32>,
}

impl Seen {
    /// To be made before the run.
    pub(super) fn before() -> Self {
        let table = table();
        let shims = table
            .iter()
            .filter(|(_, entry)| entry.name.starts_with(SHIM));
        Self {
            others: shims.map(|(pid, _)| *pid).collect(),
            ..Self::default()
        }
    }

    /// Examines the processes that descend from this one, or from a new shim.
    pub(super) fn look(&mut self) {
        let table = table();
        let me = std::process::id() as i32;
        let belongs = |pid: i32| {
            let mut at = pid;
            // As deep as any chain can be.
            for _ in 0..table.len() {
                let Some(entry) = table.get(&at) else {
                    return false;
                };
                if entry.parent == me || entry.name.starts_with(SHIM) && !self.others.contains(&at)
                {
                    return true;
                }
                at = entry.parent;
            }
            false
        };
        let members: Vec<&Process> = table
            .iter()
            .filter(|(pid, _)| **pid != me && belongs(**pid))
            .map(|(_, entry)| &entry.process)
            .collect();
        self.processes = self.processes.max(members.len());
        self.peak_bytes = self.peak_bytes.max(private(members.iter().copied()));
        let Some(own) = table
            .get(&me)
            .and_then(|entry| entry.process.namespaces().ok())
        else {
            return;
        };
        let others = members.iter().filter_map(|member| member.namespaces().ok());
        for (kind, namespace) in others.flat_map(|namespaces| namespaces.0) {
            // Those for children to come show in the children.
            let name = kind.to_string_lossy();
            if !name.ends_with("_for_children") && own.0.get(&kind) != Some(&namespace) {
                self.namespaces.insert(name.into_owned());
            }
        }
    }
}

/// The private memory of the processes of these names, in bytes: daemons that serve every run.
pub(super) fn daemons_bytes(names: &[&str]) -> u64 {
    let table = table();
    let daemons = table
        .values()
        .filter(|entry| names.contains(&entry.name.as_str()));
    private(daemons.map(|entry| &entry.process))
}

/// One that has just ended has none.
fn private<'a>(processes: impl Iterator<Item = &'a Process>) -> u64 {
    processes
        .filter_map(|process| process_private_bytes(process).ok())
        .sum()
}

struct Entry {
    parent: i32,
    name: String,
    process: Process,
}

/// Every process.
fn table() -> HashMap<i32, Entry> {
    let processes = all_processes().into_iter().flatten().flatten();
    processes
        .filter_map(|process| {
            let stat = process.stat().ok()?;
            Some((
                stat.pid,
                Entry {
                    parent: stat.ppid,
                    name: stat.comm,
                    process,
                },
            ))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_child_and_its_child_are_seen() {
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
        assert!(seen.peak_bytes > 0);
        let table = table();
        let sleeper = table
            .iter()
            .find(|(_, entry)| entry.parent == child.id() as i32);
        let kill = format!("kill {}", sleeper.unwrap().0);
        let status = Command::new("sh").args(["-c", &kill]).status();
        assert!(status.unwrap().success());
        child.wait().unwrap();
        assert!(daemons_bytes(&["no such daemon"]) == 0);
    }
}
