//! A minimal KVM virtual machine monitor for Linux guests on x86-64.
//!
//! [`vmm::vm::run`] builds and runs the VM that a [`config::VmConfig`] describes; everything else serves it.

pub mod acpi;
pub mod arch;
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod host;
pub mod messages;
pub mod observe;
pub mod process;
#[cfg(test)]
#[path = "../tests/common/skip.rs"]
mod skip;
pub mod tools;
pub mod vmm;

/// An error and its causes on one line, whatever is in them. A cause that the message ends with already, as some libraries make it, is not
/// repeated.
pub fn error_chain(error: &dyn std::error::Error) -> String {
    let mut chain = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        if !chain.ends_with(&text) {
            chain.push_str(": ");
            chain.push_str(&text);
        }
        cause = error.source();
    }
    messages::escaped(&chain).into_owned()
}
