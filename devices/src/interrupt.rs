//! Interrupts: a device holds an [`IrqLine`] and never knows its GSI.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An edge-triggered interrupt line, as its device sees it.
#[derive(Clone)]
pub struct IrqLine(Arc<Line>);

struct Line {
    trigger: Box<dyn Fn() -> io::Result<()> + Send + Sync>,
    /// An error has been logged. Later ones are not, or a guest could flood the log.
    failed: AtomicBool,
}

impl IrqLine {
    /// A line with the interrupt controller at its end: each call of `trigger` is one pulse.
    pub fn new(trigger: impl Fn() -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Arc::new(Line {
            trigger: Box::new(trigger),
            failed: AtomicBool::new(false),
        }))
    }

    /// Sends an edge. A device cannot handle a failure, so the first one is logged and the rest are ignored.
    pub fn signal(&self) {
        if let Err(e) = (self.0.trigger)()
            && !self.0.failed.swap(true, Ordering::Relaxed)
        {
            log::error!("cannot signal an interrupt (reported once): {e}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn each_signal_is_one_pulse_whether_it_fails_or_not_and_clones_share_the_wire() {
        for fails in [false, true] {
            let pulses = Arc::new(AtomicUsize::new(0));
            let count = Arc::clone(&pulses);
            let line = IrqLine::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
                match fails {
                    true => Err(io::Error::other("no such wire")),
                    false => Ok(()),
                }
            });
            line.signal();
            line.clone().signal();
            assert_eq!(pulses.load(Ordering::Relaxed), 2);
        }
    }
}
