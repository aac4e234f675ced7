//! Input from pipes, files and terminals.

use super::*;

/// Feeds the guest as the event loop does, until `len` bytes arrived or nothing moves any more.
pub(super) fn feed(input: &mut ConsoleInput, guest: &Guest, len: usize) -> Vec<u8> {
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
