//! Where the guest's serial console goes on the host: terminal, pty, file or nowhere.

mod escape;
mod mode;
mod transcript;

pub use mode::{SerialMode, SerialModeError};
