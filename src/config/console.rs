//! Where the console goes: the value of `--serial`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use thiserror::Error;

/// Where the guest's console goes. Written `stdio`, `pty`, `file=F` or `none`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// minivmm's own stdin and stdout.
    #[default]
    Stdio,
    /// A new pseudo-terminal that others attach to.
    Pty,
    /// A file for the output, created or emptied; no input.
    File(PathBuf),
    /// Nowhere; no input.
    None,
}

/// A text that names no [`ConsoleTarget`].
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("unknown console target {0:?}; use stdio, pty, file=PATH or none")]
pub struct ConsoleTargetError(String);

impl FromStr for ConsoleTarget {
    type Err = ConsoleTargetError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stdio" => Ok(Self::Stdio),
            "pty" => Ok(Self::Pty),
            "none" => Ok(Self::None),
            _ => match text.strip_prefix("file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(path.into())),
                _ => Err(ConsoleTargetError(text.to_owned())),
            },
        }
    }
}

impl fmt::Display for ConsoleTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdio => f.write_str("stdio"),
            Self::Pty => f.write_str("pty"),
            Self::File(path) => write!(f, "file={}", path.display()),
            Self::None => f.write_str("none"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_mode_is_read_as_it_is_written() {
        for text in ["stdio", "pty", "none", "file=/tmp/a=b"] {
            assert_eq!(text.parse::<ConsoleTarget>().unwrap().to_string(), text);
            let json = serde_json::to_string(text).unwrap();
            let mode: ConsoleTarget = serde_json::from_str(&json).unwrap();
            assert_eq!(serde_json::to_string(&mode).unwrap(), json);
        }
    }

    #[test]
    fn others_are_refused_with_the_choices() {
        for text in ["", "file", "file=", "tty", "Stdio"] {
            let error = text.parse::<ConsoleTarget>().unwrap_err().to_string();
            assert!(error.contains("stdio, pty, file=PATH or none"), "{error}");
            assert!(serde_json::from_str::<ConsoleTarget>(&format!("{text:?}")).is_err());
        }
    }
}
