//! The private memory of a process.

use procfs::ProcResult;
use procfs::process::{MemoryMap, Process};

/// Bytes of a mapping that no other process shares: resident or swapped out, in anonymous or file pages. Of a mapping that
/// /proc/PID/smaps tells of (proc_pid_smaps(5)).
pub fn private_bytes(map: &MemoryMap) -> u64 {
    [
        "Private_Clean",
        "Private_Dirty",
        "Private_Hugetlb",
        "SwapPss",
    ]
    .iter()
    .filter_map(|field| map.extension.map.get(*field))
    .sum()
}

/// The private memory of a running process, in bytes.
pub fn process_private_bytes(process: &Process) -> ProcResult<u64> {
    let rollup = process.smaps_rollup()?.memory_map_rollup;
    Ok(rollup.iter().map(private_bytes).sum())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_private_memory() {
        let touched = vec![1u8; 8 << 20];
        let bytes = process_private_bytes(&Process::myself().unwrap()).unwrap();
        assert!(bytes >= 8 << 20, "{bytes}");
        drop(touched);
    }
}
