//! A socket device: the value of `--vsock`.

use std::path::PathBuf;
use std::str::FromStr;

use super::list::{for_each_key, number};
use minivmm_devices::virtio::vsock::CIDS;
use serde::{Deserialize, Serialize};

/// How it is written on the command line.
const VSOCK_SYNTAX: &str = "path=SOCKET[,cid=N]";

/// Longest path of a Unix socket in bytes (unix(7)), with the zero byte behind it.
const MAX_PATH: usize = 108;

/// A socket device. Written as its help says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct VsockConfig {
    /// The Unix socket by which programs of the host reach the guest. Without it none does, as after a restore that names none.
    pub path: Option<PathBuf>,
    /// The guest's context ID.
    pub cid: u32,
    /// Whether the guest can make no connections itself.
    #[serde(skip)]
    pub accept_only: bool,
    /// Whether this process keeps a connection to the guest for itself.
    #[serde(skip)]
    pub reserve: bool,
}

impl Default for VsockConfig {
    fn default() -> Self {
        Self {
            path: None,
            cid: *CIDS.start(),
            accept_only: false,
            reserve: false,
        }
    }
}

impl VsockConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        let cid = self.cid;
        if !CIDS.contains(&cid) {
            let (first, last) = (CIDS.start(), CIDS.end());
            return Err(format!("cid={cid}: a guest has one from {first} to {last}"));
        }
        // With the guest's ports behind it, as in _4294967295.
        let longest = MAX_PATH - 1 - 11;
        match &self.path {
            Some(path) if path.as_os_str().is_empty() => {
                Err(format!("no socket: write {VSOCK_SYNTAX}"))
            }
            Some(path) if path.as_os_str().len() > longest => Err(format!(
                "{}: a path of more than {longest} bytes is too long for sockets",
                path.display()
            )),
            _ => Ok(()),
        }
    }
}

impl FromStr for VsockConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut config = Self::default();
        for_each_key(text, &[], |part, key, value| {
            let value = value.unwrap_or_default();
            match key {
                "path" => config.path = Some(value.into()),
                "cid" => config.cid = number(part, value)?,
                _ => return Err(format!("'{part}' is not known; write {VSOCK_SYNTAX}")),
            }
            Ok(())
        })?;
        config.path.get_or_insert_default();
        config.validate()?;
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_is_written_as_its_help_says() {
        let vsock = |text: &str| text.parse::<VsockConfig>();
        let config = vsock("path=v.sock,cid=52").unwrap();
        assert_eq!((config.path.unwrap(), config.cid), ("v.sock".into(), 52));
        assert_eq!(vsock("path=v").unwrap().cid, 3);
        let long = format!("path={}", "x".repeat(97));
        for (text, word) in [
            ("", "path=SOCKET"),
            ("cid=3", "no socket"),
            ("path=", "no socket"),
            ("path=v,cid=2", "from 3 to 4294967294"),
            ("path=v,cid=4294967295", "from 3 to 4294967294"),
            ("path=v,cid=x", "'cid=x'"),
            ("path=v,cid=3,cid=4", "twice"),
            ("path=v,port=4", "not known"),
            (&long, "more than 96 bytes"),
        ] {
            let error = vsock(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
