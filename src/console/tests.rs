//! The host's side against pipes, pseudo-terminals and a UART with a mock driver.

use std::fs::OpenOptions;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use minivmm_devices::bus::BusDevice;
use minivmm_devices::chardev::ConsoleDevice;
use minivmm_devices::interrupt::IrqLine;
use minivmm_devices::platform::serial::Serial;
use rustix::termios::{LocalModes, tcgetattr};

use super::output::CAPACITY;
use super::*;

mod input;
mod output;

const NEVER: &dyn Fn() -> bool = &|| false;

/// Polls for a condition that another thread brings about.
fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    for _ in 0..5000 {
        if condition() {
            return;
        }
        thread::sleep(Duration::from_millis(1));
    }
    panic!("never: {what}");
}

/// A guest with a UART whose driver has opened the port.
struct Guest {
    serial: Arc<Mutex<Serial>>,
    kicks: Arc<AtomicUsize>,
}

impl Guest {
    fn new(console: &Console) -> Self {
        let kicks = Arc::new(AtomicUsize::new(0));
        let count = kicks.clone();
        let kick = Arc::new(move || {
            count.fetch_add(1, Ordering::SeqCst);
        });
        let serial = Arc::new(Mutex::new(Serial::new(
            IrqLine::new(|| Ok(())),
            console.sink(),
            kick,
        )));
        let weak = Arc::downgrade(&serial);
        console.on_output_ready(Arc::new(move || {
            if let Some(serial) = weak.upgrade() {
                serial.lock().unwrap().on_tx_space();
            }
        }));
        Self { serial, kicks }
    }

    fn opened(console: &Console) -> Self {
        let guest = Self::new(console);
        guest.open();
        guest
    }

    fn open(&self) {
        self.out(2, 0x87);
        self.out(1, 1);
        self.out(4, 3);
    }

    fn out(&self, offset: u64, value: u8) {
        self.serial.lock().unwrap().write(offset, &[value]);
    }

    fn inb(&self, offset: u64) -> u8 {
        let mut data = [0];
        self.serial.lock().unwrap().read(offset, &mut data);
        data[0]
    }

    /// Reads what is in the FIFO.
    fn read(&self) -> Vec<u8> {
        std::iter::from_fn(|| (self.inb(5) & 1 != 0).then(|| self.inb(0))).collect()
    }

    /// Sends as a driver does: up to 16 bytes whenever the transmitter is empty.
    fn write(&self, bytes: &[u8]) {
        for burst in bytes.chunks(16) {
            while self.inb(5) & 0x20 == 0 {
                thread::sleep(Duration::from_micros(100));
            }
            burst.iter().for_each(|byte| self.out(0, *byte));
        }
    }

    fn kicked(&self) -> bool {
        self.kicks.swap(0, Ordering::SeqCst) > 0
    }
}

fn to(fd: impl Into<OwnedFd>) -> Console {
    Console::start(
        Some(Destination::Stream(
            Arc::new(fd.into()),
            "a pipe".to_owned(),
        )),
        false,
        None,
        &ThreadStarter::default(),
    )
    .unwrap()
}

fn nowhere() -> Console {
    Console::start(None, false, None, &ThreadStarter::default()).unwrap()
}

fn text(len: u32) -> Vec<u8> {
    (0..len)
        .map(|i| {
            if i % 61 == 0 {
                b'\n'
            } else {
                b' ' + (i % 95) as u8
            }
        })
        .collect()
}

/// Keeps what it is shown, and when that came.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Vec<Piece>>>);

type Piece = (Vec<u8>, Instant);

impl OutputObserver for Recorder {
    fn push(&mut self, bytes: &[u8], came: Instant) {
        self.0.lock().unwrap().push((bytes.to_vec(), came));
    }
}

impl Recorder {
    /// On this console, from here on.
    fn watch(console: &Console, arrivals: bool) -> Self {
        let recorder = Self::default();
        console.start_of_vm(Box::new(recorder.clone()), arrivals);
        recorder
    }

    fn bytes(&self) -> Vec<u8> {
        let pieces = self.0.lock().unwrap();
        pieces.iter().flat_map(|(bytes, _)| bytes.clone()).collect()
    }
}

/// A terminal: the user's end, and the program's end in raw mode.
fn terminal() -> (std::fs::File, OwnedFd, PathBuf) {
    let (master, path) = pty::open().unwrap();
    rustix::io::ioctl_fionbio(&master, false).unwrap();
    (master.into(), attach(&path).into(), path)
}

fn attach(path: &PathBuf) -> std::fs::File {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOCTTY)
        .open(path)
        .unwrap()
}

#[test]
fn a_pty_is_attached_to_and_detached_from_again_and_again() {
    let (console, mut input) =
        Console::open(&ConsoleTarget::Pty, &ThreadStarter::default()).unwrap();
    let path = console.pty_path().unwrap();
    let guest = Guest::opened(&console);
    for round in 0..3 {
        let dropped = console.bytes_dropped();
        let lost = text(300_000);
        guest.write(&lost);
        eventually("nobody's output is dropped", || {
            console.bytes_dropped() == dropped + 300_000
        });
        assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);

        let mut user = attach(&path);
        assert!(
            !tcgetattr(&user)
                .unwrap()
                .local_modes
                .contains(LocalModes::ECHO)
        );
        let line = format!("round {round}\n");
        guest.write(line.as_bytes());
        let mut got = vec![0; line.len()];
        user.read_exact(&mut got).unwrap();
        assert_eq!(got, line.as_bytes());
        user.write_all(b"\x01x typed").unwrap();
        assert_eq!(input::feed(&mut input, &guest, 8), b"\x01x typed");
        drop(user);
        assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);
    }
    assert!(input.fd().is_some());
    console.finish(NEVER);
}

#[test]
fn a_pty_reader_gets_the_last_bytes_however_late_it_reads() {
    let (console, input) = Console::open(&ConsoleTarget::Pty, &ThreadStarter::default()).unwrap();
    let mut user = attach(&console.pty_path().unwrap());
    Guest::opened(&console).write(b"reboot: Power down\r\n");
    let reader = thread::spawn(move || {
        let mut got = Vec::new();
        let mut piece = [0; 5];
        loop {
            // Slow, but it goes on: that is not to be given up.
            thread::sleep(Duration::from_millis(300));
            match user.read(&mut piece) {
                Ok(len) if len > 0 => got.extend_from_slice(&piece[..len]),
                _ => return got,
            }
        }
    });
    console.finish(NEVER);
    drop((console, input));
    assert_eq!(reader.join().unwrap(), b"reboot: Power down\r\n");
}

#[test]
fn a_pty_that_nobody_is_attached_to_is_not_waited_for() {
    let (console, _input) = Console::open(&ConsoleTarget::Pty, &ThreadStarter::default()).unwrap();
    drop(attach(&console.pty_path().unwrap()));
    Guest::opened(&console).write(&text(10_000));
    let start = Instant::now();
    console.finish(NEVER);
    assert!(start.elapsed() < Duration::from_millis(500));
}

#[test]
fn a_pty_reader_that_reads_nothing_is_given_up() {
    let (console, _input) = Console::open(&ConsoleTarget::Pty, &ThreadStarter::default()).unwrap();
    let user = attach(&console.pty_path().unwrap());
    Guest::opened(&console).write(&text(500_000));
    let (done, ended) = mpsc::channel();
    let handle = console.clone();
    thread::spawn(move || {
        handle.finish(NEVER);
        done.send(()).unwrap();
    });
    ended
        .recv_timeout(Duration::from_secs(5))
        .expect("finish must not wait for ever");
    drop(user);
}

#[test]
fn the_last_handle_ends_the_thread() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    let sink = console.sink();
    drop(console.clone());
    drop(console);
    let mut rest = Vec::new();
    // End of file: the thread has closed the pipe, though a sink is still there.
    reader.read_to_end(&mut rest).unwrap();
    assert!(sink.has_room());
}

/// Runs as another process, by [`every_way_out_restores_the_terminal`]; alone, it does nothing.
#[test]
fn way_out() {
    let Ok(way) = std::env::var("MINIVMM_TEST_WAY_OUT") else {
        return;
    };
    crate::cli::process::install_fault_handlers();
    let guard = RawTerminal::enter().unwrap().expect("stdin is a terminal");
    assert!(is_raw());
    assert!(
        !tcgetattr(io::stdin())
            .unwrap()
            .local_modes
            .contains(LocalModes::ECHO)
    );
    println!("it was raw");
    let end_by = |signal: rustix::process::Signal| {
        rustix::process::kill_process(rustix::process::getpid(), signal).unwrap();
        thread::sleep(Duration::from_secs(5));
    };
    match &*way {
        "drop" => drop(guard),
        "exit" => {
            restore_terminal();
            restore_terminal();
            reenter_raw();
            std::process::exit(0);
        }
        "panic" => {
            std::mem::forget(guard);
            panic!("as asked");
        }
        "abort" => std::process::abort(),
        "segv" => end_by(rustix::process::Signal::SEGV),
        "bus" => end_by(rustix::process::Signal::BUS),
        "overflow" => {
            #[allow(unconditional_recursion, reason = "to fault")]
            fn deeper(n: &mut [u64; 512]) -> u64 {
                let mut next = *n;
                deeper(std::hint::black_box(&mut next)) + n[0]
            }
            deeper(&mut [1; 512]);
        }
        other => panic!("unknown way out {other}"),
    }
}

#[test]
fn every_way_out_restores_the_terminal() {
    use std::os::unix::process::ExitStatusExt;
    let (signal, code) = (|s| (Some(s), None), |c| (None, Some(c)));
    for (way, expected) in [
        ("drop", code(0)),
        ("exit", code(0)),
        ("panic", code(125)),
        ("abort", code(125)),
        ("segv", signal(libc::SIGSEGV)),
        ("bus", signal(libc::SIGBUS)),
        ("overflow", code(125)),
    ] {
        let (_user, stdin, path) = terminal();
        // Not raw: as a shell leaves it.
        let mut cooked = tcgetattr(&stdin).unwrap();
        cooked.local_modes |= LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG;
        rustix::termios::tcsetattr(&stdin, rustix::termios::OptionalActions::Now, &cooked).unwrap();
        let before = tcgetattr(&stdin).unwrap();
        let output = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "console::tests::way_out",
                "--nocapture",
                "--test-threads=1",
            ])
            .env("MINIVMM_TEST_WAY_OUT", way)
            .stdin(Stdio::from(stdin))
            .output()
            .unwrap();
        assert!(
            String::from_utf8_lossy(&output.stdout).contains("it was raw"),
            "{way}: {output:?}"
        );
        assert_eq!(
            (output.status.signal(), output.status.code()),
            expected,
            "{way}: {output:?}"
        );
        let after = tcgetattr(attach(&path)).unwrap();
        assert_eq!(
            (after.local_modes, after.input_modes, after.output_modes),
            (before.local_modes, before.input_modes, before.output_modes),
            "{way}"
        );
    }
}
