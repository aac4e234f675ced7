//! minivmm at a terminal: raw while it runs, as it was afterwards whatever ended it, and every key and byte in between.

mod common;

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use common::terminal::{Session, Terminal};
use common::{PATIENCE, boot_tiny, wait};

/// What `ends` prints for "m": words without an end of line.
const PROMPT: &str = "tiny# ";

/// A guest that waits for a key, then does the rest of `letters`.
fn after_a_key(letters: &str) -> Command {
    boot_tiny("ends", &format!("w{letters}"), &[])
}

/// Starts a command at a terminal, has it ended by `end` while the terminal is raw, and expects `status` and the terminal as
/// it was. Returns what was on the screen.
#[track_caller]
fn way_out(command: &Command, status: u32, end: impl FnOnce(&Terminal, &mut Session)) -> String {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run(command);
    terminal.wait_until_raw(true);
    end(&terminal, &mut session);
    assert_eq!(session.status(), status, "{}", terminal.text());
    assert_eq!(terminal.modes(), before);
    terminal.text()
}

#[test]
fn the_terminal_is_as_before_when_the_guest_has_ended() {
    for (letters, status) in [
        ("p", 0),
        ("r", 0),
        ("k", 0),
        ("eA", 65),
        ("c", 134),
        ("Pr", 134),
        ("t", 139),
    ] {
        way_out(&after_a_key(letters), status, |terminal, _| {
            terminal.type_in(".")
        });
    }
}

#[test]
fn the_terminal_is_as_before_when_the_guest_was_ended() {
    way_out(&after_a_key("p"), 130, |terminal, _| {
        terminal.type_in("\x01x")
    });
    for (name, status) in [("INT", 130), ("TERM", 143), ("HUP", 129), ("QUIT", 131)] {
        way_out(&after_a_key("p"), status, |_, session| session.signal(name));
    }
    let mut command = after_a_key("p");
    command.args(["--deadline", "500ms"]);
    way_out(&command, 124, |_, _| {});
}

#[test]
fn the_terminal_is_as_before_when_another_signal_ended_minivmm() {
    for (name, number) in [
        ("ABRT", libc::SIGABRT),
        ("SEGV", libc::SIGSEGV),
        ("USR1", libc::SIGUSR1),
        ("USR2", libc::SIGUSR2),
        ("ALRM", libc::SIGALRM),
        ("VTALRM", libc::SIGVTALRM),
        ("PROF", libc::SIGPROF),
        ("PWR", libc::SIGPWR),
        ("XCPU", libc::SIGXCPU),
        ("SYS", libc::SIGSYS),
        ("TRAP", libc::SIGTRAP),
    ] {
        let status = 128 + number as u32;
        way_out(&after_a_key("p"), status, |_, session| session.signal(name));
    }
}

/// Nothing can be done about it, so it is written down: `stty sane` is the fix.
#[test]
fn sigkill_alone_leaves_the_terminal_raw() {
    let terminal = Terminal::new();
    let mut session = terminal.run(&after_a_key("p"));
    terminal.wait_until_raw(true);
    session.signal("KILL");
    assert_eq!(session.status(), 137);
    assert!(terminal.is_raw());
}

#[test]
fn an_error_before_the_vm_starts_leaves_the_terminal_alone() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run(&common::minivmm(&["--kernel", "/no/such/kernel"]));
    assert_eq!(session.status(), 125);
    assert_eq!(terminal.modes(), before);
    terminal.wait_for("/no/such/kernel");
    terminal.wait_for("\r\n");
    let text = terminal.text();
    assert!(text.starts_with("minivmm: error: "), "{text:?}");
    assert_eq!(text.lines().count(), 1, "{text:?}");
}

#[test]
fn an_error_after_the_terminal_is_raw_restores_it() {
    // Too few open files for the vCPUs: the terminal is raw by then.
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run_script(
        &boot_tiny("ends", "s", &["--cpus", "8"]),
        "ulimit -n 15; minivmm; ended",
    );
    assert_eq!(session.status(), 125, "{}", terminal.text());
    assert_eq!(terminal.modes(), before);
    terminal.wait_for("minivmm: error: ");
}

#[test]
fn the_shells_prompt_begins_a_line() {
    // Whatever was on the line when the guest ended.
    let text = way_out(&after_a_key("mp"), 0, |terminal, _| terminal.type_in("."));
    assert_eq!(text, format!("{PROMPT}\r\n"));
    let text = way_out(&boot_tiny("ends", "mwp", &[]), 130, |terminal, _| {
        terminal.wait_for(PROMPT);
        terminal.type_in("\x01x");
    });
    assert_eq!(text, format!("{PROMPT}\r\n"));
    // An orderly end adds nothing.
    let text = way_out(&after_a_key("Pr"), 134, |terminal, _| terminal.type_in("."));
    assert_eq!(text, "[    0.123456] Kernel panic - not syncing: tiny\r\n");
}

#[test]
fn a_post_mortem_stands_behind_the_guests_last_words() {
    let text = way_out(&after_a_key("mt"), 139, |terminal, _| terminal.type_in("."));
    let report = text
        .strip_prefix(&format!(
            "{PROMPT}\r\nminivmm: error: the guest triple-faulted"
        ))
        .unwrap_or_else(|| panic!("{text:?}"));
    assert!(report.contains("likely cause"), "{report:?}");
    // Lines that end as the terminal needs it, whether it was still raw or not.
    assert_eq!(
        report.matches("\r\n").count(),
        report.matches('\n').count(),
        "{report:?}"
    );
    assert!(
        !report.contains("\r\r") && report.ends_with("\r\n"),
        "{report:?}"
    );
}

#[test]
fn every_key_reaches_the_guest() {
    let terminal = Terminal::new();
    let mut session = terminal.run(&boot_tiny("echo", "", &[]));
    terminal.wait_until_raw(true);
    // Ctrl-C, Ctrl-Z, Ctrl-\, Ctrl-S, Ctrl-Q, Ctrl-V, Ctrl-O, Tab, Return, Line feed, Backspace; arrow keys; UTF-8.
    let keys = "\x03\x1a\x1c\x13\x11\x16\x0f\t\r\n\x08\x7f\x1b[A\x1b[B\x1bOCä€";
    terminal.type_in(keys);
    terminal.wait_for(keys);
    assert_eq!(terminal.text(), keys);
    // Ctrl-D has the echo guest end with the exclusive-or of what it was sent.
    terminal.type_in("\x04");
    let sum = keys.bytes().fold(0, |sum, byte| sum ^ byte);
    assert_eq!(session.status(), sum.into());
}

#[test]
fn the_escape_key_commands_minivmm() {
    let terminal = Terminal::new();
    let mut session = terminal.run(&boot_tiny("echo", "", &[]));
    terminal.wait_until_raw(true);
    terminal.type_in("\x01h");
    terminal.wait_for("Ctrl-A x       stop the VM and quit\r\n");
    terminal.wait_for("(so does Ctrl-A a)\r\n");
    let shown = terminal.screen().len();
    // A byte 1 for each of the first two; the third is no command, and both keys go to the guest.
    terminal.type_in("\x01a\x01\x01\x01z.");
    terminal.wait_for_len(shown + 5);
    assert_eq!(&terminal.screen()[shown..], b"\x01\x01\x01z.");
    terminal.type_in("\x01");
    thread::sleep(Duration::from_millis(50));
    terminal.type_in("x");
    assert_eq!(session.status(), 130);
}

#[test]
fn a_paste_of_ten_kilobytes_comes_back_whole() {
    let paste: Vec<u8> = (0..10_240u32).map(|i| b'!' + (i % 90) as u8).collect();
    let terminal = Terminal::new();
    let mut session = terminal.run(&boot_tiny("echo", "", &[]));
    terminal.wait_until_raw(true);
    terminal.type_in(&paste);
    terminal.wait_for_len(paste.len());
    assert!(terminal.screen() == paste);
    terminal.type_in("\x04");
    assert_eq!(
        session.status(),
        paste.iter().fold(0, |sum, byte| sum ^ byte).into()
    );
}

#[test]
fn a_new_size_breaks_nothing() {
    let terminal = Terminal::new();
    let mut session = terminal.run(&boot_tiny("echo", "", &[]));
    terminal.wait_until_raw(true);
    let mut typed = String::new();
    for size in 1..100 {
        terminal.resize(size, 2 * size);
        let keys = format!("{size} ");
        terminal.type_in(&keys);
        typed += &keys;
    }
    terminal.wait_for_len(typed.len());
    assert_eq!(terminal.text(), typed);
    terminal.type_in("\x01x");
    assert_eq!(session.status(), 130);
}

#[test]
fn a_stopped_minivmm_makes_the_terminal_raw_when_it_goes_on() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run(&boot_tiny("echo", "", &[]));
    terminal.wait_until_raw(true);
    for _ in 0..3 {
        session.signal("STOP");
        session.wait_for_state('T');
        terminal.reset_modes();
        session.signal("CONT");
        terminal.wait_until_raw(true);
    }
    terminal.type_in("\x03");
    terminal.wait_for("\x03");
    terminal.type_in("\x04");
    assert_eq!(session.status(), 3);
    assert_eq!(terminal.modes(), before);
}

#[test]
fn sigtstp_lends_the_terminal_to_the_shell() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    // Stopped, minivmm gives the shell the terminal as it was; the shell brings it back.
    let mut session = terminal.run_script(
        &boot_tiny("echo", "", &[]),
        "set -m; minivmm; ended; read -r word; fg >/dev/null; ended",
    );
    terminal.wait_until_raw(true);
    session.signal("TSTP");
    assert_eq!(session.status(), 128 + libc::SIGTSTP as u32);
    assert_eq!(terminal.modes(), before);
    terminal.type_in("on\n");
    terminal.wait_until_raw(true);
    terminal.type_in("keys");
    terminal.wait_for("keys");
    terminal.type_in("\x04");
    assert_eq!(session.status(), u32::from(b'k' ^ b'e' ^ b'y' ^ b's'));
    assert_eq!(terminal.modes(), before);
}

#[test]
fn from_the_background_the_terminal_is_left_alone() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run_script(
        &boot_tiny("echo", "", &[]),
        "set -m; minivmm & read -r word; echo \"the shell read $word\"; fg >/dev/null; ended",
    );
    session.pid();
    session.wait_for_state('S');
    thread::sleep(Duration::from_millis(200));
    assert_eq!(terminal.modes(), before, "in the background");
    // What is typed is for the shell, then for the guest.
    terminal.type_in("a-word\n");
    terminal.wait_for("the shell read a-word");
    thread::sleep(Duration::from_millis(200));
    terminal.type_in("\n");
    terminal.wait_until_raw(true);
    let shown = terminal.screen().len();
    terminal.type_in("\x03");
    terminal.wait_for("\x03");
    assert!(!String::from_utf8_lossy(&terminal.screen()[shown..]).contains("a-word"));
    terminal.type_in("\x04");
    assert_eq!(session.status(), u32::from(b'\n' ^ 3));
    assert_eq!(terminal.modes(), before);
}

#[test]
fn an_end_in_the_background_leaves_the_terminal_alone() {
    let terminal = Terminal::new();
    let before = terminal.modes();
    let mut session = terminal.run_script(
        &boot_tiny("ends", "s", &[]),
        "set -m; minivmm & wait %1; ended",
    );
    session.pid();
    thread::sleep(Duration::from_millis(200));
    session.signal("TERM");
    assert_eq!(session.status(), 143);
    assert_eq!(terminal.modes(), before);
}

#[test]
fn a_signal_that_is_ignored_stays_so() {
    // As nohup does it, and a shell without job control for what it starts in the background.
    let terminal = Terminal::new();
    let mut session = terminal.run_script(
        &boot_tiny("ends", "s", &[]),
        "trap '' HUP INT; minivmm; ended",
    );
    terminal.wait_until_raw(true);
    session.signal("HUP");
    session.signal("INT");
    thread::sleep(Duration::from_millis(200));
    session.signal("TERM");
    assert_eq!(session.status(), 143);
}

#[test]
fn messages_in_a_file_have_plain_line_ends() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let terminal = Terminal::new();
    let mut command = boot_tiny("ends", "wt", &[]);
    command.arg("-v");
    let redirected = format!("minivmm 2>{}; ended", log.path().display());
    let mut session = terminal.run_script(&command, &redirected);
    terminal.wait_until_raw(true);
    terminal.type_in(".");
    assert_eq!(session.status(), 139);
    let text = fs::read_to_string(log.path()).unwrap();
    assert!(text.contains("the VM ended"), "{text:?}");
    assert!(!text.contains('\r'), "{text:?}");
}

#[test]
fn a_reader_that_stalls_does_not_take_the_keyboard_away() {
    // The guest has ended, its output cannot: raw, Ctrl-C would be a byte that nobody reads.
    let terminal = Terminal::new();
    let before = terminal.modes();
    let full_pipe = "dir=$(mktemp -d); mkfifo $dir/pipe; exec 4<>$dir/pipe; rm -r $dir; head -c 65536 /dev/zero >&4";
    let mut session = terminal.run_script(
        &after_a_key("mp"),
        &format!("{full_pipe}; trap : INT; minivmm >&4; ended"),
    );
    terminal.wait_until_raw(true);
    terminal.type_in(".");
    terminal.wait_until_raw(false);
    assert_eq!(terminal.modes(), before);
    session.wait_for_state('S');
    terminal.type_in("\x03");
    assert_eq!(session.status(), 0);
}

#[test]
fn interrupts_alone_carry_a_conversation() {
    let mut child = boot_tiny("talk", "", &[])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut input, mut output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let (sender, echo) = mpsc::channel();
    thread::spawn(move || {
        let mut byte = [0];
        while output.read_exact(&mut byte).is_ok() && sender.send(byte[0]).is_ok() {}
    });
    let heard = |wanted: u8| assert_eq!(echo.recv_timeout(PATIENCE), Ok(wanted));
    heard(b'!');
    // Around the length of the FIFOs; each in two parts, so that one comes while the other is served.
    for len in (1..=40).chain([700]).cycle().take(400) {
        let words: Vec<u8> = (b' '..=b'~').cycle().take(len).collect();
        for part in words.chunks(len.div_ceil(2)) {
            input.write_all(part).unwrap();
        }
        words.into_iter().for_each(heard);
    }
    input.write_all(&[4]).unwrap();
    assert_eq!(wait(child, PATIENCE).status.code(), Some(0));
}
