//! The file that a timeline goes to.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::Report;

/// Why there is no timeline in the file.
#[derive(Debug, thiserror::Error)]
pub enum TimelineError {
    /// `-` would be where the guest's output goes.
    #[error(
        "the timeline cannot go to stdout, which is the guest's: leave the file out for a table on stderr, or name \
         /dev/stderr for JSON"
    )]
    Stdout,
    /// A mistyped command line must not cost anybody a file.
    #[error("{} is there and is no JSON: a timeline would overwrite it; remove it or name another file", .0.display())]
    Precious(PathBuf),
    /// The host refused.
    #[error("cannot write the timeline to {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// The file, open for writing; until then it keeps what it has.
#[derive(Debug)]
pub struct TimelineFile {
    path: PathBuf,
    file: File,
}

impl TimelineFile {
    /// Opens or creates the file, before the VM takes its time: what is wrong with it shall be known early.
    pub fn open(path: PathBuf) -> Result<Self, TimelineError> {
        if path == Path::new("-") {
            return Err(TimelineError::Stdout);
        }
        match is_precious(&path).and_then(|precious| Ok((precious, open(&path)?))) {
            Ok((true, _)) => Err(TimelineError::Precious(path)),
            Ok((false, file)) => Ok(Self { path, file }),
            Err(source) => Err(TimelineError::Write { path, source }),
        }
    }

    /// Puts the report into the file, as JSON, in place of what it had.
    pub fn write(mut self, report: &Report) -> Result<(), TimelineError> {
        let mut write = || {
            if self.file.metadata()?.is_file() {
                self.file.set_len(0)?;
            }
            let mut json = serde_json::to_string_pretty(report)?;
            json.push('\n');
            self.file.write_all(json.as_bytes())
        };
        write().map_err(|source| TimelineError::Write {
            path: self.path,
            source,
        })
    }
}

/// Signals are blocked later on, and a FIFO's reader may never come: it is not waited for.
fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENXIO) => io::Error::other("nobody reads this FIFO; start its reader first"),
            _ => error,
        })
}

/// Whether the file has something in it that is no timeline.
fn is_precious(path: &Path) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.is_file() && metadata.len() > 0 => {
            let mut first = [0];
            File::open(path)?.read_exact(&mut first)?;
            Ok(first != *b"{")
        }
        Ok(_) => Ok(false),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(e),
    }
}
