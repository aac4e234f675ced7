//! The virtual machine: built in boot order, run, ended.

pub mod event_loop;
pub mod machine;
pub mod memory;
pub mod outcome;
pub mod release;
pub mod vcpu;
pub mod vm;
pub mod watch;
