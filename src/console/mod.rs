//! Where the guest's console goes on the host: terminal, pty, file or nowhere.
//!
//! [`Console`] is the output: a [sink](Console::sink) for its device, a bounded buffer, and a thread that drains it and
//! shows it to an [observer](OutputObserver). [`ConsoleInput`] is the input, driven by the event loop. [`RawTerminal`] keeps the
//! terminal raw while the VM runs.
//!
//! Flow control works in both directions: a slow reader makes the guest wait, and input waits in its pipe or terminal
//! until the guest has room. Buffers are bounded, and lost output is counted.

mod destination;
mod escape;
mod frames;
mod input;
mod output;
mod pty;
mod signals;
mod terminal;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;

use minivmm_devices::chardev::ConsoleOutput;
use minivmm_devices::thread::ThreadStarter;
use thiserror::Error;
use vmm_sys_util::eventfd::EventFd;

pub use frames::{Credit, FrameSink};
pub use input::{ConsoleInput, InputOutcome, MAX_FORWARDED};
pub use signals::Signals;
pub use terminal::{
    RawTerminal, is_raw, lend_terminal, raise_by_default, reenter_raw, restore_terminal,
};

use crate::config::ConsoleTarget;
use destination::Destination;
pub use output::{OUTPUT_MEMORY_BOUND, OutputObserver};
use output::{Shared, Sink};

/// Why the console cannot be opened.
#[derive(Debug, Error)]
pub enum ConsoleError {
    /// The file for the output cannot be created.
    #[error("cannot write the console to {0:?}")]
    File(PathBuf, #[source] io::Error),
    /// A pseudo-terminal cannot be opened.
    #[error("cannot open a pseudo-terminal for the console (is /dev/pts mounted?)")]
    Pty(#[source] io::Error),
    /// The output thread cannot be started.
    #[error("cannot start the output of the console")]
    Start(#[source] io::Error),
}

/// The host's side of the console's output. A cheap handle: clones are the same console. It outlives the VM, so
/// that a restart in the same process goes on where it was; when the last handle goes, so does the thread, without
/// waiting for a slow reader ([`Console::finish`] does).
#[derive(Clone)]
pub struct Console(Arc<Handle>);

struct Handle {
    shared: Arc<Shared>,
    pty_path: Option<PathBuf>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.cancel();
    }
}

impl Console {
    /// Opens the console: its output, with a thread, and its input, for the event loop. The terminal is not touched: see
    /// [`RawTerminal::enter`].
    pub fn open(
        mode: &ConsoleTarget,
        threads: &ThreadStarter,
    ) -> Result<(Self, ConsoleInput), ConsoleError> {
        let mut pty_path = None;
        let mut on_terminal = false;
        let (destination, input) = match mode {
            ConsoleTarget::Stdio => {
                // Without a stdout, the output is only remembered.
                let stdout = io::stdout().as_fd().try_clone_to_owned().ok();
                on_terminal = io::stdout().is_terminal();
                let destination =
                    stdout.map(|fd| Destination::Stream(Arc::new(fd), "stdout".to_owned()));
                (destination, ConsoleInput::stdin())
            }
            ConsoleTarget::Pty => {
                let (master, path) = pty::open().map_err(|e| ConsoleError::Pty(e.into()))?;
                let master = Arc::new(master);
                pty_path = Some(path);
                (
                    Some(Destination::Pty(master.clone())),
                    ConsoleInput::pty(master),
                )
            }
            ConsoleTarget::File(path) => {
                let file =
                    create(path).map_err(|source| ConsoleError::File(path.clone(), source))?;
                let destination =
                    Destination::Stream(Arc::new(file.into()), path.display().to_string());
                (Some(destination), ConsoleInput::none())
            }
            ConsoleTarget::None => (None, ConsoleInput::none()),
        };
        Ok((
            Self::start(destination, on_terminal, pty_path, threads)?,
            input,
        ))
    }

    /// Output to stderr.
    pub fn stderr(threads: &ThreadStarter) -> Result<Self, ConsoleError> {
        let stderr = io::stderr().as_fd().try_clone_to_owned().ok();
        let stream = |fd| Destination::Stream(Arc::new(fd), "stderr".to_owned());
        Self::start(stderr.map(stream), false, None, threads)
    }

    fn start(
        destination: Option<Destination>,
        on_terminal: bool,
        pty_path: Option<PathBuf>,
        threads: &ThreadStarter,
    ) -> Result<Self, ConsoleError> {
        let shared =
            Shared::start(destination, on_terminal, threads).map_err(ConsoleError::Start)?;
        Ok(Self(Arc::new(Handle { shared, pty_path })))
    }

    /// A device's end of the console; one for each device of each VM that is started. It never blocks.
    pub fn sink(&self) -> Box<dyn ConsoleOutput> {
        Box::new(Sink(self.0.shared.clone()))
    }

    /// Sets what to call when there is room again after a sink said there was none: the devices' `on_tx_space`. Replaces
    /// the one of the VM before. It is called on the console's thread with no lock held.
    pub fn on_output_ready(&self, callback: Arc<dyn Fn() + Send + Sync>) {
        self.0.shared.set_ready(callback);
    }

    /// Has `event` signalled when what is written finds no reader any more (EPIPE), in place of a warning.
    pub fn tell_of_lost_reader(&self, event: &Arc<EventFd>) {
        self.0.shared.tell_of_lost_reader(Arc::clone(event));
    }

    /// Forgets the output of the VM before; on a terminal, the next begins a line. From here on `observer` is given all that the
    /// guest sends, with `watch_arrivals` as exactly in time as it came.
    pub fn start_of_vm(&self, observer: Box<dyn OutputObserver>, watch_arrivals: bool) {
        self.0.shared.start_of_vm(observer, watch_arrivals);
    }

    /// Gives the observer all that has come, now.
    pub fn observe(&self) {
        self.0.shared.observe();
    }

    /// How many bytes the guest has sent.
    pub fn bytes_out(&self) -> u64 {
        self.0.shared.state().bytes
    }

    /// How many bytes went nowhere, because nobody was attached to the pty, the reader had gone, or there was no
    /// destination. Counted over all VMs of this console.
    pub fn bytes_dropped(&self) -> u64 {
        self.0.shared.state().dropped
    }

    /// The pseudo-terminal to attach to, in mode [`ConsoleTarget::Pty`].
    pub fn pty_path(&self) -> Option<PathBuf> {
        self.0.pty_path.clone()
    }

    /// Writes what is left and ends the output; what comes later is dropped. On a terminal, the shell's prompt will begin a
    /// line.
    ///
    /// It waits as long as the reader takes, however slow, until `give_up` says so; that is asked every 20 ms, and answers
    /// true on a second SIGINT or SIGTERM, say. A pty's reader has to read everything, or it would lose the rest; one that
    /// reads nothing for a second is given up anyway.
    pub fn finish(&self, give_up: &dyn Fn() -> bool) {
        self.0.shared.finish(give_up);
    }
}

/// Creates or empties the file for the output.
fn create(path: &std::path::Path) -> io::Result<File> {
    let file = crate::host::output::open(path)?;
    if file.metadata()?.is_file() {
        file.set_len(0)?;
    }
    Ok(file)
}
