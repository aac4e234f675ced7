//! What is particular to x86-64: the address map, CPUID, MSRs, boot registers, the MP table.

pub mod cpuid;
pub mod irqchip;
pub mod layout;
pub mod mptable;
pub mod msrs;
pub mod regs;
pub mod sleep;
pub mod vcpu;
