//! An image of busybox, made here: an OCI layout, an archive.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::linux::guest;
use super::{Ended, minivmm, run, sha256};

/// A capability of a file in an extended attribute: version 2, effective, CAP_NET_RAW.
const NET_RAW: [u8; 20] = [
    1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
];
/// Files in a directory of the image.
pub(crate) const MANY: usize = 10_000;

/// The image, and a store.
pub(crate) struct Image {
    dir: PathBuf,
    /// Whether its VMs boot; else the first leaves a template for the others.
    cold: bool,
    _own: Option<TempDir>,
}

/// Runs a test with VMs that boot, and with VMs that go on from a template.
pub(crate) fn both_ways(test: impl Fn(&Image)) {
    for cold in [true, false] {
        // Shown of a test that fails.
        println!("cold: {cold}");
        test(&Image::shared(cold));
    }
}

fn write(dir: &Path) {
    let config = r#"{"Env":["FROM_IMAGE=1","A=image"],"Cmd":["sh","-c","echo default"],"WorkingDir":"/etc","StopSignal":"SIGQUIT"}"#;
    layout(&dir.join("oci"), &layers(), config);
}

/// A layer: what is added to it goes below the root.
struct Layer(Builder<Vec<u8>>);

impl Layer {
    fn add(&mut self, path: &str, kind: EntryType, mode: u32, owner: u64, content: &[u8]) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_uid(owner);
        header.set_gid(owner);
        header.set_mtime(1_000_000_000);
        let is_link = [EntryType::Symlink, EntryType::Link].contains(&kind);
        let data = if is_link { &[] } else { content };
        header.set_size(data.len() as u64);
        if is_link {
            header.set_link_name_literal(content).unwrap();
        }
        self.0.append_data(&mut header, path, data).unwrap();
    }

    fn done(self) -> Vec<u8> {
        self.0.into_inner().unwrap()
    }
}

fn layers() -> [Vec<u8>; 2] {
    let busybox = guest("fetch", &["--offline", "busybox"]).join("busybox");
    let busybox = fs::read(busybox).unwrap();
    let mut base = Layer(Builder::new(Vec::new()));
    for dir in ["bin", "etc", "home", "gone", "many"] {
        base.add(dir, EntryType::Directory, 0o755, 0, b"");
    }
    base.add("bin/busybox", EntryType::Regular, 0o755, 0, &busybox);
    for name in ["sh", "cat", "id", "stty", "env", "sleep", "uname"] {
        base.add(
            &format!("bin/{name}"),
            EntryType::Symlink,
            0o777,
            0,
            b"busybox",
        );
    }
    let passwd = b"root:x:0:0:root:/root:/bin/sh\nann:x:1000:1001::/home/ann:/bin/sh\n";
    base.add("etc/passwd", EntryType::Regular, 0o644, 0, passwd);
    base.add(
        "etc/group",
        EntryType::Regular,
        0o644,
        0,
        b"wheel:x:10:ann\nann:x:1001:\n",
    );
    base.add("etc/hosts", EntryType::Symlink, 0o777, 0, b"/nowhere");
    base.add("home/ann", EntryType::Directory, 0o700, 1000, b"");
    base.add("gone/file", EntryType::Regular, 0o644, 0, b"x");
    for number in 0..MANY {
        base.add(&format!("many/{number}"), EntryType::Regular, 0o644, 0, b"");
    }
    let mut upper = Layer(Builder::new(Vec::new()));
    upper.add(".wh.gone", EntryType::Regular, 0o644, 0, b"");
    upper.add("bin/linked", EntryType::Link, 0o755, 0, b"bin/busybox");
    let xattrs = [
        ("SCHILY.xattr.security.capability", &NET_RAW[..]),
        ("SCHILY.xattr.user.note", &b"kept"[..]),
    ];
    upper.0.append_pax_extensions(xattrs).unwrap();
    upper.add(
        "bin/busybox-capable",
        EntryType::Regular,
        0o755,
        0,
        &busybox,
    );
    [base.done(), upper.done()]
}

/// Writes an OCI layout of these layers, uncompressed archives, with this configuration. Returns the digest of its manifest.
pub(crate) fn layout(dir: &Path, layers: &[Vec<u8>], config: &str) -> String {
    let blobs = dir.join("blobs/sha256");
    fs::create_dir_all(&blobs).unwrap();
    let put = |kind: &str, bytes: &[u8]| {
        let (digest, size) = (sha256(bytes), bytes.len());
        fs::write(blobs.join(&digest), bytes).unwrap();
        let kind = format!("application/vnd.oci.image.{kind}");
        format!(r#"{{"mediaType":"{kind}","digest":"sha256:{digest}","size":{size}}}"#)
    };
    let ids = layers.iter().map(|l| format!(r#""sha256:{}""#, sha256(l)));
    let config = format!(
        r#"{{"os":"linux","architecture":"amd64","config":{config},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        ids.collect::<Vec<_>>().join(",")
    );
    let layers = layers.iter().map(|l| put("layer.v1.tar", l));
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#,
        put("config.v1+json", config.as_bytes()),
        layers.collect::<Vec<_>>().join(",")
    );
    let index = put("manifest.v1+json", manifest.as_bytes());
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{index}]}}"#);
    fs::write(dir.join("index.json"), index).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    format!("sha256:{}", sha256(manifest.as_bytes()))
}

impl Image {
    /// With the store of all tests that are content with it, which import the image and make the template once.
    pub(crate) fn shared(cold: bool) -> Self {
        let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("image");
        let modified = |path: &Path| fs::metadata(path).and_then(|m| m.modified()).ok();
        let this = std::env::current_exe().unwrap();
        // It may be that of another build.
        if modified(&dir.join("oci/oci-layout")) < modified(&this) {
            _ = fs::remove_dir_all(&dir);
            write(&dir);
        }
        Self {
            dir,
            cold,
            _own: None,
        }
    }

    /// With a store of its own.
    pub(crate) fn new() -> Self {
        let dir = TempDir::new().unwrap();
        write(dir.path());
        Self {
            dir: dir.path().to_owned(),
            cold: false,
            _own: Some(dir),
        }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join("oci")
    }

    pub(crate) fn store(&self) -> &Path {
        &self.dir
    }

    /// minivmm run with the image, on this kernel.
    pub(crate) fn command(&self, kernel: &str, options: &[&str], command: &[&str]) -> Command {
        let mut run = self.minivmm(&["run", "--kernel", kernel]);
        run.args(self.cold.then_some("--cold"));
        run.args(options).arg(self.path()).args(command);
        run
    }

    /// minivmm with the same store and the same VMs.
    pub(crate) fn minivmm(&self, args: &[&str]) -> Command {
        let mut command = minivmm(args);
        command
            .env("XDG_CACHE_HOME", self.store())
            .env("XDG_DATA_HOME", self.store().join("data"))
            .env_remove("XDG_RUNTIME_DIR");
        command
    }

    pub(crate) fn run(&self, kernel: &str, options: &[&str], command: &[&str]) -> Ended {
        run(&mut self.command(kernel, options, command))
    }

    /// A script for the image's shell.
    pub(crate) fn sh(&self, kernel: &str, options: &[&str], script: &str) -> Ended {
        self.run(kernel, options, &["sh", "-c", script])
    }
}
