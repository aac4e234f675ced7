//! The virtual machine: built in boot order, run, paused and resumed, ended. [`vm`] shows the whole of it.

mod attach;
pub mod control;
pub mod ending;
pub mod error;
pub mod event_loop;
pub mod machine;
pub mod memory;
pub mod networks;
pub mod outcome;
pub mod prepare;
pub mod snapshot;
pub mod vcpu;
pub mod vm;
pub mod working_set;
