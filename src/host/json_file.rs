//! A JSON report file, opened and checked before the run that it reports on.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::host::output;

/// Why the report cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum JsonFileError {
    /// `-` would be where the guest's output goes.
    #[error(
        "the timeline cannot go to stdout, which is the guest's: leave the file out for a table on stderr, or name \
         /dev/stderr for JSON"
    )]
    Stdout,
    /// The file would be overwritten, perhaps by a mistake on the command line.
    #[error("{} exists and is not JSON: a report would overwrite it; remove it or name another file", .0.display())]
    WouldOverwrite(PathBuf),
    /// A system call failed.
    #[error("cannot write a report to {}", path.display())]
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
pub struct JsonFile {
    path: PathBuf,
    file: File,
    /// It can be emptied.
    is_regular: bool,
}

impl JsonFile {
    /// Opens or creates the file.
    pub fn open(path: PathBuf) -> Result<Self, JsonFileError> {
        if path == Path::new("-") {
            return Err(JsonFileError::Stdout);
        }
        let checked = output::open(&path).and_then(|file| {
            let is_regular = file.metadata()?.is_file();
            Ok((would_overwrite(&path, &file)?, file, is_regular))
        });
        match checked {
            Ok((true, ..)) => Err(JsonFileError::WouldOverwrite(path)),
            Ok((false, file, is_regular)) => Ok(Self {
                path,
                file,
                is_regular,
            }),
            Err(source) => Err(JsonFileError::Write { path, source }),
        }
    }

    /// Puts the report into the file in place of what it had.
    pub fn write(mut self, report: &impl Serialize) -> Result<(), JsonFileError> {
        let mut write = || {
            if self.is_regular {
                self.file.set_len(0)?;
            }
            let mut json = serde_json::to_string_pretty(report)?;
            json.push('\n');
            self.file.write_all(json.as_bytes())
        };
        write().map_err(|source| JsonFileError::Write {
            path: self.path,
            source,
        })
    }
}

/// Whether `file`, opened from `path`, has something in it that is not JSON.
fn would_overwrite(path: &Path, file: &File) -> io::Result<bool> {
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
    Ok(first != *b"{")
}
