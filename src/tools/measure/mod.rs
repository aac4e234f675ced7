//! Measuring other programs from outside: when a process first says something, says a certain thing, and ends; how much
//! memory it holds; what the host was like meanwhile.

mod host;
mod memory;
mod process;
mod progress;
mod stats;

pub use host::HostFacts;
pub use memory::GuestShare;
pub use process::{
    Run, RunError, Watch, die_with_parent, find_program, last_lines, run, shown, status_code,
};
pub use progress::Progress;
pub use stats::Summary;
