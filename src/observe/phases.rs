//! Recognizes the phases of a boot in the guest's console output.

use std::time::Instant;

/// When the console output reached each phase of a boot.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Phases {
    /// The first byte of all.
    pub first_byte: Option<Instant>,
    /// The kernel's line that names its first process.
    pub init_run: Option<Instant>,
    /// The start of the first line of user space: one that is not blank, has no time stamp of the kernel's log, and comes
    /// after `init_run` where the log shows that (`quiet` hides it). Wrong for a kernel that writes no time stamps
    /// (`printk.time=0`) or prints before it has a log (`earlyprintk`), and where the guest's terminal echoes input first.
    pub user_output: Option<Instant>,
    /// A getty's prompt.
    pub login_prompt: Option<Instant>,
}

/// How much of a line is kept, in bytes: enough for a time stamp and the path of an init.
const HEAD_LEN: usize = 256;

/// Scans the output as it arrives.
#[derive(Debug, Default)]
pub(super) struct PhaseScanner {
    /// The line's beginning, from its first visible character on.
    head: Vec<u8>,
    /// When that arrived.
    began: Option<Instant>,
    phases: Phases,
}

impl PhaseScanner {
    pub(super) fn phases(&self) -> Phases {
        self.phases
    }

    /// Scans bytes that arrived at `now`.
    pub(super) fn push(&mut self, bytes: &[u8], now: Instant) {
        for byte in bytes {
            self.phases.first_byte.get_or_insert(now);
            self.push_byte(*byte, now);
        }
    }

    fn push_byte(&mut self, byte: u8, now: Instant) {
        if byte == b'\n' || byte == b'\r' {
            self.head.clear();
            self.began = None;
            return;
        }
        if (self.head.is_empty() && !byte.is_ascii_graphic()) || self.head.len() == HEAD_LEN {
            return;
        }
        self.head.push(byte);
        let began = *self.began.get_or_insert(now);
        match Line::of(&self.head) {
            Line::Other => {
                self.phases.user_output.get_or_insert(began);
            }
            Line::Kernel(message) if self.phases.init_run.is_none() && names_init(message) => {
                // Output before the first process started was not its own.
                self.phases.user_output = None;
                self.phases.init_run = Some(now);
            }
            _ => {}
        }
        if is_login_prompt(&self.head) {
            self.phases.login_prompt.get_or_insert(now);
        }
    }
}

/// Whose line it is, by its beginning.
#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    /// It may become a time stamp yet.
    Undecided,
    /// The kernel's log wrote it; what follows the time stamp.
    Kernel(&'a [u8]),
    Other,
}

impl<'a> Line<'a> {
    /// printk's stamp is `[   12.345678]` (kernel/printk/printk.c, print_time).
    fn of(head: &'a [u8]) -> Self {
        let Some(body) = head.strip_prefix(b"[") else {
            return Self::Other;
        };
        let len = body
            .iter()
            .take_while(|b| matches!(b, b' ' | b'.' | b'0'..=b'9'))
            .count();
        let (stamp, rest) = body.split_at(len);
        match rest.split_first() {
            None => Self::Undecided,
            Some((b']', message)) if stamp.contains(&b'.') => Self::Kernel(message),
            Some(_) => Self::Other,
        }
    }
}

/// Whether this is the kernel's `Run /init as init process` (init/main.c, run_init_process); with CONFIG_PRINTK_CALLER
/// `[    T1]` stands before it.
fn names_init(message: &[u8]) -> bool {
    let Some(message) = message.strip_suffix(b" as init process") else {
        return false;
    };
    let caller = message.iter().position(|byte| *byte == b']');
    let text = message.split_at(caller.map_or(0, |end| end + 1)).1;
    text.trim_ascii_start().starts_with(b"Run /")
}

/// A getty's prompt: one word, the host's name, before it.
fn is_login_prompt(line: &[u8]) -> bool {
    line.strip_suffix(b" login: ")
        .is_some_and(|host| !host.is_empty() && !host.contains(&b' '))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    /// The phases of an output whose bytes come one a microsecond, as positions in it.
    fn positions(text: &str) -> [Option<usize>; 4] {
        let start = Instant::now();
        let mut scanner = PhaseScanner::default();
        for (index, byte) in (0u32..).zip(text.bytes()) {
            scanner.push(&[byte], start + Duration::from_micros(1) * index);
        }
        let Phases {
            first_byte,
            init_run,
            user_output,
            login_prompt,
        } = scanner.phases();
        [first_byte, init_run, user_output, login_prompt]
            .map(|at| at.map(|at| at.duration_since(start).as_micros() as usize))
    }

    #[test]
    fn a_boot_to_a_login_prompt() {
        let kernel = "[    0.000000] Linux version 6.1.0\r\n[   10.500000]   with environment:\r\n";
        let init = "[    1.234567] Run /sbin/init as init process";
        let rest =
            "\r\n\r\nWelcome to \x1b[1mDebian\x1b[0m!\r\n[  OK  ] Reached target\r\ndebian login: ";
        let text = format!("{kernel}{init}{rest}");
        let init_end = kernel.len() + init.len() - 1;
        assert_eq!(
            positions(&text),
            [
                Some(0),
                Some(init_end),
                text.find("Welcome"),
                Some(text.len() - 1)
            ]
        );
    }

    #[test]
    fn a_quiet_boot_shows_userspace_alone() {
        assert_eq!(positions("\r\n  hello"), [Some(0), None, Some(4), None]);
        // A shell's prompt ends no line.
        assert_eq!(positions("/ # "), [Some(0), None, Some(0), None]);
        assert_eq!(positions("\x1b[6n"), [Some(0), None, Some(1), None]);
        assert_eq!(
            positions("[  OK  ] Started"),
            [Some(0), None, Some(0), None]
        );
        assert_eq!(positions("[1/3] step"), [Some(0), None, Some(0), None]);
        assert_eq!(positions("[    0.12"), [Some(0), None, None, None]);
        assert_eq!(positions(""), [None; 4]);
    }

    #[test]
    fn words_before_the_first_process_are_not_its_own() {
        let early = "Decompressing Linux... done.\r\n";
        let init = "[    0.1][    T1] Run /init as init process";
        let text = format!("{early}{init}\r\nhello\r\n");
        let [_, init_run, user_output, _] = positions(&text);
        assert_eq!(init_run, Some(early.len() + init.len() - 1));
        assert_eq!(user_output, text.find("hello"));
    }

    #[test]
    fn what_only_looks_like_a_phase_is_none() {
        for text in [
            "Run /init as init process",
            "[    0.1] did not Run /init as init process",
            "[    0.1] Run /init as init",
            " login: ",
            "Enter your login: ",
            "debian login:",
        ] {
            let [_, init_run, _, login] = positions(text);
            assert_eq!((init_run, login), (None, None), "{text}");
        }
    }

    proptest! {
        /// Whatever comes, memory stays bounded, and the phases lie within the output and in order.
        #[test]
        fn any_output_is_survived(
            pieces in proptest::collection::vec(prop_oneof![
                Just(b"[    1.000000] Run /init as init process\r\n".to_vec()),
                Just(b"[    1.0".to_vec()),
                Just(b"debian login: ".to_vec()),
                Just(b"\n".to_vec()),
                proptest::collection::vec(any::<u8>(), 0..400),
            ], 0..20),
        ) {
            let mut scanner = PhaseScanner::default();
            for piece in &pieces {
                scanner.push(piece, Instant::now());
                prop_assert!(scanner.head.len() <= HEAD_LEN);
            }
            let phases = scanner.phases();
            prop_assert_eq!(phases.first_byte.is_some(), pieces.iter().any(|p| !p.is_empty()));
            let later = [phases.init_run, phases.user_output, phases.login_prompt];
            prop_assert!(later.into_iter().flatten().all(|at| Some(at) >= phases.first_byte));
            if let (Some(init), Some(output)) = (phases.init_run, phases.user_output) {
                prop_assert!(init <= output);
            }
        }
    }
}
