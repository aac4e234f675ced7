//! Errors of the first process.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

/// Why the program could not be run, and the exit status.
pub(super) struct Failure {
    pub(super) status: u8,
    pub(super) text: String,
}

/// What could not be done, for an error.
pub(super) fn cannot<E: std::fmt::Display>(what: impl std::fmt::Display) -> impl Fn(E) -> Failure {
    move |e| Failure {
        // As docker has it for what is not the program's fault.
        status: 125,
        text: format!("cannot {what}: {e}"),
    }
}

/// For the error about a program.
pub(super) fn cannot_run(name: &str) -> impl Fn(io::Error) -> Failure {
    move |e| Failure {
        // As shells and docker have it.
        status: if e.kind() == io::ErrorKind::NotFound {
            127
        } else {
            126
        },
        text: format!("cannot run '{name}': {e}"),
    }
}

/// Makes a directory and those above it.
pub(super) fn make_directory(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path)
}

/// A C string, if there is no NUL in it.
pub(super) fn c_string(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(cannot("pass on a string with a NUL"))
}
