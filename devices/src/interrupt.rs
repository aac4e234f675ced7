//! Interrupts: a device holds an [`IrqLine`] and never knows its GSI.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// The interrupt controller's end of an [`IrqLine`].
pub trait IrqTrigger: Send + Sync {
    /// Sends one edge: each call is one pulse.
    fn signal(&self) -> io::Result<()>;
}

/// An edge-triggered interrupt line, as its device sees it.
#[derive(Clone)]
pub struct IrqLine(Option<Arc<Line>>);

struct Line {
    trigger: Arc<dyn IrqTrigger>,
    /// An error has been logged. Later ones are not, or a guest could flood the log.
    failed: AtomicBool,
}

impl IrqLine {
    /// A line that is connected to `trigger`.
    pub fn new(trigger: Arc<dyn IrqTrigger>) -> Self {
        Self(Some(Arc::new(Line {
            trigger,
            failed: AtomicBool::new(false),
        })))
    }

    /// An unconnected line, for tests.
    pub fn detached() -> Self {
        Self(None)
    }

    /// Sends an edge. A device cannot handle a failure, so the first one is logged and the rest are ignored.
    pub fn signal(&self) {
        let Some(line) = &self.0 else { return };
        if let Err(e) = line.trigger.signal()
            && !line.failed.swap(true, Ordering::Relaxed)
        {
            log::error!("cannot signal an interrupt (reported once): {e}");
        }
    }
}

impl fmt::Debug for IrqLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "IrqLine(connected)"
        } else {
            "IrqLine(detached)"
        })
    }
}

/// For tests: counts pulses.
#[cfg(any(test, feature = "testing"))]
#[derive(Default)]
pub struct Pulses(std::sync::atomic::AtomicUsize);

#[cfg(any(test, feature = "testing"))]
impl Pulses {
    /// How many there were since this was last asked.
    pub fn take(&self) -> usize {
        self.0.swap(0, Ordering::Relaxed)
    }
}

#[cfg(any(test, feature = "testing"))]
impl IrqTrigger for Pulses {
    fn signal(&self) -> io::Result<()> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn each_signal_is_one_pulse_and_clones_share_the_wire() {
        let pulses = Arc::new(Pulses::default());
        let line = IrqLine::new(pulses.clone());
        line.signal();
        line.clone().signal();
        assert_eq!(pulses.take(), 2);
        IrqLine::detached().signal();
    }

    #[test]
    fn a_failing_sink_is_survived() {
        struct Broken(AtomicUsize);
        impl IrqTrigger for Broken {
            fn signal(&self) -> io::Result<()> {
                self.0.fetch_add(1, Ordering::Relaxed);
                Err(io::Error::other("no such wire"))
            }
        }
        let sink = Arc::new(Broken(AtomicUsize::new(0)));
        let line = IrqLine::new(sink.clone());
        line.signal();
        line.signal();
        assert_eq!(sink.0.load(Ordering::Relaxed), 2);
    }
}
