//! How long a test waits. In the lab, a limit counts the time that the lab was given to run, so that a busy machine makes a test
//! slower and does not change its verdict.

use std::fs;
use std::process::Child;
use std::sync::LazyLock;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::linux::rounds;

/// Longest that a test lets minivmm run: far above what anything here takes, so that a hang is a failure, not a wait.
pub(crate) const PATIENCE: Duration = Duration::from_secs(300);

/// How long an attempt of [`within`] may take, and the time between two looks at the lab's clock.
pub(crate) const SLICE: Duration = Duration::from_millis(100);

/// What counts: since the lab began to run, or since the first call.
fn now() -> Duration {
    static START: LazyLock<Instant> = LazyLock::new(Instant::now);
    let Some(file) = std::env::var_os("MINIVMM_LAB_CLOCK") else {
        return START.elapsed();
    };
    loop {
        let text = fs::read_to_string(&file).expect("the lab's clock");
        if let Ok(ms) = text.trim().parse() {
            return Duration::from_millis(ms);
        }
        // It is just being written.
        thread::sleep(Duration::from_millis(1));
    }
}

/// Attempts it until it gives something, or until the time is over: more time where there is more to do.
pub(crate) fn within<T>(patience: Duration, mut attempt: impl FnMut() -> Option<T>) -> Option<T> {
    let end = now() + patience * rounds(1, 12) as u32;
    let mut looked = Instant::now();
    loop {
        if let Some(done) = attempt() {
            return Some(done);
        }
        if looked.elapsed() >= SLICE {
            if now() > end {
                return None;
            }
            looked = Instant::now();
        }
    }
}

/// Waits until it is so; whether it was, in time.
pub(crate) fn until(mut is: impl FnMut() -> bool) -> bool {
    let attempt = || {
        is().then_some(()).or_else(|| {
            thread::sleep(Duration::from_millis(1));
            None
        })
    };
    within(PATIENCE, attempt).is_some()
}

/// The next message, or none that came in time or can come.
pub(crate) fn receive<T>(messages: &Receiver<T>) -> Option<T> {
    within(PATIENCE, || match messages.recv_timeout(SLICE) {
        Ok(message) => Some(Some(message)),
        Err(RecvTimeoutError::Timeout) => None,
        Err(RecvTimeoutError::Disconnected) => Some(None),
    })
    .flatten()
}

/// Kills a child that runs for too long, so that a reader of its output goes on. Dropped, it lets it run.
pub(crate) fn watch(child: &Child) -> Sender<()> {
    let pid = child.id();
    let (sender, dropped) = mpsc::channel();
    thread::spawn(move || {
        let done = within(PATIENCE, || match dropped.recv_timeout(SLICE) {
            Err(RecvTimeoutError::Timeout) => None,
            _ => Some(()),
        });
        if done.is_none() {
            super::kill(pid, "KILL");
        }
    });
    sender
}
