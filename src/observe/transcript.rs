//! Scans the guest's output for kernel panics and boot phases.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use super::phases::{PhaseScanner, Phases};
use crate::console::OutputObserver;

/// Limit of reported panic ends. Each makes the callback search guest memory, and a guest can print any number of them.
const MAX_PANIC_ENDS: u32 = 8;

/// What the scanners know about the output of one run of a VM.
#[derive(Default)]
pub struct Transcript {
    panic: PanicScanner,
    panic_ends: u32,
    /// Called after what looks like the last line of a panic.
    pub on_panic_end: Option<Arc<dyn Fn() + Send + Sync>>,
    phases: Option<PhaseScanner>,
}

/// A shared handle to a transcript.
#[derive(Clone)]
pub struct SharedTranscript(Arc<Mutex<Transcript>>);

impl SharedTranscript {
    /// An empty one; with `watch_phases`, it searches for what [`Transcript::phases`] tells.
    pub fn new(watch_phases: bool) -> Self {
        Self(Arc::new(Mutex::new(Transcript::new(watch_phases))))
    }

    /// What is known so far.
    pub fn get(&self) -> MutexGuard<'_, Transcript> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl OutputObserver for SharedTranscript {
    fn push(&mut self, bytes: &[u8], came: Instant) {
        self.get().push(bytes, came);
    }
}

impl Transcript {
    fn new(watch_phases: bool) -> Self {
        Self {
            phases: watch_phases.then(PhaseScanner::default),
            ..Self::default()
        }
    }

    fn push(&mut self, bytes: &[u8], came: Instant) {
        for byte in bytes {
            if self.panic.push(*byte) && self.panic_ends < MAX_PANIC_ENDS {
                self.panic_ends += 1;
                if let Some(callback) = &self.on_panic_end {
                    callback();
                }
            }
        }
        if let Some(phases) = &mut self.phases {
            phases.push(bytes, came);
        }
    }

    /// When the output reached each phase of the boot, if that is watched.
    pub fn phases(&self) -> Phases {
        self.phases
            .as_ref()
            .map(PhaseScanner::phases)
            .unwrap_or_default()
    }

    /// Whether a panic was seen, with no orderly reboot or power-off after it.
    pub fn saw_panic(&self) -> bool {
        self.panic.seen
    }
}

/// Looks for the kernel's panic line, a byte at a time.
///
/// It counts only where the kernel's log would put it: at the start of a line, or behind a time stamp, which may follow
/// a shell's prompt. A later orderly reboot or power-off cancels it: then an old log was printed.
#[derive(Debug, Default)]
struct PanicScanner {
    /// The last bytes of the current line.
    line: Vec<u8>,
    /// The line's beginning is no longer in `line`.
    cut: bool,
    seen: bool,
    /// The current line is the last of a panic.
    ending: bool,
}

impl PanicScanner {
    const PANIC: &[u8] = b"Kernel panic - not syncing";
    /// Linux ends with it where it does not reset the machine (kernel/panic.c).
    const PANIC_END: &[u8] = b"---[ end Kernel panic";
    const ORDERLY: [&[u8]; 3] = [
        b"reboot: Restarting system",
        b"reboot: Power down",
        b"reboot: System halted",
    ];
    /// Enough for a time stamp, a caller's id and the longest message.
    const WINDOW: usize = 128;

    /// Whether this byte ends a panic's last line.
    fn push(&mut self, byte: u8) -> bool {
        if byte == b'\n' || byte == b'\r' {
            self.line.clear();
            self.cut = false;
            return byte == b'\n' && std::mem::take(&mut self.ending);
        }
        if self.line.len() == Self::WINDOW {
            self.line.drain(..Self::WINDOW / 2);
            self.cut = true;
        }
        self.line.push(byte);
        if self.message_is(Self::PANIC) {
            self.seen = true;
        } else if self.message_is(Self::PANIC_END) {
            self.ending = self.seen;
        } else if self.seen && Self::ORDERLY.iter().any(|message| self.message_is(message)) {
            self.seen = false;
        }
        false
    }

    /// Whether the line ends with `message`, in a place where the kernel's log would have it.
    fn message_is(&self, message: &[u8]) -> bool {
        let Some(before) = self.line.strip_suffix(message) else {
            return false;
        };
        (before.is_empty() && !self.cut) || ends_with_stamp(before)
    }
}

/// Whether `before` ends with what printk puts before a message: `[   12.345678] `, with CONFIG_PRINTK_CALLER followed by
/// `[    T1] `, or the level `<0>` on a line of its own.
fn ends_with_stamp(before: &[u8]) -> bool {
    let text = before.trim_ascii_end();
    let inside = |open, close| {
        let body = text.strip_suffix(&[close])?;
        body.get(body.iter().rposition(|b| *b == open)? + 1..)
    };
    if let Some(stamp) = inside(b'[', b']') {
        return stamp.iter().any(u8::is_ascii_digit)
            && stamp
                .iter()
                .all(|b| b.is_ascii_digit() || matches!(b, b' ' | b'.' | b'T' | b'C'));
    }
    inside(b'<', b'>').is_some_and(|level| level.len() == 1 && level.iter().all(u8::is_ascii_digit))
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;
    use proptest::prelude::*;

    fn seen(text: &str) -> bool {
        let mut transcript = Transcript::default();
        transcript.push(text.as_bytes(), Instant::now());
        transcript.saw_panic()
    }

    #[test]
    fn a_panic_counts_where_the_log_would_have_it() {
        for text in [
            "Kernel panic - not syncing: VFS",
            "a\r\n[    0.512345] Kernel panic - not syncing: VFS: Unable to mount root fs\r\n",
            "[  12.3][    T1] Kernel panic - not syncing",
            "<0>Kernel panic - not syncing: early",
            "~ # [   12.345678] Kernel panic - not syncing: sysrq triggered crash",
        ] {
            assert!(seen(text), "{text}");
        }
        for text in [
            "",
            "# echo Kernel panic - not syncing",
            "grep: Kernel panic - not syncing",
            "[x] Kernel panic - not syncing",
            "[] Kernel panic - not syncing",
            "Kernel panic - not sync\ning",
            "Kernel panic",
        ] {
            assert!(!seen(text), "{text}");
        }
        let long = "x".repeat(1000);
        assert!(!seen(&format!("{long}Kernel panic - not syncing")));
        assert!(!seen(&format!(
            "{}Kernel panic - not syncing",
            "x".repeat(PanicScanner::WINDOW / 2)
        )));
        assert!(seen(&format!(
            "{long}[    1.000000] Kernel panic - not syncing"
        )));
    }

    #[test]
    fn the_last_line_of_a_panic_is_reported_when_it_is_whole() {
        let ends = |text: &str| {
            let count = Arc::new(AtomicU32::new(0));
            let counter = Arc::clone(&count);
            let mut transcript = Transcript {
                on_panic_end: Some(Arc::new(move || {
                    _ = counter.fetch_add(1, Ordering::Relaxed)
                })),
                ..Transcript::default()
            };
            transcript.push(text.as_bytes(), Instant::now());
            count.load(Ordering::Relaxed)
        };
        let panic = "[    1.5] Kernel panic - not syncing: VFS: no root\r\n";
        let end = "[    1.6] ---[ end Kernel panic - not syncing: VFS: no root ]---";
        assert_eq!(ends(&format!("{panic}{end}")), 0);
        assert_eq!(ends(&format!("{panic}{end}\r\n")), 1);
        assert_eq!(ends(&format!("{panic}{end}\r\nmore\r\n\n")), 1);
        assert_eq!(ends(&format!("{end}\r\n")), 0);
        assert_eq!(ends(&format!("{panic}# echo {end}\r\n")), 1);
        assert_eq!(ends(&format!("{panic}grep: ---[ end Kernel panic\r\n")), 0);
        assert_eq!(
            ends(&format!("{panic}{end}\n").repeat(1000)),
            MAX_PANIC_ENDS
        );
    }

    #[test]
    fn an_orderly_end_takes_it_back() {
        let panic = "Kernel panic - not syncing: old log\r\n";
        assert!(!seen(&format!(
            "{panic}[    9.1] reboot: Restarting system\r\n"
        )));
        assert!(!seen(&format!("{panic}reboot: Power down\r\n")));
        assert!(seen(&format!("{panic}# echo reboot: Power down\r\n")));
        assert!(seen(&format!("[    9.1] reboot: Power down\r\n{panic}")));
    }

    proptest! {
        /// How the output is cut into pieces makes no difference, and memory stays bounded.
        #[test]
        fn chunks_make_no_difference(
            pieces in proptest::collection::vec(prop_oneof![
                Just("Kernel panic - not syncing: x".to_owned()),
                Just("[    1.000000] ".to_owned()),
                Just("reboot: Power down".to_owned()),
                Just("\r\n".to_owned()),
                Just("\n".to_owned()),
                "[ -~]{0,200}",
            ], 0..20),
            cuts in proptest::collection::vec(1usize..60, 1..40),
        ) {
            let text = pieces.concat();
            let mut transcript = Transcript::default();
            let (mut rest, mut cuts) = (text.as_bytes(), cuts.iter().cycle());
            while !rest.is_empty() {
                let (chunk, later) = rest.split_at((*cuts.next().unwrap()).min(rest.len()));
                transcript.push(chunk, Instant::now());
                rest = later;
            }
            prop_assert_eq!(transcript.saw_panic(), seen(&text));
            prop_assert!(transcript.panic.line.len() <= PanicScanner::WINDOW);
        }
    }
}
