//! Why a tool could not do its work.

use std::error::Error;

use crate::host::report_file::ReportFileError;

/// Why a tool could not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// What was asked for is impossible: the message says what is possible.
    #[error("{0}")]
    Usage(String),
    /// The host, a file or a program was in the way.
    #[error("cannot {0}")]
    Failed(String, #[source] Box<dyn Error + Send + Sync>),
    /// The results have no place.
    #[error(transparent)]
    Output(#[from] ReportFileError),
    /// A signal asked this process to stop.
    #[error("stopped by signal {0}")]
    Stopped(i32),
}

/// What could not be done, for [`Result::map_err`].
pub(crate) fn cannot<E: Into<Box<dyn Error + Send + Sync>>>(
    what: impl Into<String>,
) -> impl FnOnce(E) -> ToolError {
    let what = what.into();
    move |source| ToolError::Failed(what, source.into())
}
