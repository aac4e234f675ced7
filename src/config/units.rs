//! Sizes and time spans, written with their units.

use std::fmt;
use std::str::FromStr;
use std::time::{Duration, Instant};

/// A size of guest RAM. Written with a unit, as in `512M` or `2G`; units are powers of 1024.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemorySize {
    /// Size in bytes.
    pub bytes: u64,
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match parse_size::Config::new()
            .with_binary()
            .parse_size(text.trim())
        {
            Ok(bytes) => Ok(Self { bytes }),
            Err(e) => Err(format!("{e}; write a number and a unit, as in 512M or 2G")),
        }
    }
}

impl fmt::Display for MemorySize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (unit, letter) = [
            (1 << 40, "T"),
            (1 << 30, "G"),
            (1 << 20, "M"),
            (1 << 10, "K"),
        ]
        .into_iter()
        .find(|(unit, _)| self.bytes >= *unit && self.bytes.is_multiple_of(*unit))
        .unwrap_or((1u64, "B"));
        write!(f, "{}{letter}", self.bytes / unit)
    }
}

/// A time span. Written with a unit, as in `500ms`, `10s` or `2min`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span(pub Duration);

impl Span {
    /// The time this long after `start`; `None`, for never, if the clock cannot represent it.
    pub fn after(self, start: Instant) -> Option<Instant> {
        start.checked_add(self.0)
    }
}

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match humantime::parse_duration(text) {
            Ok(duration) => Ok(Self(duration)),
            Err(e) => Err(format!(
                "{e}; write a number and a unit, as in 500ms, 10s or 2min"
            )),
        }
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}
