//! Images that umoci and tar unpack, and hostile ones.

mod hostile;
mod names;
mod store;

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use ::tar::{Builder, EntryType, Header};
use proptest::prelude::*;
use tempfile::TempDir;

use super::digest::Digest;
use super::*;

/// Runs a program; what it printed, and whether it succeeded.
fn output(dir: &Path, program: &str, args: &[&str]) -> Option<(bool, String)> {
    let mut command = Command::new(program);
    let output = match command.args(args).current_dir(dir).output() {
        Ok(output) => output,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            crate::skip::skip(&format!("{program} is not installed"));
            return None;
        }
        Err(e) => panic!("{program}: {e}"),
    };
    let text = [output.stdout, output.stderr].concat();
    Some((
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    ))
}

/// A member of a layer.
#[derive(Clone)]
struct Entry {
    path: String,
    kind: EntryType,
    /// A file's content or a link's target.
    content: Vec<u8>,
    mode: u32,
    owner: u64,
    xattr: Option<(String, Vec<u8>)>,
}

impl std::fmt::Debug for Entry {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            path,
            kind,
            content,
            mode,
            owner,
            ..
        } = self;
        write!(
            f,
            "{path} {kind:?} {} bytes {mode:o} {owner}",
            content.len()
        )
    }
}

fn entry(path: &str, kind: EntryType, content: impl Into<Vec<u8>>) -> Entry {
    Entry {
        path: path.to_owned(),
        kind,
        content: content.into(),
        mode: 0o755,
        owner: 0,
        xattr: None,
    }
}

fn file(path: &str, content: &str) -> Entry {
    entry(path, EntryType::Regular, content)
}

/// A layer, as a tar archive.
fn layer(entries: &[Entry]) -> Vec<u8> {
    let mut builder = Builder::new(Vec::new());
    for entry in entries {
        if let Some((name, value)) = &entry.xattr {
            let key = format!("SCHILY.xattr.{name}");
            builder
                .append_pax_extensions([(key.as_str(), value.as_slice())])
                .unwrap();
        }
        let mut header = Header::new_gnu();
        let is_file = entry.kind == EntryType::Regular;
        // As it is: the builder itself refuses what hostile archives have.
        header.as_old_mut().name[..entry.path.len()].copy_from_slice(entry.path.as_bytes());
        if [EntryType::Symlink, EntryType::Link].contains(&entry.kind) {
            header.set_link_name_literal(&entry.content).unwrap();
        }
        header.set_entry_type(entry.kind);
        header.set_mode(entry.mode);
        header.set_uid(entry.owner);
        header.set_gid(entry.owner);
        header.set_mtime(1_000_000_007);
        header.set_device_major(1).unwrap();
        header.set_device_minor(3).unwrap();
        let content = if is_file { &entry.content[..] } else { &[] };
        header.set_size(content.len() as u64);
        header.set_cksum();
        builder.append(&header, content).unwrap();
    }
    builder.into_inner().unwrap()
}

/// A header with nothing in it but these.
fn header(mut header: Header, kind: EntryType, size: usize) -> Header {
    header.set_entry_type(kind);
    header.set_size(size as u64);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

fn put(dir: &Path, bytes: &[u8]) -> String {
    let digest = Digest::of(bytes);
    fs::write(dir.join("blobs/sha256").join(digest.hex()), bytes).unwrap();
    format!(r#""digest":"{digest}","size":{}"#, bytes.len())
}

/// An OCI layout with these layers, as they are and as they are stored.
fn layout(dir: &Path, layers: &[(Vec<u8>, Vec<u8>)]) {
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
    let ids: Vec<String> = layers
        .iter()
        .map(|(plain, _)| format!("{:?}", Digest::of(plain).to_string()))
        .collect();
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{"Cmd":["/a"]}},"rootfs":{{"type":"layers","diff_ids":[{}]}}}}"#,
        ids.join(",")
    );
    let kind = "application/vnd.oci.image";
    let config = put(dir, config.as_bytes());
    let layers: Vec<String> = layers
        .iter()
        .map(|(_, stored)| {
            let blob = put(dir, stored);
            format!(r#"{{"mediaType":"{kind}.layer.v1.tar+gzip",{blob}}}"#)
        })
        .collect();
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"{kind}.manifest.v1+json","config":{{"mediaType":"{kind}.config.v1+json",{config}}},"layers":[{}]}}"#,
        layers.join(",")
    );
    let manifest = put(dir, manifest.as_bytes());
    let index = format!(
        r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"{kind}.manifest.v1+json",{manifest},"annotations":{{"org.opencontainers.image.ref.name":"it"}}}}]}}"#
    );
    fs::write(dir.join("index.json"), index).unwrap();
}

/// An archive of `docker save`, with an image of this layer for each tag.
fn docker_archive(path: &Path, plain: &[u8], tags: &[&str]) {
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","config":{{}},"rootfs":{{"diff_ids":["{}"]}}}}"#,
        Digest::of(plain)
    );
    let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    let images: Vec<String> = tags
        .iter()
        .map(|tag| {
            format!(r#"{{"Config":"{name}","RepoTags":["{tag}"],"Layers":["l/layer.tar"]}}"#)
        })
        .collect();
    let manifest = format!("[{}]", images.join(","));
    let mut builder = Builder::new(fs::File::create(path).unwrap());
    for (name, content) in [
        (name.as_str(), config.as_bytes()),
        ("l/layer.tar", plain),
        ("manifest.json", manifest.as_bytes()),
    ] {
        let mut header = header(Header::new_ustar(), EntryType::Regular, content.len());
        builder.append_data(&mut header, name, content).unwrap();
    }
    builder.finish().unwrap();
}

fn compressed(layers: &[Vec<u8>]) -> Vec<(Vec<u8>, Vec<u8>)> {
    layers
        .iter()
        .map(|plain| (plain.clone(), gzip(plain)))
        .collect()
}

struct Made {
    dir: TempDir,
    stored: Result<Stored, ImageError>,
}

fn store(dir: &Path) -> Store {
    Store::open(&dir.join("store")).unwrap()
}

/// The image with these layers.
fn make(layers: &[Vec<Entry>]) -> Made {
    let layers: Vec<Vec<u8>> = layers.iter().map(|entries| layer(entries)).collect();
    let dir = TempDir::new().unwrap();
    let oci = dir.path().join("oci");
    layout(&oci, &compressed(&layers));
    let stored = Source::File(oci, None).load(&store(dir.path()), &How::default());
    Made { dir, stored }
}

impl Made {
    #[track_caller]
    fn error(&self) -> String {
        crate::error_chain(self.stored.as_ref().unwrap_err())
    }

    /// What is in the image, by fsck.erofs, which checks it as well; `None` where that is not installed.
    fn tree(&self) -> Option<Vec<String>> {
        let stored = self.stored.as_ref().unwrap();
        let args = ["--extract=image", stored.root.to_str().unwrap()];
        let (good, text) = output(self.dir.path(), "fsck.erofs", &args)?;
        assert!(good, "{text}");
        Some(describe(&self.dir.path().join("image")))
    }
}

/// All files below a directory, a line each: name, type, permissions, owners, time, content.
fn describe(root: &Path) -> Vec<String> {
    let mut lines = Vec::new();
    let mut todo = vec![root.to_owned()];
    while let Some(path) = todo.pop() {
        let m = fs::symlink_metadata(&path).unwrap();
        let name = path.strip_prefix(root).unwrap().display().to_string();
        let content = if m.is_dir() {
            todo.extend(fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
            String::new()
        } else if m.is_symlink() {
            fs::read_link(&path).unwrap().display().to_string()
        } else if m.is_file() {
            Digest::of(&fs::read(&path).unwrap()).to_string()
        } else {
            m.rdev().to_string()
        };
        // Directories that an archive does not have are of the time when they are made.
        let time = if m.is_dir() { 0 } else { m.mtime() };
        lines.push(format!(
            "{name} {:o} {}:{} {time} {content}",
            m.mode(),
            m.uid(),
            m.gid()
        ));
    }
    lines.sort();
    lines
}

/// The names in an image.
fn names(tree: &[String]) -> Vec<&str> {
    tree.iter()
        .map(|line| line.split(' ').next().unwrap())
        .filter(|name| !name.is_empty())
        .collect()
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn small_name() -> impl Strategy<Value = String> {
    // Few, so that layers meet; one longer than others.
    prop::sample::select(vec!["a", "b", "c", "lib", "another-name"]).prop_map(str::to_owned)
}

fn path() -> impl Strategy<Value = String> {
    prop::collection::vec(small_name(), 1..4).prop_map(|parts| parts.join("/"))
}

fn any_entry() -> impl Strategy<Value = Entry> {
    let kind = prop_oneof![
        4 => Just(EntryType::Regular),
        3 => Just(EntryType::Directory),
        1 => Just(EntryType::Symlink),
        1 => Just(EntryType::Char),
        1 => Just(EntryType::Fifo),
        2 => Just(EntryType::Link),
        2 => Just(EntryType::GNULongName),
    ];
    let content = prop_oneof![
        Just(Vec::new()),
        prop::collection::vec(any::<u8>(), 1..50),
        (1usize..3, 0usize..2).prop_map(|(blocks, more)| vec![7; blocks * 4096 + more]),
        Just([vec![1; 10], vec![0; 20000], vec![2; 3]].concat()),
    ];
    (path(), kind, content, 0u32..8, 0u64..3).prop_map(|(path, kind, content, mode, owner)| {
        let (path, kind, content) = match kind {
            EntryType::Symlink | EntryType::Link => (path, kind, b"a/b".to_vec()),
            // Stands for a whiteout.
            EntryType::GNULongName => {
                let (dir, name) = path.rsplit_once('/').unwrap_or(("", &path));
                let name = if content.is_empty() { ".wh..opq" } else { name };
                let path = format!("{dir}/.wh.{name}")
                    .trim_start_matches('/')
                    .to_owned();
                (path, EntryType::Regular, Vec::new())
            }
            _ => (path, kind, content),
        };
        Entry {
            mode: 0o700 | mode,
            owner,
            ..entry(&path, kind, content)
        }
    })
}

#[test]
fn whiteouts_apply_to_lower_layers_wherever_they_stand() {
    let lower = vec![
        entry("d", EntryType::Directory, ""),
        file("d/old", "old"),
        file("gone", "x"),
        entry("e", EntryType::Directory, ""),
        file("e/old", "x"),
        file(".wh.odd", ""),
    ];
    let upper = vec![
        file("d/new", "new"),
        file("d/.wh..wh..opq", ""),
        file("e/new", "new"),
        file(".wh.e", ""),
        file(".wh.gone", ""),
        file(".wh.new", ""),
        file("new", "stays"),
        file(".wh..wh.plnk/1.2", "x"),
    ];
    let made = make(&[lower, upper]);
    if let Some(tree) = made.tree() {
        assert_eq!(names(&tree), ["d", "d/new", "e", "e/new", "new"]);
    }
}

#[test]
fn links_lead_through_the_merged_tree_and_not_out_of_it() {
    let first = vec![
        // Both before and behind what they name.
        entry("lib", EntryType::Symlink, "usr/lib"),
        file("lib/a", "a"),
        entry("usr/lib", EntryType::Directory, ""),
        entry("up", EntryType::Symlink, "../../../../up-to"),
        file("up/escaped", "x"),
        entry("abs", EntryType::Symlink, "/abs-to"),
        file("abs/inside", "x"),
        entry("before", EntryType::Link, "target"),
        file("target", "t"),
    ];
    let second = vec![
        entry("hard", EntryType::Link, "./lib/a"),
        file("target", "new"),
        entry("soft", EntryType::Symlink, "target"),
        entry("to-soft", EntryType::Link, "/soft"),
    ];
    let made = make(&[first, second]);
    let Some(tree) = made.tree() else { return };
    let line = |name: &str| {
        let found = tree
            .iter()
            .find(|line| line.starts_with(&format!("{name} ")));
        found
            .unwrap_or_else(|| panic!("no {name} in {tree:#?}"))
            .clone()
    };
    let image = made.stored.as_ref().unwrap().root.to_str().unwrap();
    for name in ["usr/lib/a", "hard", "to-soft", "soft"] {
        // fsck.erofs makes no links.
        let path = format!("--path=/{name}");
        let (_, dump) = output(made.dir.path(), "dump.erofs", &[&path, image]).unwrap();
        assert!(dump.contains("Links: 2"), "{name}: {dump}");
    }
    line("up-to/escaped");
    line("abs-to/inside");
    // The old file, which the new one does not change.
    let old = Digest::of(b"t").to_string();
    assert!(line("before").ends_with(&old) && !line("target").ends_with(&old));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn an_image_is_what_umoci_unpacks(layers in prop::collection::vec(prop::collection::vec(any_entry(), 0..8), 1..4)) {
        if !is_root() {
            crate::skip::skip("owners and devices take root");
            return Ok(());
        }
        let made = make(&layers);
        let args = ["unpack", "--image", "oci:it", "bundle"];
        let Some((good, text)) = output(made.dir.path(), "umoci", &args) else {
            return Ok(());
        };
        // umoci gives up where a hard link comes before its target.
        prop_assert!(made.stored.is_ok() || !good, "{:?} {}", made.stored, text);
        if good && let Some(ours) = made.tree() {
            prop_assert_eq!(ours, describe(&made.dir.path().join("bundle/rootfs")));
        }
    }
}
