//! The guest's part of `minivmm run`: minivmm itself as the first process of a VM, which mounts an image and runs its program.
//!
//! The host puts the binary, [`Setup`] and kernel modules into an initramfs. A VM that is to be a template has its [`Orders`] later. Streams, signals and sizes of the terminal go through
//! hvc0 in [frames]; the exit status goes through the exit port. Other programs that the host runs there have a connection of the
//! socket device each.

mod children;
mod exec;
mod failure;
pub mod frames;
mod init;
mod modules;
mod network;
mod orders;
mod port;
mod process;
mod streams;
mod template;
mod users;

pub use init::main;
pub use orders::{EXEC_PORT, Exec, INIT, MODULES, Network, Orders, SETUP, Setup};
pub use template::TEMPLATE_MARK;
