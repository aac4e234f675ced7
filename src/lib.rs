//! A minimal KVM virtual machine monitor for Linux guests on x86-64.

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod console;
pub mod doctor;
