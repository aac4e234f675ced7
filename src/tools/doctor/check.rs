//! One line of the report.

use serde::Serialize;

use crate::error_chain;

/// How one check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// As it should be.
    Ok,
    /// Good to know, neither good nor bad.
    Info,
    /// A guest boots, and something will be missing or slow.
    Warn,
    /// Linux does not boot.
    Fail,
}

impl Verdict {
    /// Its word, and its colour's escape sequence (ECMA-48 § 8.3.117, SGR).
    pub(super) fn shown(self) -> (&'static str, &'static str) {
        match self {
            Verdict::Ok => ("ok", "\x1b[32m"),
            Verdict::Info => ("info", "\x1b[36m"),
            Verdict::Warn => ("warn", "\x1b[33m"),
            Verdict::Fail => ("FAIL", "\x1b[31m"),
        }
    }
}

/// One line of the doctor's report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// What was checked.
    pub subject: String,
    /// What was found.
    pub found: String,
    /// What that means.
    pub verdict: Verdict,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

impl Check {
    pub(super) fn new(
        verdict: Verdict,
        subject: impl Into<String>,
        found: impl Into<String>,
    ) -> Self {
        Self {
            subject: subject.into(),
            found: found.into(),
            verdict,
            hint: None,
        }
    }

    pub(super) fn ok(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Verdict::Ok, subject, found)
    }

    pub(super) fn info(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Verdict::Info, subject, found)
    }

    pub(super) fn warn(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Verdict::Warn, subject, found)
    }

    pub(super) fn fail(subject: impl Into<String>, found: impl Into<String>) -> Self {
        Self::new(Verdict::Fail, subject, found)
    }

    pub(super) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A file that cannot be loaded. The messages of [`crate::boot::BootError`] carry their hints.
    pub(super) fn unusable(subject: &str, error: &dyn std::error::Error) -> Self {
        let found = error_chain(error);
        match found.split_once("; ") {
            Some((found, hint)) => Check::fail(subject, found).hint(hint),
            None => Check::fail(subject, found),
        }
    }
}
