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
            IrqLine::detached(),
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

#[test]
fn output_arrives_whole_and_is_counted() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    let guest = Guest::opened(&console);
    let seen = Recorder::watch(&console, false);
    guest.write(b"one line\nno newline");
    console.finish(NEVER);
    assert_eq!(seen.bytes(), b"one line\nno newline");
    assert_eq!((console.bytes_out(), console.bytes_dropped()), (19, 0));
    let seen = Recorder::watch(&console, false);
    console.observe();
    assert!(seen.bytes().is_empty() && console.bytes_out() == 0);
    drop(guest);
    drop(console);
    let mut got = Vec::new();
    reader.read_to_end(&mut got).unwrap();
    assert!(got.ends_with(b"one line\nno newline"));
}

#[test]
fn what_nobody_reads_is_observed() {
    let (reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    let guest = Guest::opened(&console);
    let seen = Recorder::watch(&console, false);
    guest.write(&text(200_000));
    console.observe();
    assert_eq!(seen.bytes(), text(200_000));
    // The thread comes to it by itself, too.
    let seen = Recorder::watch(&console, false);
    guest.write(b"line\n");
    eventually("the thread reads what it cannot write", || {
        seen.bytes() == b"line\n"
    });
    drop(reader);
}

#[test]
fn output_is_dated_by_when_it_came() {
    let console = nowhere();
    let seen = Recorder::watch(&console, true);
    // The thread cannot observe meanwhile.
    let observing = seen.0.lock().unwrap();
    let guest = Guest::opened(&console);
    let before = Instant::now();
    guest.write(b"\n");
    let between = Instant::now();
    thread::sleep(Duration::from_millis(1));
    guest.write(b"hello\n");
    let after = Instant::now();
    drop(observing);
    console.observe();
    let pieces = seen.0.lock().unwrap();
    let (first, last) = (pieces[0].1, pieces.last().unwrap().1);
    assert!(before <= first && first <= between);
    assert!(between < last && last <= after);
}

#[test]
fn a_prompt_without_a_newline_does_not_wait() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    Guest::opened(&console).write(b"~ # ");
    let mut got = [0; 4];
    reader.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"~ # ");
}

#[test]
fn a_slow_reader_makes_the_guest_wait_and_loses_nothing() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    let guest = Guest::opened(&console);
    let sent = text(3 << 20);
    let expected = sent.clone();
    let driver = thread::spawn(move || {
        guest.write(&sent);
        guest.serial.lock().unwrap().dropped()
    });
    eventually("the buffer fills", || {
        console.bytes_out() >= (CAPACITY - 64) as u64
    });
    thread::sleep(Duration::from_millis(20));
    assert!(
        console.bytes_out() <= (CAPACITY + (128 << 10)) as u64,
        "bounded"
    );
    let collector = thread::spawn(move || {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        got
    });
    assert_eq!(driver.join().unwrap(), 0);
    console.finish(NEVER);
    drop(console);
    assert!(collector.join().unwrap() == expected);
}

#[test]
fn the_uart_interrupts_when_there_is_room_again() {
    let (mut reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    let guest = Guest::opened(&console);
    while guest.inb(5) & 0x20 != 0 {
        (0..16).for_each(|_| guest.out(0, b'x'));
    }
    guest.out(1, 3);
    assert_eq!(guest.inb(2) & 0xf, 1, "no interrupt while full");
    let drain = thread::spawn(move || {
        let mut got = vec![0; 600 << 10];
        reader.read_exact(&mut got).unwrap();
        reader
    });
    eventually("a transmit interrupt", || guest.inb(2) & 0xf == 2);
    drop(drain.join().unwrap());
}

#[test]
fn a_closed_reader_discards_and_the_guest_goes_on() {
    let (reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    drop(reader);
    let guest = Guest::opened(&console);
    guest.write(&text(2 << 20));
    assert_eq!(console.bytes_out(), 2 << 20);
    console.finish(NEVER);
    assert_eq!(console.bytes_dropped(), 2 << 20);
}

#[test]
fn a_full_disk_discards_and_the_guest_goes_on() {
    let console = to(OpenOptions::new().write(true).open("/dev/full").unwrap());
    let guest = Guest::opened(&console);
    guest.write(&text(100_000));
    console.finish(NEVER);
    assert_eq!(console.bytes_dropped(), 100_000);
}

#[test]
fn finish_can_be_given_up_and_leaves_no_thread() {
    let (reader, writer) = io::pipe().unwrap();
    let console = to(writer);
    let guest = Guest::opened(&console);
    guest.write(&text(200_000));
    let asked = AtomicUsize::new(0);
    let start = Instant::now();
    console.finish(&|| asked.fetch_add(1, Ordering::SeqCst) == 3);
    assert!(asked.load(Ordering::SeqCst) == 4 && start.elapsed() < Duration::from_secs(2));
    // It is not waited for beyond CANCEL_LIMIT, which a busy host needs for itself.
    eventually("the end of the thread", || {
        !console.0.shared.state().is_running()
    });
    assert!(console.bytes_dropped() > 0);
    drop(reader);
}

#[test]
fn a_nonblocking_stdout_loses_nothing() {
    let (mut reader, writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    let console = to(writer);
    let guest = Guest::opened(&console);
    let sent = text(500_000);
    guest.write(&sent);
    let collector = thread::spawn(move || {
        let mut got = Vec::new();
        reader.read_to_end(&mut got).unwrap();
        got
    });
    console.finish(NEVER);
    drop(console);
    drop(guest);
    assert!(collector.join().unwrap() == sent);
}

#[test]
fn a_file_is_emptied_and_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("console.log");
    std::fs::write(&path, "old old old").unwrap();
    let (console, input) = Console::open(
        &ConsoleTarget::File(path.clone()),
        &ThreadStarter::default(),
    )
    .unwrap();
    assert!(input.fd().is_none());
    Guest::opened(&console).write(b"new\n");
    console.finish(NEVER);
    assert_eq!(std::fs::read(&path).unwrap(), b"new\n");
    for bad in [dir.path().to_owned(), dir.path().join("no/such")] {
        let error = Console::open(&ConsoleTarget::File(bad.clone()), &ThreadStarter::default())
            .err()
            .unwrap();
        assert!(
            error.to_string().contains(&*bad.to_string_lossy()),
            "{error}"
        );
    }
}

#[test]
fn none_counts_only() {
    let (console, mut input) =
        Console::open(&ConsoleTarget::None, &ThreadStarter::default()).unwrap();
    let guest = Guest::opened(&console);
    guest.write(b"hello");
    console.finish(NEVER);
    assert_eq!((console.bytes_out(), console.bytes_dropped()), (5, 5));
    assert_eq!(input.pump(&guest.serial), InputOutcome::Ended);
}

/// Feeds the guest as the event loop does, until `len` bytes arrived or nothing moves any more.
fn feed(input: &mut ConsoleInput, guest: &Guest, len: usize) -> Vec<u8> {
    let mut got = Vec::new();
    let mut idle = 0;
    while got.len() < len && idle < 2000 {
        assert_ne!(input.pump(&guest.serial), InputOutcome::Quit);
        let piece = guest.read();
        idle = if piece.is_empty() { idle + 1 } else { 0 };
        if piece.is_empty() {
            thread::sleep(Duration::from_millis(1));
        }
        got.extend(piece);
    }
    got
}

#[test]
fn a_pipe_waits_for_the_guest_and_ends() {
    let (reader, mut writer) = io::pipe().unwrap();
    let console = nowhere();
    let guest = Guest::new(&console);
    let mut input = ConsoleInput::from_fd(reader.into());
    assert!(input.fd().is_some());
    let sent = text(10_000);
    writer.write_all(&sent).unwrap();
    drop(writer);
    assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);
    assert!(guest.read().is_empty(), "not opened yet");
    guest.kicked();
    guest.open();
    // From here on, kicks alone must bring everything, as for a file that cannot be watched.
    let mut got = Vec::new();
    while guest.kicked() {
        let _ = input.pump(&guest.serial);
        got.extend(guest.read());
    }
    assert_eq!(got, sent);
    assert_eq!(input.pump(&guest.serial), InputOutcome::Ended);
    assert!(input.fd().is_none());
}

#[test]
fn files_and_null_are_always_ready() {
    let console = nowhere();
    let guest = Guest::opened(&console);
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&text(5000)).unwrap();
    io::Seek::rewind(&mut file).unwrap();
    let mut input = ConsoleInput::from_fd(file.into());
    assert_eq!(feed(&mut input, &guest, 5000), text(5000));
    for path in ["/dev/null", "/"] {
        let mut input = ConsoleInput::from_fd(std::fs::File::open(path).unwrap().into());
        assert_eq!(input.pump(&guest.serial), InputOutcome::Ended, "{path}");
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
fn a_paste_of_ten_kilobytes_arrives_whole() {
    let (mut user, stdin, _) = terminal();
    let console = nowhere();
    let guest = Guest::opened(&console);
    let mut input = ConsoleInput::from_fd(stdin);
    let paste = text(10_000);
    let expected = paste.clone();
    let typist = thread::spawn(move || {
        user.write_all(&paste).unwrap();
        user
    });
    assert_eq!(feed(&mut input, &guest, expected.len()), expected);
    drop(typist.join().unwrap());
    eventually("the end", || {
        input.pump(&guest.serial) == InputOutcome::Ended
    });
}

#[test]
fn quitting_works_while_the_guest_reads_nothing() {
    let (mut user, stdin, _) = terminal();
    let console = nowhere();
    let guest = Guest::new(&console);
    let mut input = ConsoleInput::from_fd(stdin);
    user.write_all(b"typed ahead\x01h\x01a").unwrap();
    eventually("read ahead", || {
        assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);
        input.ahead_len() == 12
    });
    guest.open();
    assert_eq!(feed(&mut input, &guest, 12), b"typed ahead\x01");
    user.write_all(b"\x01x").unwrap();
    eventually("quit", || input.pump(&guest.serial) == InputOutcome::Quit);
}

#[test]
fn a_break_overtakes_what_the_guest_has_not_read() {
    let (mut user, stdin, _) = terminal();
    let console = nowhere();
    let guest = Guest::new(&console);
    let mut input = ConsoleInput::from_fd(stdin);
    user.write_all(b"c c c\x01bh").unwrap();
    eventually("read ahead", || {
        assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);
        input.ahead_len() == 1
    });
    guest.open();
    assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);
    assert_eq!(guest.inb(5) & 0x11, 0x11);
    assert_eq!(guest.read(), b"\0h");
}

#[test]
fn a_guest_that_never_reads_bounds_the_look_ahead() {
    let (mut user, stdin, _) = terminal();
    rustix::io::ioctl_fionbio(&user, true).unwrap();
    let console = nowhere();
    let guest = Guest::new(&console);
    let mut input = ConsoleInput::from_fd(stdin);
    for _ in 0..500 {
        let _ = user.write(&[b'x'; 1000]);
        assert_eq!(input.pump(&guest.serial), InputOutcome::Continue);
    }
    assert_eq!(input.ahead_len(), 64 << 10);
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
        assert_eq!(feed(&mut input, &guest, 8), b"\x01x typed");
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
    crate::cli::process::end_in_good_order();
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
