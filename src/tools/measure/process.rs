//! One run of a program: when it first said something, when it said a certain thing, when it ended.

use std::ffi::OsString;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use memchr::memmem;
use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionbio;
use rustix::process::{
    Pid, PidfdFlags, Signal, getpid, getppid, kill_process_group, pidfd_open,
    set_parent_process_death_signal,
};

use crate::console::Signals;
use crate::tools::error::{ToolError, cannot};

/// How much of a program's output is kept, in bytes: the last of it.
const KEPT: usize = 64 << 10;

/// What a run is watched for.
#[derive(Default)]
pub struct Watch<'a> {
    /// Words on the program's stdout to note the time of.
    pub marker: Option<&'a str>,
    /// Longest time; then it is killed.
    pub limit: Duration,
    /// Kill it when the marker appears.
    pub stop_at_marker: bool,
    /// Called with the process id when the marker appears, and at intervals of [`Self::sample_every`]. The time that it takes
    /// delays the times measured after it.
    pub sample: Option<&'a mut dyn FnMut(u32)>,
    /// Interval of calls of [`Self::sample`]; without it, there is only the one at the marker.
    pub sample_every: Option<Duration>,
}

/// What a run was like. Times count from just before the process was made.
#[derive(Debug, Default)]
pub struct Run {
    /// First byte on stdout.
    pub first_output: Option<Duration>,
    /// The marker's last byte on stdout.
    pub marker: Option<Duration>,
    /// The process's end, where it ended by itself.
    pub end: Option<Duration>,
    /// How it ended.
    pub status: Option<ExitStatus>,
    /// Whether it was killed because it took too long.
    pub timed_out: bool,
    /// The last of its stdout.
    pub stdout: Vec<u8>,
    /// The last of its stderr.
    pub stderr: Vec<u8>,
    /// The signal that asked this process to stop meanwhile.
    stopped: Option<i32>,
}

/// Runs a program, words as for execvp(3), without input, in a process group of its own. Nothing of it outlives this call, nor
/// this process, but for processes that left the group. To be called from one thread only: the kernel kills the program when the
/// thread ends that started it.
pub fn run(words: &[OsString], watch: Watch<'_>, signals: &Signals) -> Result<Run, ToolError> {
    let Some((program, args)) = words.split_first() else {
        return Ok(Run::default());
    };
    let mut command = Command::new(program);
    command
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0);
    die_with_parent(&mut command);

    let program = program.to_string_lossy();
    let start = Instant::now();
    let mut child = command
        .spawn()
        .map(Killed)
        .map_err(cannot(format!("run {program}")))?;
    let run =
        observe(&mut child.0, start, watch, signals).map_err(cannot(format!("watch {program}")))?;
    match run.stopped {
        Some(signal) => Err(ToolError::Stopped(signal)),
        None => Ok(run),
    }
}

/// The kernel kills the child when this process is gone, however it went; and the child has no signal blocked, as this process
/// has.
#[allow(unsafe_code, reason = "code between fork and exec")]
pub(super) fn die_with_parent(command: &mut Command) {
    let parent = getpid();
    let between = move || {
        SigSet::empty().thread_set_mask()?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        // It may be gone already.
        match getppid() {
            Some(pid) if pid == parent => Ok(()),
            _ => Err(io::ErrorKind::Other.into()),
        }
    };
    // SAFETY: the closure makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(between) };
}

/// A child that does not outlive its owner, nor does its process group.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        if let Some(group) = Pid::from_raw(self.0.id() as i32) {
            // Usually none of it is left.
            let _ = kill_process_group(group, Signal::KILL);
        }
        let _ = self.0.wait();
    }
}

fn observe(
    child: &mut Child,
    start: Instant,
    mut watch: Watch<'_>,
    signals: &Signals,
) -> io::Result<Run> {
    let pid = child.id();
    let process = open_pidfd(pid)?;
    let mut stdout = Pipe::new(child.stdout.take())?;
    let mut stderr = Pipe::new(child.stderr.take())?;
    let mut run = Run::default();
    let mut next_sample = watch.sample_every;
    while run.end.is_none() {
        let now = start.elapsed();
        let until = next_sample.map_or(watch.limit, |at| at.min(watch.limit));
        wait(
            &[
                Some(process.as_fd()),
                Some(signals.as_fd()),
                stdout.fd(),
                stderr.fd(),
            ],
            until.saturating_sub(now),
        )?;
        let now = start.elapsed();
        // Before the output is read: what it wrote is in the pipe when it has ended.
        let ended = child.try_wait()?;
        if stdout.read()? {
            run.first_output.get_or_insert(now);
            if run.marker.is_none() && watch.marker.is_some_and(|text| stdout.has_new(text)) {
                run.marker = Some(now);
                watch.sample.iter_mut().for_each(|sample| sample(pid));
                if watch.stop_at_marker {
                    break;
                }
            }
        }
        stderr.read()?;
        if let Some(status) = ended {
            run.end = Some(now);
            run.status = Some(status);
        } else if let Some(signal) = signals.stop_requested() {
            run.stopped = Some(signal);
            break;
        } else if now >= watch.limit {
            run.timed_out = true;
            break;
        } else if next_sample.is_some_and(|at| now >= at) {
            watch.sample.iter_mut().for_each(|sample| sample(pid));
            next_sample = watch.sample_every.map(|every| start.elapsed() + every);
        }
    }
    run.stdout = stdout.bytes;
    run.stderr = stderr.bytes;
    Ok(run)
}

fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    let pid = Pid::from_raw(pid as i32).ok_or(io::ErrorKind::NotFound)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Waits until one of these is readable, or the time is over.
fn wait(files: &[Option<BorrowedFd<'_>>], time: Duration) -> io::Result<()> {
    let mut files: Vec<PollFd<'_>> = files
        .iter()
        .flatten()
        .map(|file| PollFd::from_borrowed_fd(*file, PollFlags::IN))
        .collect();
    // Longer than any measurement, if it does not fit.
    let time = Timespec::try_from(time).ok();
    match poll(&mut files, time.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

/// The reading end of a pipe, until its writers have closed it, and the last of what was read.
struct Pipe<R> {
    end: Option<R>,
    bytes: Vec<u8>,
    /// Where in `bytes` the last read began.
    new: usize,
}

impl<R: Read + AsFd> Pipe<R> {
    fn new(end: Option<R>) -> io::Result<Self> {
        if let Some(end) = &end {
            ioctl_fionbio(end, true)?;
        }
        Ok(Self {
            end,
            bytes: Vec::new(),
            new: 0,
        })
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.end.as_ref().map(AsFd::as_fd)
    }

    /// Reads what the pipe holds; returns whether that was anything.
    fn read(&mut self) -> io::Result<bool> {
        if self.bytes.len() > 2 * KEPT {
            self.bytes.drain(..self.bytes.len() - KEPT);
        }
        self.new = self.bytes.len();
        let mut buffer = [0; 16 << 10];
        while let Some(end) = &mut self.end {
            match end.read(&mut buffer) {
                Ok(0) => self.end = None,
                Ok(count) => self.bytes.extend(buffer.iter().take(count)),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
            if self.bytes.len() - self.new > KEPT {
                break;
            }
        }
        Ok(self.bytes.len() > self.new)
    }

    /// Whether the last read completed these words.
    fn has_new(&self, words: &str) -> bool {
        let from = self.new.saturating_sub(words.len().saturating_sub(1));
        let new = self.bytes.get(from..).unwrap_or_default();
        memmem::find(new, words.as_bytes()).is_some()
    }
}

/// Adds a run's exit status, as a shell has it (128 and the number of a signal), to those that were seen before.
pub(crate) fn note_status(statuses: &mut Vec<i32>, run: &Run) {
    let code = run.status.and_then(|status| {
        let signal = status.signal().map(|signal| 128 + signal);
        status.code().or(signal)
    });
    statuses.extend(code.filter(|code| !statuses.contains(code)));
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sh(script: &str, watch: Watch<'_>) -> Run {
        let words = ["sh", "-c", script].map(OsString::from);
        // Signals of the test process stay as they are: none is blocked here.
        run(&words, watch, &Signals::none().unwrap()).unwrap()
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn times_are_in_order() {
        let run = sh(
            "printf a; sleep 0.05; printf 'bc mar'; sleep 0.05; printf 'ker d'; sleep 0.05; echo no >&2; exit 3",
            Watch {
                marker: Some("marker"),
                limit: LONG,
                ..Watch::default()
            },
        );
        let (first, marker, end) = (
            run.first_output.unwrap(),
            run.marker.unwrap(),
            run.end.unwrap(),
        );
        // Each is seen late on a busy machine, but none after the next.
        assert!(first < marker && marker < end, "{run:?}");
        assert!(marker >= Duration::from_millis(100), "{run:?}");
        assert!(end >= Duration::from_millis(150), "{run:?}");
        assert_eq!(run.status.unwrap().code(), Some(3));
        assert_eq!(
            (&run.stdout[..], &run.stderr[..]),
            (&b"abc marker d"[..], &b"no\n"[..])
        );
        assert!(!run.timed_out);
    }

    #[test]
    fn the_end_of_long_output_is_kept() {
        let run = sh(
            "head -c 3000000 /dev/zero; echo marker",
            Watch {
                marker: Some("marker"),
                limit: LONG,
                ..Watch::default()
            },
        );
        assert!(run.marker.is_some());
        assert!(run.stdout.ends_with(b"\0marker\n"));
        assert!(run.stdout.len() <= 4 * KEPT, "{}", run.stdout.len());
    }

    #[test]
    fn a_timeout_kills_the_process_group() {
        let run = sh(
            "sleep 1000 & echo $!; wait",
            Watch {
                limit: Duration::from_millis(300),
                ..Watch::default()
            },
        );
        assert!(run.timed_out && run.end.is_none());
        let sleeper = String::from_utf8(run.stdout).unwrap();
        assert!(gone(sleeper.trim()), "{sleeper}");
    }

    /// Whether a process has ended, or does so soon.
    fn gone(pid: &str) -> bool {
        let alive = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            // A zombie whose new parent is slow.
            !stat.is_empty() && !stat.contains(") Z ")
        };
        (0..1000).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            !alive()
        })
    }

    #[test]
    fn it_is_sampled_at_the_marker_and_at_intervals() {
        let mut samples = Vec::new();
        let run = sh(
            "echo marker; sleep 1000",
            Watch {
                marker: Some("marker"),
                limit: LONG,
                stop_at_marker: true,
                sample: Some(&mut |pid| {
                    samples.push(std::path::Path::new("/proc").join(pid.to_string()).exists())
                }),
                ..Watch::default()
            },
        );
        assert!(run.marker.is_some() && run.end.is_none() && !run.timed_out);
        assert_eq!(samples, [true]);

        let mut count = 0;
        sh(
            "sleep 0.2",
            Watch {
                limit: LONG,
                sample: Some(&mut |_| count += 1),
                sample_every: Some(Duration::from_millis(10)),
                ..Watch::default()
            },
        );
        assert!(count >= 2, "{count}");
    }

    #[test]
    fn a_missing_program_is_named() {
        let words = [OsString::from("/nowhere/vmm")];
        let watch = Watch::default();
        let error = run(&words, watch, &Signals::none().unwrap()).unwrap_err();
        assert_eq!(
            crate::error_chain(&error),
            "cannot run /nowhere/vmm: No such file or directory (os error 2)"
        );
    }
}
