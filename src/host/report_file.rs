//! The file of a report, opened and checked before the run that it reports on.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::host::output;

/// Why the report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum ReportFileError {
    /// `-` would be where the guest's output goes.
    #[error(
        "the timeline cannot go to stdout, which is the guest's: leave the file out for a table on stderr, or name \
         /dev/stderr for JSON"
    )]
    Stdout,
    /// The file would be overwritten, perhaps by a mistake on the command line.
    #[error("{} exists and is not {}: a report would overwrite it; remove it or name another file", .0.display(), .1)]
    WouldOverwrite(PathBuf, &'static str),
    /// A system call failed.
    #[error("cannot write a report to {}", .0.display())]
    Write(PathBuf, #[source] io::Error),
}

/// The file, open for writing; until then it keeps what it has.
#[derive(Debug)]
pub struct ReportFile {
    path: PathBuf,
    file: File,
    /// It can be emptied.
    is_regular: bool,
}

impl ReportFile {
    /// Opens or creates the file of a JSON report.
    pub fn open(path: PathBuf) -> Result<Self, ReportFileError> {
        if path == Path::new("-") {
            return Err(ReportFileError::Stdout);
        }
        Self::open_over(path, "JSON", b'{')
    }

    /// Opens or creates the file of an HTML report.
    pub fn open_html(path: PathBuf) -> Result<Self, ReportFileError> {
        Self::open_over(path, "HTML", b'<')
    }

    /// Opens a file that is new, empty, or begins with `first`, as a report of this kind does.
    fn open_over(path: PathBuf, kind: &'static str, first: u8) -> Result<Self, ReportFileError> {
        let checked = output::open(&path).and_then(|file| {
            let is_regular = file.metadata()?.is_file();
            Ok((would_overwrite(&path, &file, first)?, file, is_regular))
        });
        match checked {
            Ok((true, ..)) => Err(ReportFileError::WouldOverwrite(path, kind)),
            Ok((false, file, is_regular)) => Ok(Self {
                path,
                file,
                is_regular,
            }),
            Err(source) => Err(ReportFileError::Write(path, source)),
        }
    }

    /// Puts the report into the file, as JSON, in place of what it had.
    pub fn write_json(self, report: &impl Serialize) -> Result<(), ReportFileError> {
        match serde_json::to_string_pretty(report) {
            Ok(json) => self.write(&(json + "\n")),
            Err(e) => Err(ReportFileError::Write(self.path, e.into())),
        }
    }

    /// Puts text into the file in place of what it had.
    pub fn write(mut self, text: &str) -> Result<(), ReportFileError> {
        let emptied = match self.is_regular {
            true => self.file.set_len(0),
            false => Ok(()),
        };
        emptied
            .and_then(|()| self.file.write_all(text.as_bytes()))
            .map_err(|source| ReportFileError::Write(self.path, source))
    }
}

/// Whether `file`, opened from `path`, has something in it that does not begin as a report does.
fn would_overwrite(path: &Path, file: &File, report: u8) -> io::Result<bool> {
    let metadata = file.metadata()?;
    if !metadata.is_file() || metadata.len() == 0 {
        return Ok(false);
    }
    let mut reader = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)?;
    let same = reader.metadata()?;
    if (same.dev(), same.ino()) != (metadata.dev(), metadata.ino()) {
        return Err(io::Error::other("it was just replaced by another"));
    }
    let mut first = [0];
    reader.read_exact(&mut first)?;
    Ok(first != [report])
}
