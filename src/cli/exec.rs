//! `exec`: another program in a VM that runs an image.

use std::io::{self, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use clap::Args;
use minivmm_devices::chardev::{ConsoleDevice, ConsoleOutput};
use minivmm_devices::thread::ThreadStarter;
use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};
use vmm_sys_util::eventfd::EventFd;

use super::exit_status::of_signal;
use super::program::{ProgramArgs, given};
use super::run::RunError;
use super::running::find;
use crate::config::ConsoleTarget;
use crate::console::{Console, ConsoleInput, FrameSink, InputOutcome, RawTerminal, Signals};
use crate::guest::Exec;
use crate::vmm::error::host;
use crate::vmm::event_loop::EventLoop;

/// How long the guest may take until it listens: its drivers may be on their way.
const PATIENCE: Duration = Duration::from_secs(10);
/// Bytes that are read at once.
const CHUNK: usize = 64 << 10;

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
#[command(override_usage = "minivmm exec [OPTIONS] NAME COMMAND...")]
pub struct ExecArgs {
    /// Streams and environment.
    #[command(flatten)]
    program: ProgramArgs,
    /// Work directory [default: that of the image's program]
    #[arg(short, long, value_name = "DIR")]
    workdir: Option<String>,
    /// Run the program as this user [default: as the image's program]
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,
    /// Name of the VM, as minivmm ps lists it, and the program with its arguments
    #[arg(value_names = ["NAME", "COMMAND"], num_args = 2.., required = true, trailing_var_arg = true)]
    words: Vec<String>,
}

/// What the event loop waits for.
#[derive(Clone, Copy)]
enum Source {
    Streams,
    Signal,
    /// Nobody reads stdout any more.
    ReaderGone,
}

/// Runs a program; its exit status.
pub fn run(args: ExecArgs) -> Result<u8, RunError> {
    let program = args.program;
    program.check_terminal()?;
    let mut words = args.words.into_iter();
    let vm = find(&words.next().unwrap_or_default())?;
    let mut environment: Vec<String> = program.term().into_iter().collect();
    program.set_variables(&mut environment);
    let exec = Exec {
        command: words.collect(),
        environment,
        user: given(args.user),
        directory: given(args.workdir),
        terminal: program.tty,
        signal: None,
    };
    let signals = Signals::block().map_err(host("signal handling"))?;
    let guest = vm.start(&exec, PATIENCE).map_err(|e| match e.kind() {
        io::ErrorKind::ArgumentListTooLong => RunError::Usage(e.to_string()),
        _ => host("the VM's socket")(e).into(),
    })?;

    let threads = ThreadStarter::default();
    let (stdout, _) = Console::open(&ConsoleTarget::Stdio, &threads)?;
    let stderr = Console::stderr(&threads)?;
    let (input, credit) = ConsoleInput::framed(program.interactive).map_err(host("an eventfd"))?;
    let terminal = match program.tty && program.interactive {
        true => RawTerminal::enter().map_err(host("the terminal"))?,
        false => None,
    };
    let room = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC);
    let room = Arc::new(room.map_err(host("an eventfd"))?);
    for console in [&stdout, &stderr] {
        let room = Arc::clone(&room);
        // It is refused only when the counter is full; then its reader is awake.
        console.on_output_ready(Arc::new(move || drop(room.write(1))));
    }
    stdout.tell_of_lost_reader(credit.reader_gone());
    let session = Session {
        reader: guest.try_clone().map_err(host("the VM's socket"))?,
        device: Mutex::new(Guest(guest)),
        sink: FrameSink::new(stdout.sink(), stderr.sink(), credit),
        pending: Vec::new(),
        room,
        input,
        terminal: program.tty,
    };
    let result = session.run(&signals);
    let give_up = || signals.stop_requested().is_some();
    for console in [&stdout, &stderr] {
        console.finish(&give_up);
    }
    drop(terminal);
    result
}

/// The program's streams.
struct Session {
    reader: UnixStream,
    device: Mutex<Guest>,
    sink: FrameSink,
    /// Read, and not taken by stdout or stderr yet.
    pending: Vec<u8>,
    /// An event when they can take more.
    room: Arc<EventFd>,
    input: ConsoleInput,
    terminal: bool,
}

impl Session {
    /// Serves the streams until the program has ended.
    fn run(mut self, signals: &Signals) -> Result<u8, RunError> {
        let events = self.sources(signals).map_err(host("the event loop"))?;
        self.resize();
        loop {
            if let Some(status) = self.copy_output().map_err(host("the VM's socket"))? {
                return Ok(status);
            }
            if self.input.pump(&self.device) == InputOutcome::Quit {
                return Ok(of_signal(libc::SIGINT));
            }
            for source in events.wait(None).map_err(host("the event loop"))? {
                match source {
                    Source::Streams => {}
                    Source::ReaderGone => return Ok(of_signal(libc::SIGPIPE)),
                    Source::Signal => {
                        if let Some(signal) = signals.stop_requested()
                            && !self.input.forward_signal(signal)
                        {
                            return Ok(of_signal(signal));
                        }
                        // It may have been a SIGWINCH.
                        self.resize();
                    }
                }
            }
        }
    }

    fn sources(&self, signals: &Signals) -> io::Result<EventLoop<Source>> {
        let mut events = EventLoop::new()?;
        events.add(signals, false, Source::Signal)?;
        events.add(&self.reader, true, Source::Streams)?;
        events.add(&*self.room, true, Source::Streams)?;
        if let Some(credit) = self.input.credit() {
            events.add(&**credit.reader_gone(), true, Source::ReaderGone)?;
        }
        self.input.add_to(&mut events, Source::Streams)?;
        Ok(events)
    }

    /// Passes on what has come, as far as stdout and stderr take it; the status, if the program has ended.
    fn copy_output(&mut self) -> io::Result<Option<u8>> {
        loop {
            while !self.pending.is_empty() {
                match self.sink.write(&self.pending) {
                    0 => {
                        self.sink.call_back();
                        return Ok(None);
                    }
                    count => drop(self.pending.drain(..count)),
                }
            }
            if let Some(status) = self.sink.status() {
                return Ok(Some(status));
            }
            self.pending.resize(CHUNK, 0);
            let read = recv(&self.reader, &mut self.pending[..], RecvFlags::DONTWAIT);
            self.pending.truncate(read.map_or(0, |(count, _)| count));
            match read {
                Ok((0, _)) => return Err(io::Error::other("the VM has ended")),
                Ok(_) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
    }

    fn resize(&mut self) {
        if self.terminal {
            self.input.send_size();
        }
    }
}

/// The program's input.
struct Guest(UnixStream);

impl ConsoleDevice for Guest {
    fn rx_space(&mut self) -> usize {
        CHUNK
    }

    fn receive(&mut self, bytes: &[u8]) -> usize {
        // A guest that is gone, or takes nothing for so long, shows when it is read from.
        if self.0.write_all(bytes).is_err() {
            let _ = self.0.shutdown(Shutdown::Both);
        }
        bytes.len()
    }

    fn send_break(&mut self) -> bool {
        true
    }

    fn on_tx_space(&mut self) {}
}
