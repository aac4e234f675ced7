//! A minimal KVM virtual machine monitor for Linux guests on x86-64.
//!
//! [`vmm::vm::Vm`] is the VM that a [`config::VmConfig`] describes; [`cli::run`] is what the program does with one. Each module imports
//! only from those below it, as docs/architecture.md draws them.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod guest;
pub mod host;
pub mod image;
pub mod observe;
pub mod run;
pub mod sandbox;
#[cfg(test)]
#[path = "../tests/common/skip.rs"]
mod skip;
mod text;
pub mod tools;
pub mod vmm;

pub use text::{Escaping, error_chain, escaped, printable};
pub(crate) use text::{about, mib, size};

/// The log's target for what the user has to know to go on, which is no warning.
pub const NOTICE: &str = "minivmm::notice";
