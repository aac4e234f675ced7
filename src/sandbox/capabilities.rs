//! Capabilities: to be given up, thread by thread.

use std::io;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

/// Gives up the calling thread's capabilities but for those in `keep`.
pub(super) fn drop_all_but(keep: CapabilitySet) -> io::Result<()> {
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
