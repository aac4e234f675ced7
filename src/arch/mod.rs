//! Architecture-specific parts.

pub mod x86_64;
