//! A minimal KVM virtual machine monitor for Linux guests on x86-64.
//!
//! [`vm::run`] builds and runs the VM that a [`config::VmConfig`] describes; everything else serves it.

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod device_manager;
pub mod doctor;
pub mod event_loop;
pub mod exit_status;
pub mod interrupts;
pub mod memory;
pub mod post_mortem;
pub mod vcpu;
pub mod vm;
