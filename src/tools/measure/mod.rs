//! Measuring other programs from outside: when a process first says something, says a certain thing, and ends; what the
//! host was like meanwhile.

mod command;
mod host;
mod process;
mod progress;
mod stats;
mod table;

pub(crate) use command::{call, call_command, first_line, last_lines};
pub use command::{find_program, shown};
pub use host::HostFacts;
pub(crate) use process::note_status;
pub use process::{Run, Watch, run};
pub use progress::Progress;
pub use stats::Summary;
pub(crate) use table::{Output, TimesRow, read_report, write_times};
