//! Debian's docker-registry on loopback.

use std::fs;
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::PATIENCE;
use super::http::free_port;
use super::limit::within;
use super::skip::skip;

/// docker-registry on a port of its own.
pub(crate) struct Registry {
    child: Child,
    pub(crate) port: u16,
    _dir: TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        _ = self.child.kill();
        _ = self.child.wait();
    }
}

/// NAME:PASSWORD as htpasswd -B writes it: ann, secret.
const HTPASSWD: &str = "ann:$2y$04$huD/mY5iTr16SpSkvALm3.wBYr4KA79Wv40w5u2Wqnrkysu2wW12u\n";

impl Registry {
    /// `more` goes into its configuration, and `http` into that of its server. `None` where it is not installed.
    pub(crate) fn start(more: &str, http: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        fs::write(dir.path().join("htpasswd"), HTPASSWD).unwrap();
        // Another process may take the port that was free a moment ago.
        for _ in 0..10 {
            let port = free_port();
            let path = dir.path().display();
            let config = format!(
                "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {path}/data}}}}\n{}http:\n  addr: 127.0.0.1:{port}\n{http}",
                more.replace("DIR", &path.to_string())
            );
            fs::write(dir.path().join("config.yml"), config).unwrap();
            let mut command = Command::new("docker-registry");
            command.arg("serve").arg(dir.path().join("config.yml"));
            let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            let Ok(mut child) = child else {
                skip("docker-registry is not installed");
                return None;
            };
            let up = within(PATIENCE, || {
                let ended = child.try_wait().unwrap().is_some();
                let answers = TcpStream::connect(("127.0.0.1", port)).is_ok();
                (ended || answers).then_some(!ended)
            });
            if up == Some(true) {
                return Some(Self {
                    child,
                    port,
                    _dir: dir,
                });
            }
            _ = child.kill();
            _ = child.wait();
        }
        panic!("docker-registry does not start");
    }

    /// Puts the image of an OCI layout there by skopeo.
    pub(crate) fn push(&self, layout: &Path, name: &str) {
        let from = format!("oci:{}", layout.display());
        let to = format!("docker://127.0.0.1:{}/{name}", self.port);
        let args = ["--insecure-policy", "copy", "-q", "--dest-tls-verify=false"];
        let mut command = Command::new("skopeo");
        // Without the second it would compress the layers.
        command
            .args(args)
            .args(["--preserve-digests", "--dest-creds=ann:secret"]);
        let output = command.args([from, to]).output();
        let output = output.expect("skopeo, which umoci comes with, is installed");
        assert!(output.status.success(), "{output:?}");
    }
}
