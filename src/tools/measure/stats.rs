//! Statistics of many runs.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Times of one thing over many runs, in milliseconds. A percentile is the least time that so many of the runs did not
/// exceed (nearest rank), so it is always one that was measured; of fewer than 100 runs, p99 is the slowest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Half of the runs took no longer.
    pub median_ms: f64,
    /// Nine in ten took no longer.
    pub p90_ms: f64,
    /// All but one in a hundred took no longer.
    pub p99_ms: f64,
    /// The quickest run.
    pub min_ms: f64,
    /// The slowest run.
    pub max_ms: f64,
    /// Every run, in the order of measurement.
    pub samples_ms: Vec<f64>,
}

impl Summary {
    /// `None` without a run.
    pub fn new(times: &[Duration]) -> Option<Self> {
        Self::of(times.iter().map(milliseconds).collect())
    }

    /// Adds a run, if it was timed, to those that were summed up before.
    pub(crate) fn add(summary: &mut Option<Self>, time: Option<Duration>) {
        if let Some(time) = time {
            let before = summary.take();
            let mut samples = before.map_or(Vec::new(), |summary| summary.samples_ms);
            samples.push(milliseconds(&time));
            *summary = Self::of(samples);
        }
    }

    fn of(samples: Vec<f64>) -> Option<Self> {
        let mut sorted = samples.clone();
        sorted.sort_by(f64::total_cmp);
        let (min, max) = (*sorted.first()?, *sorted.last()?);
        let percentile = |percent: usize| {
            let rank = (percent * sorted.len()).div_ceil(100).max(1);
            sorted.get(rank - 1).copied()
        };
        Some(Self {
            median_ms: percentile(50)?,
            p90_ms: percentile(90)?,
            p99_ms: percentile(99)?,
            min_ms: min,
            max_ms: max,
            samples_ms: samples,
        })
    }
}

fn milliseconds(time: &Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(ms: impl IntoIterator<Item = u64>) -> Option<Summary> {
        let times: Vec<Duration> = ms.into_iter().map(Duration::from_millis).collect();
        Summary::new(&times)
    }

    #[test]
    fn percentiles_are_measured_times() {
        let of_200 = summary((1..=200).rev()).unwrap();
        assert_eq!((of_200.median_ms, of_200.p90_ms), (100.0, 180.0));
        assert_eq!(
            (of_200.p99_ms, of_200.min_ms, of_200.max_ms),
            (198.0, 1.0, 200.0)
        );
        assert_eq!(of_200.samples_ms[0], 200.0);
        let of_3 = summary([30, 10, 20]).unwrap();
        assert_eq!(
            (of_3.median_ms, of_3.p90_ms, of_3.p99_ms),
            (20.0, 30.0, 30.0)
        );
        let of_1 = summary([7]).unwrap();
        assert_eq!((of_1.min_ms, of_1.median_ms, of_1.p99_ms), (7.0, 7.0, 7.0));
        assert_eq!(summary([]), None);
    }
}
