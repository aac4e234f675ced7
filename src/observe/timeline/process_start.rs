//! When this process was made, from the kernel's own record.
//!
//! /proc/self/stat has it, but in ticks of 10 ms. Finer, and open to every user, is the scheduler's account: a process
//! that has never slept has been running or waiting for a processor since it was made, and both are counted in ns. (The
//! kernel gives the age itself in us, as taskstats' ac_etime, but only with CAP_NET_ADMIN. Beside that, the account was right
//! to 4 us.) A process that slept, for its program's pages to come from a disk, say, is older than its account by that time;
//! then the tick limits the error.

use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use procfs::process::{Process, Schedstat};
use rustix::time::{ClockId, Timespec, clock_gettime};
use serde::Serialize;

/// What /proc counts in (USER_HZ, 100 on x86).
const TICK: Duration = Duration::from_millis(10);

/// Where the start time comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Source {
    /// The scheduler's account of the process.
    Schedstat,
    /// The tick in which it was made.
    Tick,
    /// Unknown, without /proc: the beginning of `main` is used.
    Main,
}

/// The start of the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct ProcessStart {
    #[serde(skip)]
    pub(super) at: Instant,
    /// The same on CLOCK_MONOTONIC, in ns since boot, for who measures from outside.
    pub(super) monotonic_ns: u64,
    pub(super) source: Source,
    /// The error is at most this; `None` if the start is unknown.
    pub(super) within_ns: Option<u64>,
}

/// What the kernel knows of the process's past.
struct Account {
    /// Time since the tick in which it was made began.
    since_tick: Duration,
    /// Time running and waiting for a processor; `None` where the kernel does not count the waiting.
    busy: Option<Duration>,
    slept: bool,
    /// How long it took to read all this.
    reading: Duration,
}

impl ProcessStart {
    /// Finds the start of this process, which has one thread.
    pub(super) fn find(main: Instant) -> Self {
        let now = Instant::now();
        let monotonic = since_zero(clock_gettime(ClockId::Monotonic));
        let (age, source, within) = match Account::read(now) {
            Some(account) => account.age(),
            None => (Duration::ZERO, Source::Main, None),
        };
        // Time that a hypervisor steals is in nobody's account.
        let age = age.max(now - main);
        Self {
            at: now.checked_sub(age).unwrap_or(main),
            monotonic_ns: monotonic.saturating_sub(age).as_nanos() as u64,
            source,
            within_ns: within.map(|within| within.as_nanos() as u64),
        }
    }
}

impl Account {
    fn read(now: Instant) -> Option<Self> {
        let ran = since_zero(clock_gettime(ClockId::ProcessCPUTime));
        let process = Process::myself().ok()?;
        let waited = process.schedstat().ok().and_then(waited_for_processor);
        let slept = getrusage(UsageWho::RUSAGE_SELF)
            .map_or(true, |usage| usage.voluntary_context_switches() > 0);
        let reading = now.elapsed();
        let boottime = since_zero(clock_gettime(ClockId::Boottime)) - reading;
        // Rounded down to whole ticks.
        let ticks = u32::try_from(process.stat().ok()?.starttime).ok()?;
        Some(Self {
            since_tick: boottime.checked_sub(TICK * ticks)?,
            busy: waited.map(|waited| ran + waited),
            slept,
            reading,
        })
    }

    fn age(&self) -> (Duration, Source, Option<Duration>) {
        let youngest = self.since_tick.saturating_sub(TICK);
        let (age, source, within) = match self.busy {
            Some(busy) if self.slept => {
                let age = busy.clamp(youngest, self.since_tick);
                (age, Source::Schedstat, self.since_tick - age)
            }
            Some(busy) => (busy, Source::Schedstat, Duration::ZERO),
            None => (self.since_tick, Source::Tick, self.since_tick - youngest),
        };
        (age, source, Some(within.max(self.reading)))
    }
}

fn since_zero(time: Timespec) -> Duration {
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

/// `None` if the kernel does not count: this process has run at least once.
fn waited_for_processor(account: Schedstat) -> Option<Duration> {
    (account.pcount > 0).then_some(Duration::from_nanos(account.run_delay))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn the_tick_bounds_what_the_account_cannot_know() {
        let account = |busy: Option<u32>, slept| Account {
            since_tick: MS * 23,
            busy: busy.map(|ms| MS * ms),
            slept,
            reading: MS / 50,
        };
        // Never slept: the account is all.
        let age = account(Some(15), false).age();
        assert_eq!(age, (MS * 15, Source::Schedstat, Some(MS / 50)));
        // Slept: older than its account by up to what is left of the tick.
        let age = account(Some(15), true).age();
        assert_eq!(age, (MS * 15, Source::Schedstat, Some(MS * 8)));
        // Slept for long: it is at least as old as the tick's end says.
        let age = account(Some(5), true).age();
        assert_eq!(age, (MS * 13, Source::Schedstat, Some(MS * 10)));
        let age = account(Some(25), true).age();
        assert_eq!(age, (MS * 23, Source::Schedstat, Some(MS / 50)));
        let age = account(None, false).age();
        assert_eq!(age, (MS * 23, Source::Tick, Some(MS * 10)));
    }

    #[test]
    fn this_process_started_before_now() {
        let main = Instant::now();
        let start = ProcessStart::find(main);
        assert_ne!(start.source, Source::Main);
        assert!(start.at <= main);
        let now = since_zero(clock_gettime(ClockId::Monotonic));
        assert!(Duration::from_nanos(start.monotonic_ns) < now);
    }
}
