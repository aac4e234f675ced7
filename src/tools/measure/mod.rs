//! Measuring other programs from outside: when a process first says something, says a certain thing, and ends; what the
//! host was like meanwhile.

mod host;
mod process;
mod progress;
mod stats;
mod table;

pub use host::HostFacts;
pub use process::{Run, Watch, find_program, run, shown};
pub(crate) use process::{call, first_line, last_lines, note_status};
pub use progress::Progress;
pub use stats::Summary;
pub(crate) use table::{Output, TimesRow, write_times};
