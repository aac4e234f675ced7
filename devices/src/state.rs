//! Pausing, saving and restoring devices. Saved state is plain data, in a versioned record for each device.
//!
//! Records are JSON: a reader skips fields that it does not know, so that a later version can add some; a record whose meaning
//! has changed gets a new version, which older readers refuse.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::value::{RawValue, to_raw_value};

/// A device's saved state.
pub type Record = RawValue;

/// Longest saved state of all devices in bytes: some hundred times what a VM with every device has.
pub const MAX_STATE: usize = 1 << 20;
/// How often a pause that takes long asks whether it is still wanted.
const STOP_PERIOD: Duration = Duration::from_millis(20);

/// Why devices cannot be paused, saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The fault is this device's.
    #[error("{0}: {1}")]
    Device(String, Box<StateError>),
    /// It is no JSON, or a field is missing or has another type.
    #[error("its saved state is damaged ({0})")]
    Unreadable(String),
    /// A record of a later version.
    #[error("its saved state has version {0}, and this minivmm knows versions up to {1}")]
    Version(u32, u32),
    /// A value that the device cannot have.
    #[error("its saved state is wrong: {0} {1}")]
    Value(&'static str, String),
    /// This machine has a device of which nothing was saved.
    #[error("the saved state has no such device")]
    Missing,
    /// A device was saved that this machine does not have.
    #[error("the saved state has it, but this VM does not")]
    Unknown,
    /// More than [`MAX_STATE`].
    #[error("{0} bytes of devices' state: at most {MAX_STATE} are read")]
    TooLong(usize),
    /// The host has not completed a request.
    #[error("the host has not completed its requests within {0:?}: it cannot be paused now")]
    Busy(Duration),
    /// A device was to be saved that was not paused.
    #[error("it is not paused")]
    NotPaused,
}

impl StateError {
    /// A field with a value that the device cannot have.
    pub(crate) fn value(field: &'static str, why: impl ToString) -> Self {
        let why = why.to_string();
        Self::Value(field, why)
    }

    fn of(device: &str) -> impl Fn(Self) -> Self {
        move |error| Self::Device(device.to_owned(), Box::new(error))
    }
}

/// State that can be saved and restored as plain data.
pub trait SaveState {
    /// What must be known to go on elsewhere. Only a paused device can be saved.
    fn save(&self) -> Result<Box<Record>, StateError>;

    /// Takes over what was saved, in a new device of the same kind. It is checked as if the guest had written it. After an
    /// error the device is not to be used.
    fn restore(&mut self, record: &Record) -> Result<(), StateError>;
}

/// A device that can be paused, and saved meanwhile. No vCPU runs from before the pause until after `resume`.
///
/// ```text
///            pause: true                restore
/// running ---------------> paused <---------------- new
///    ^                      |  ^
///    +------- resume -------+  +-- save
/// ```
pub trait Suspend: SaveState + Send {
    /// Completes the requests that were taken, and takes no others. `false` says that this has not come to an end within
    /// `wait`: the caller asks again, or resumes the device.
    fn pause(&mut self, _wait: Duration) -> bool {
        true
    }

    /// Goes on, also where `pause` returned `false`: then it may itself return `false`, and is to be called again until the
    /// host has completed what it held. After a restore, this raises the interrupts that may have been lost.
    fn resume(&mut self) -> bool {
        true
    }
}

#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    version: u32,
    state: T,
}

/// A record of this version.
pub(crate) fn to_record<T: Serialize>(version: u32, state: T) -> Result<Box<Record>, StateError> {
    to_raw_value(&Versioned { version, state }).map_err(unreadable)
}

/// Reads a record of at most this version.
pub(crate) fn from_record<T: DeserializeOwned>(
    known: u32,
    record: &Record,
) -> Result<T, StateError> {
    // A later version's state may have become unlike this one.
    let text = record.get();
    let Versioned { version, state } =
        serde_json::from_str::<Versioned<&Record>>(text).map_err(unreadable)?;
    if version > known {
        return Err(StateError::Version(version, known));
    }
    serde_json::from_str(state.get()).map_err(unreadable)
}

fn unreadable(error: serde_json::Error) -> StateError {
    StateError::Unreadable(error.to_string())
}

/// The devices of a machine that have state, by name.
#[derive(Default)]
pub struct Devices(Vec<(String, Arc<Mutex<dyn Suspend>>)>);

impl Devices {
    /// Adds a device. Names are unique, and the same in every VM of this configuration.
    pub fn add(&mut self, name: &str, device: Arc<Mutex<dyn Suspend>>) {
        self.0.push((name.to_owned(), device));
    }

    fn iter(&self) -> impl Iterator<Item = (&str, MutexGuard<'_, dyn Suspend + 'static>)> {
        let lock = |device| Mutex::lock(device).unwrap_or_else(PoisonError::into_inner);
        self.0
            .iter()
            .map(move |(name, device)| (name.as_str(), lock(device)))
    }

    /// Pauses all devices. If one is not paused within `limit`, or before `stop` says that this is no longer wanted, the error says
    /// which it was, and the caller resumes them. The vCPUs stand still; interrupts of the last completions are sent when this returns.
    pub fn pause(&self, limit: Duration, stop: &dyn Fn() -> bool) -> Result<(), StateError> {
        let end = Instant::now() + limit;
        // All are told before one is waited for.
        self.iter().for_each(|(_, mut device)| {
            device.pause(Duration::ZERO);
        });
        for (name, mut device) in self.iter() {
            loop {
                let left = end.saturating_duration_since(Instant::now());
                if device.pause(left.min(STOP_PERIOD)) {
                    break;
                }
                if left.is_zero() || stop() {
                    return Err(StateError::of(name)(StateError::Busy(limit)));
                }
            }
        }
        Ok(())
    }

    /// Has all devices go on, after a pause, a failed one too, or a restore; local APICs are as they were. `false` says that a
    /// device still waits for the host: this is to be called again in a moment, until it goes on as well.
    #[must_use]
    pub fn resume(&self) -> bool {
        self.iter()
            .fold(true, |all, (_, mut device)| device.resume() && all)
    }

    /// The state of all devices, which are paused: a JSON object of their records.
    pub fn save(&self) -> Result<Vec<u8>, StateError> {
        let mut records = BTreeMap::new();
        for (name, device) in self.iter() {
            records.insert(name, device.save().map_err(StateError::of(name))?);
        }
        serde_json::to_vec(&records).map_err(unreadable)
    }

    /// Gives new devices the state that was saved of as many others with the same names.
    pub fn restore(&self, state: &[u8]) -> Result<(), StateError> {
        if state.len() > MAX_STATE {
            return Err(StateError::TooLong(state.len()));
        }
        let mut records: BTreeMap<String, &Record> =
            serde_json::from_slice(state).map_err(unreadable)?;
        for (name, mut device) in self.iter() {
            let record = records.remove(name).ok_or(StateError::Missing);
            record
                .and_then(|record| device.restore(record))
                .map_err(StateError::of(name))?;
        }
        match records.pop_first() {
            Some((name, _)) => Err(StateError::of(&name)(StateError::Unknown)),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Saves its number; cannot be paused before `busy` attempts have failed.
    #[derive(Default)]
    struct Number {
        value: u8,
        busy: usize,
        resumed: usize,
    }

    impl SaveState for Number {
        fn save(&self) -> Result<Box<Record>, StateError> {
            to_record(2, self.value)
        }

        fn restore(&mut self, record: &Record) -> Result<(), StateError> {
            self.value = from_record(2, record)?;
            Ok(())
        }
    }

    impl Suspend for Number {
        fn pause(&mut self, _: Duration) -> bool {
            self.busy = self.busy.saturating_sub(1);
            self.busy == 0
        }

        fn resume(&mut self) -> bool {
            self.resumed += 1;
            self.resumed > 1
        }
    }

    fn two() -> (Devices, [Arc<Mutex<Number>>; 2]) {
        let numbers = [1, 2].map(|value| {
            Arc::new(Mutex::new(Number {
                value,
                ..Number::default()
            }))
        });
        let mut devices = Devices::default();
        devices.add("one", numbers[0].clone());
        devices.add("two", numbers[1].clone());
        (devices, numbers)
    }

    #[test]
    fn all_devices_are_restored_by_name() {
        let saved = two().0.save().unwrap();
        let (devices, numbers) = two();
        numbers.iter().for_each(|n| n.lock().unwrap().value = 77);
        devices.restore(&saved).unwrap();
        assert_eq!(numbers.map(|n| n.lock().unwrap().value), [1, 2]);
        assert_eq!(devices.save().unwrap(), saved);
    }

    #[test]
    fn a_device_that_stays_busy_is_named() {
        let (devices, numbers) = two();
        numbers[1].lock().unwrap().busy = 2;
        devices.pause(Duration::ZERO, &|| false).unwrap();
        numbers[1].lock().unwrap().busy = usize::MAX;
        for (limit, stop) in [
            (Duration::from_millis(1), false),
            (Duration::from_secs(1000), true),
        ] {
            let error = devices.pause(limit, &|| stop).unwrap_err().to_string();
            assert!(error.starts_with("two: the host has not"), "{error}");
        }
        assert!(!devices.resume());
        assert!(devices.resume());
        assert_eq!(numbers.map(|n| n.lock().unwrap().resumed), [2, 2]);
    }

    #[test]
    fn what_is_wrong_with_a_saved_state_is_said() {
        let long = vec![b' '; MAX_STATE + 1];
        let one = r#"{"one":{"version":2,"state":1},"#;
        for (rest, error) in [
            (
                r#"{"version":3,"state":{"new":1}}"#,
                "two: its saved state has version 3, ",
            ),
            (
                r#"{"version":3,"state":1}"#,
                "two: its saved state has version 3, ",
            ),
            (
                r#"{"version":2,"state":256}"#,
                "two: its saved state is damaged (invalid value",
            ),
            (
                r#"{"version":2}"#,
                "two: its saved state is damaged (missing field",
            ),
            (
                r#"{"state":1}"#,
                "two: its saved state is damaged (missing field",
            ),
            (r#"[2,3}"#, "its saved state is damaged"),
        ] {
            let state = format!(r#"{one}"two":{rest}}}"#);
            let found = two().0.restore(state.as_bytes()).unwrap_err().to_string();
            assert!(found.starts_with(error), "{found}");
        }
        for (state, error) in [
            (&b""[..], "its saved state is damaged"),
            (b"{}", "one: the saved state has no such device"),
            (
                br#"{"one":{"version":1,"state":1},"two":{"version":0,"state":2,"more":[]},"x":0}"#,
                "x: the saved state has it",
            ),
            (&long, "1048577 bytes of devices"),
        ] {
            let found = two().0.restore(state).unwrap_err().to_string();
            assert!(found.starts_with(error), "{found}");
        }
    }
}
