//! What the host is and offers: KVM, its processor, memory figures of its processes.

pub mod cpu;
pub mod kvm;
pub mod memory;
