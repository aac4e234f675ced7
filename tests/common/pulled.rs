//! An image for a registry, and a home that minivmm pulls it to. Not a part of `common`: it uses the library, which other
//! tests do not.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use minivmm::image::{How, Source, Store};
use tempfile::TempDir;

use crate::common::image::layout;
use crate::common::{Ended, minivmm, run};

/// Bytes of the file in the image.
pub(crate) const SIZE: usize = 3 << 20;

/// An OCI layout, and a home for minivmm with nothing in it.
pub(crate) struct Image {
    dir: TempDir,
    pub(crate) digest: String,
}

impl Image {
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        // Nothing that compresses.
        let mut state = 1u64;
        let mut next = || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1);
            (state >> 56) as u8
        };
        let content: Vec<u8> = (0..SIZE).map(|_| next()).collect();
        let layers = [("large", &content[..]), ("small", b"x")].map(|(name, content)| {
            let mut builder = tar::Builder::new(Vec::new());
            let mut header = tar::Header::new_gnu();
            header.set_size(content.len() as u64);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            builder.append_data(&mut header, name, content).unwrap();
            builder.into_inner().unwrap()
        });
        let digest = layout(&dir.path().join("oci"), &layers, r#"{"Cmd":["/x"]}"#);
        Self { dir, digest }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// minivmm in this home.
    pub(crate) fn minivmm(&self, args: &[&str]) -> Command {
        let mut command = minivmm(args);
        command.env("HOME", self.dir.path());
        for name in ["XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"] {
            command.env_remove(name);
        }
        command
    }

    pub(crate) fn pull(&self, name: &str) -> Ended {
        run(&mut self.minivmm(&["pull", name]))
    }

    #[track_caller]
    pub(crate) fn assert_pulled(&self, ended: &Ended) {
        ended.assert_code(0);
        assert_eq!(ended.out().trim(), self.digest, "{}", ended.stderr);
        // What is in the store is what the layout itself gives.
        let store = Store::open(&self.path("other")).unwrap();
        let source = Source::File(self.path("oci"), None);
        let wanted = source.load(&store, &How::default()).unwrap();
        let pulled = self.path(".cache/minivmm/images/v1");
        let pulled = pulled.join(&self.digest["sha256:".len()..]);
        let read = |path: &Path| fs::read(path).unwrap();
        assert!(read(&wanted.root) == read(&pulled.join("root.erofs")));
    }

    #[track_caller]
    pub(crate) fn assert_refused(&self, name: &str, wanted: &str) {
        let ended = self.pull(name);
        ended.assert_code(125);
        assert!(ended.stderr.contains(wanted), "{wanted}: {}", ended.stderr);
        // One line, and nothing is left.
        assert_eq!(ended.stderr.lines().count(), 1, "{}", ended.stderr);
        let listed = run(&mut self.minivmm(&["images"]));
        assert_eq!(listed.out().lines().count(), 1, "{}", listed.out());
    }
}
