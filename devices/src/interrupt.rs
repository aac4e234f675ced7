//! Interrupts as wires: a device holds an [`IrqLine`] and never knows a number.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// What an interrupt wire ends at.
pub trait InterruptSink: Send + Sync {
    /// Sends one edge: each call is one pulse.
    fn signal(&self) -> io::Result<()>;
}

/// The device's end of an interrupt wire.
#[derive(Clone)]
pub struct IrqLine(Option<Arc<Wire>>);

struct Wire {
    sink: Arc<dyn InterruptSink>,
    /// An error has been logged; the next ones stay silent, or a guest could flood the log.
    failed: AtomicBool,
}

impl IrqLine {
    /// A wire that ends at `sink`.
    pub fn new(sink: Arc<dyn InterruptSink>) -> Self {
        Self(Some(Arc::new(Wire {
            sink,
            failed: AtomicBool::new(false),
        })))
    }

    /// A wire that ends nowhere: for tests, and for a device whose interrupt is not connected.
    pub fn detached() -> Self {
        Self(None)
    }

    /// Pulses the wire. A device can do nothing about a failure, so it is logged once and otherwise ignored.
    pub fn signal(&self) {
        let Some(wire) = &self.0 else { return };
        if let Err(e) = wire.sink.signal()
            && !wire.failed.swap(true, Ordering::Relaxed)
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
impl InterruptSink for Pulses {
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
        impl InterruptSink for Broken {
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
