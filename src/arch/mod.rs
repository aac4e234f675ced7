//! Architecture-specific code. Nothing outside this module names an architecture. docs/architecture.md says what a second one needs.

#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;
