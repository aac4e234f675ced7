//! What a process may beyond what its user may: to be given up, thread by thread.

use std::io;

use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_no_new_privs,
};

/// No program that this process executes gets more rights, as one with the set-user-ID bit would. Filters demand it.
pub(super) fn gain_none() -> io::Result<()> {
    Ok(set_no_new_privs(true)?)
}

/// Gives up the calling thread's capabilities but for those in `keep`.
pub(super) fn drop_capabilities(keep: CapabilitySet) -> io::Result<()> {
    let held = match keep.is_empty() {
        true => keep,
        false => capabilities(None)?.permitted & keep,
    };
    let kept = CapabilitySets {
        effective: held,
        permitted: held,
        inheritable: CapabilitySet::empty(),
    };
    Ok(set_capabilities(None, kept)?)
}

/// No process of the same user can trace this one or read its memory, and it leaves no core dump.
pub(super) fn become_undumpable() -> io::Result<()> {
    Ok(set_dumpable_behavior(DumpableBehavior::NotDumpable)?)
}
