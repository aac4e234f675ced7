//! What is particular to x86-64: the address map, CPUID, MSRs, what a kernel finds in registers and memory when it starts,
//! a vCPU's state.

pub mod boot_params;
pub mod cpuid;
pub mod irqchip;
pub mod layout;
pub mod memory_map;
pub mod mptable;
pub mod msrs;
pub mod pvh;
pub mod regs;
pub mod sleep;
pub mod state;
pub mod vcpu;
