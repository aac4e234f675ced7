//! What the host is and offers: KVM, its processor, limits, memory figures of its processes, files for output.

pub mod cpu;
#[cfg(target_env = "musl")]
pub mod heap;
pub mod kvm;
pub mod limits;
pub mod memory;
pub mod output;
pub mod ownership;
pub mod passt;
pub mod report_file;
pub mod tap;
pub mod vsock;
