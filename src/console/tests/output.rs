//! Output to pipes and files.

use super::*;

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
