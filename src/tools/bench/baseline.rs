//! An earlier run, to be compared with.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::{Report, VmmReport};

/// Why an earlier run cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BaselineError {
    /// The file cannot be read.
    #[error("cannot read the baseline {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The file is not of `minivmm bench --json`.
    #[error("the baseline {} is not what minivmm bench --json writes", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// No times in it.
    #[error("the baseline {} has no times of minivmm", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// An earlier run.
pub(super) struct Baseline {
    path: PathBuf,
    report: Report,
}

pub(super) fn read(path: &Path) -> Result<Baseline, BaselineError> {
    let path = path.to_owned();
    let text = match fs::read_to_string(&path) {
        Ok(text) => text,
        Err(source) => return Err(BaselineError::Read { path, source }),
    };
    match serde_json::from_str::<Report>(&text) {
        Ok(report) if report.minivmm().is_none_or(|row| row.marker.is_none()) => {
            Err(BaselineError::Empty { path })
        }
        Ok(report) => Ok(Baseline { path, report }),
        Err(source) => Err(BaselineError::Parse { path, source }),
    }
}

impl Baseline {
    /// Whether minivmm is not slower than `max_ratio` times what it was; says so.
    pub(super) fn holds(&self, now: &Report, max_ratio: f64) -> bool {
        let path = self.path.display();
        let before = &self.report;
        if !now.host.is_like(&before.host) {
            log::warn!("the baseline {path} is of another host: {}", before.host);
        }
        if now.guest != before.guest || now.until != before.until {
            log::warn!("the baseline {path} is of another guest: {}", before.guest);
        }
        let ratios = ratios(before.minivmm(), now.minivmm());
        for (what, ratio) in &ratios {
            let words = format!("{what}: {ratio:.2} times the baseline's median");
            if *ratio > max_ratio {
                log::error!("{words}, more than {max_ratio}");
            } else {
                log::info!(target: crate::vm::NOTICE, "{words}");
            }
        }
        ratios.iter().all(|(_, ratio)| *ratio <= max_ratio)
    }
}

/// How the medians of what both runs measured have changed.
fn ratios(before: Option<&VmmReport>, now: Option<&VmmReport>) -> Vec<(&'static str, f64)> {
    let (Some(before), Some(now)) = (before, now) else {
        return Vec::new();
    };
    [
        ("marker", &before.marker, &now.marker),
        ("process end", &before.end, &now.end),
    ]
    .into_iter()
    .filter_map(|(what, before, now)| {
        Some((what, now.as_ref()?.median_ms / before.as_ref()?.median_ms))
    })
    .collect()
}
