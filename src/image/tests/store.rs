//! The store, and every kind of place that an image can be in.

use std::fs;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use ::tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::{
    Made, describe, docker_archive, entry, file, gzip, header, layer, layout, make, output, store,
};
use crate::image::{How, ImageConfig, Source, Store, Stored};

#[test]
fn the_same_image_has_the_same_bytes_and_is_made_once() {
    let layers = vec![vec![file("a", "x"), entry("b", EntryType::Symlink, "a")]];
    let bytes = |made: &Made| fs::read(&made.stored.as_ref().unwrap().root).unwrap();
    let (one, two) = (make(&layers), make(&layers));
    assert_eq!(bytes(&one), bytes(&two));
    // By name and by digest, from any number of processes at once.
    let dir = one.dir.path();
    let oci = dir.join("oci");
    let before = fs::metadata(&one.stored.as_ref().unwrap().root)
        .unwrap()
        .ino();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                Source::File(oci.clone(), Some("it".into()))
                    .load(&store(dir), &How::default())
                    .unwrap()
            });
        }
    });
    let stored = Source::Named("it".to_owned())
        .load(&store(dir), &How::default())
        .unwrap();
    assert_eq!(fs::metadata(&stored.root).unwrap().ino(), before);
    assert_eq!(stored.meta.config.cmd, Some(vec!["/a".to_owned()]));
    let digest = stored.meta.digest.hex();
    assert_eq!(store(dir).called(&digest[..12]).unwrap().len(), 1);
    store(dir).remove(&stored).unwrap();
    assert!(
        Source::Named("it".to_owned())
            .load(&store(dir), &How::default())
            .is_err()
    );
    assert!(
        Source::File(oci.clone(), Some("other".into()))
            .load(&store(dir), &How::default())
            .is_err()
    );
}

#[test]
fn what_a_killed_process_leaves_is_no_image() {
    let made = make(&[vec![file("a", "x")]]);
    let stored = made.stored.as_ref().unwrap();
    let entry = stored.root.parent().unwrap();
    let name = entry.file_name().unwrap().to_str().unwrap();
    // Half an image, under the name that it has until it is whole.
    let left = entry.with_file_name(format!(".new-{name}"));
    fs::rename(entry, &left).unwrap();
    fs::remove_file(left.join("image.json")).unwrap();
    // And of another one.
    let other = "0".repeat(64);
    let other_left = left.with_file_name(format!(".new-{other}"));
    fs::create_dir(&other_left).unwrap();
    fs::write(left.with_file_name(format!("{other}.lock")), "").unwrap();
    let mut store = store(made.dir.path());
    assert!(store.list().unwrap().is_empty());
    // They took all the room.
    store.free_bytes = |dir| {
        let mut entries = fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name());
        let is_full = entries.any(|name| name.to_str().is_some_and(|n| n.starts_with(".new-")));
        Some(if is_full { 0 } else { u64::MAX })
    };
    let source = Source::File(made.dir.path().join("oci"), None);
    source.load(&store, &How::default()).unwrap();
    assert!(!left.exists() && !other_left.exists());
}

#[test]
fn archives_of_every_kind_hold_the_same_image() {
    let plain = layer(&[file("a", "x"), file("b", &"y".repeat(100_000))]);
    let tree = |source: Source, dir: TempDir| {
        let stored = source.load(&store(dir.path()), &How::default());
        (Made { dir, stored }).tree()
    };
    let zstd =
        ruzstd::encoding::compress_to_vec(&plain[..], ruzstd::encoding::CompressionLevel::Fastest);
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3], &zstd[..]].concat();
    let (half, rest) = plain.split_at(plain.len() / 2);
    let members = [gzip(half), gzip(rest)].concat();
    let mut trees = Vec::new();
    for stored in [plain.clone(), gzip(&plain), members, zstd, skipped] {
        let dir = TempDir::new().unwrap();
        let oci = dir.path().join("oci");
        layout(&oci, &[(plain.clone(), stored)]);
        // As a directory, an archive, and a compressed one.
        let archive = dir.path().join("oci.tar");
        let mut builder = Builder::new(Vec::new());
        builder.append_dir_all(".", &oci).unwrap();
        let bytes = builder.into_inner().unwrap();
        fs::write(&archive, gzip(&bytes)).unwrap();
        let stored = Source::File(archive.clone(), None)
            .load(&store(&dir.path().join("x")), &How::default());
        fs::write(&archive, &bytes).unwrap();
        let again =
            Source::File(archive, None).load(&store(&dir.path().join("y")), &How::default());
        assert_eq!(stored.unwrap().meta.digest, again.unwrap().meta.digest);
        trees.push(tree(Source::File(oci, None), dir));
    }
    let docker = TempDir::new().unwrap();
    let saved = docker.path().join("saved.tar");
    docker_archive(&saved, &plain, &["it:1"]);
    trees.push(tree(Source::File(saved, Some("it:1".into())), docker));
    let root = TempDir::new().unwrap();
    fs::write(root.path().join("root.tar"), &plain).unwrap();
    trees.push(tree(Source::Root(root.path().join("root.tar")), root));
    assert!(trees.windows(2).all(|pair| pair[0] == pair[1]), "{trees:?}");
}

#[test]
fn a_directory_is_an_image_that_changes_with_it() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    fs::create_dir_all(root.join("d/e")).unwrap();
    fs::write(root.join("d/f"), vec![3; 9000]).unwrap();
    fs::hard_link(root.join("d/f"), root.join("g")).unwrap();
    std::os::unix::fs::symlink("d/f", root.join("s")).unwrap();
    let load = || {
        Source::Root(root.clone())
            .load(&store(dir.path()), &How::default())
            .unwrap()
    };
    let first = load();
    assert_eq!(first.meta.digest, load().meta.digest);
    let args = ["--extract=image", first.root.to_str().unwrap()];
    if let Some((good, text)) = output(dir.path(), "fsck.erofs", &args) {
        assert!(good, "{text}");
        assert_eq!(describe(&dir.path().join("image")), describe(&root));
    }
    // What was read before goes with its name, unless it is in use.
    let digests = || {
        let list = store(dir.path()).list().unwrap();
        let digests = list.into_iter().map(|stored| stored.meta.digest);
        digests.collect::<Vec<_>>()
    };
    fs::write(root.join("d/f"), "changed").unwrap();
    let second = load().meta.digest;
    assert_ne!(first.meta.digest, second);
    assert_eq!(digests(), [second, first.meta.digest.clone()]);
    fs::write(root.join("d/f"), "changed again").unwrap();
    let third = load().meta.digest;
    assert_eq!(digests(), [third, first.meta.digest]);
}

/// Bytes of an image in a store that has room for five.
const BYTES: u64 = 64 << 10;

fn small_store(dir: &Path) -> Store {
    let mut store = store(dir);
    store.free_bytes = |dir| {
        let store = Store::open(dir.parent().unwrap()).unwrap();
        let used: u64 = store.list().unwrap().iter().map(|s| s.bytes).sum();
        Some((5 * BYTES).saturating_sub(used))
    };
    store
}

/// The image with this digit for its digest and its content.
fn make_small(store: &Store, digit: u8, bytes: u64) -> io::Result<Stored> {
    let digest = format!("sha256:{}", digit.to_string().repeat(64));
    store.get_or_make(&digest.parse().unwrap(), bytes, |file| {
        file.write_all_at(&[digit; BYTES as usize], 0)?;
        Ok((ImageConfig::default(), file))
    })
}

#[test]
fn images_that_no_process_uses_make_room() {
    let dir = TempDir::new().unwrap();
    let store = small_store(dir.path());
    let make = |digit, images| make_small(&store, digit, images * BYTES);
    let digits = || -> String {
        let mut list = store.list().unwrap();
        list.sort_by_key(|s| s.used);
        list.iter().map(|s| &s.meta.digest.hex()[..1]).collect()
    };
    let in_use = store.name(make(1, 1).unwrap(), "one").unwrap();
    store.name(make(2, 1).unwrap(), "two").unwrap();
    make(3, 1).unwrap();
    store.name(make(4, 1).unwrap(), "four").unwrap();
    assert_eq!(digits(), "1234");
    // That would take all of them, and one cannot be removed: then none is.
    let error = make(5, 5).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    assert_eq!(digits(), "1234");
    make(5, 2).unwrap();
    assert_eq!(digits(), "1245");
    make(6, 3).unwrap();
    assert_eq!(digits(), "146");
    drop(in_use);
    make(7, 4).unwrap();
    assert_eq!(digits(), "47");
}

#[test]
fn processes_that_make_room_leave_one_another_what_they_use() {
    let dir = TempDir::new().unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            let store = small_store(dir.path());
            scope.spawn(move || {
                for round in 0..50 {
                    let digit = ((round * 5 + thread * 3) % 9) as u8;
                    let stored = match make_small(&store, digit, BYTES) {
                        // The others use what is there.
                        Err(e) if e.kind() == io::ErrorKind::StorageFull => continue,
                        made => made.unwrap(),
                    };
                    let stored = store
                        .replace(stored, ["a", "b"][digit as usize % 2])
                        .unwrap();
                    let content = fs::read(&stored.root).unwrap();
                    assert!(content == [digit; BYTES as usize], "{digit}");
                }
            });
        }
    });
}

#[test]
fn an_archive_is_not_copied_where_there_is_no_room() {
    let dir = TempDir::new().unwrap();
    let archive = dir.path().join("saved.tar");
    fs::write(&archive, gzip(b"whatever it is")).unwrap();
    let mut store = store(dir.path());
    store.free_bytes = |_| Some(1000);
    let error = Source::File(archive, None).load(&store, &How::default());
    let error = error.unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::StorageFull);
    let text = error.source.to_string();
    assert!(text.starts_with("copying the archive: "), "{text}");
}

#[test]
fn an_image_that_does_not_fit_is_not_begun() {
    let dir = TempDir::new().unwrap();
    let digest = format!("sha256:{}", "1".repeat(64)).parse().unwrap();
    let made = store(dir.path()).get_or_make(&digest, 1 << 60, |_| unreachable!());
    let error = made.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    let text = error.to_string();
    assert!(
        text.ends_with("the image needs 1099511627776 MiB or more"),
        "{text}"
    );
    assert!(text.contains(dir.path().to_str().unwrap()), "{text}");
}

#[test]
fn sparse_files_are_the_same_in_every_format_of_gnu_tar() {
    let dir = TempDir::new().unwrap();
    let root = dir.path().join("root");
    fs::create_dir(&root).unwrap();
    // A name that takes an extended header by itself, and a map of more than a block.
    let name = "n".repeat(200);
    for (name, pieces) in [("few", 2u64), (&name, 300), ("empty", 0)] {
        let file = fs::File::create(root.join(name)).unwrap();
        for piece in 0..pieces {
            let content = vec![(piece % 250) as u8 + 1; 5000];
            file.write_all_at(&content, piece * 16384 + 4096).unwrap();
        }
        file.set_len(pieces * 16384 + 100_000).unwrap();
    }
    let image = |options: &str| {
        let tar = dir.path().join(format!("{options}.tar"));
        let made = Command::new("tar")
            .args(options.split(' '))
            .args(["--mtime=@1", "--sort=name"])
            .arg("-cf")
            .args([&tar, Path::new("-C"), &root, Path::new(".")])
            .status()
            .expect("tar is installed");
        assert!(made.success());
        let bytes = fs::metadata(&tar).unwrap().len();
        let stored = Source::Root(tar).load(&store(dir.path()), &How::default());
        let stored = stored.unwrap_or_else(|e| panic!("{options}: {e:?}"));
        (bytes, fs::read(stored.root).unwrap())
    };
    let (bytes, whole) = image("--format=posix");
    for options in [
        "--format=gnu -S",
        "--format=posix -S --sparse-version=0.0",
        "--format=posix -S --sparse-version=0.1",
        "--format=posix -S --sparse-version=1.0",
    ] {
        let (sparse_bytes, image) = image(options);
        assert!(sparse_bytes < bytes, "{options} is not sparse");
        assert!(image == whole, "{options}");
    }
}

#[test]
fn large_and_many_files_are_stored_sparsely() {
    let dir = TempDir::new().unwrap();
    let tar = dir.path().join("root.tar");
    // 5 GiB of which two pieces are there, as GNU tar stores them.
    let mut sparse = header(Header::new_gnu(), EntryType::GNUSparse, 8);
    sparse.set_path("sparse").unwrap();
    let gnu = sparse.as_gnu_mut().unwrap();
    gnu.set_real_size(5 << 30);
    for (piece, offset) in gnu.sparse.iter_mut().zip([4u64 << 30, (5 << 30) - 4]) {
        piece.set_offset(offset);
        piece.set_length(4);
    }
    sparse.set_cksum();
    let mut builder = Builder::new(Vec::new());
    builder.append(&sparse, &b"somedata"[..]).unwrap();
    for number in 0..20_000 {
        let mut header = header(Header::new_ustar(), EntryType::Regular, 0);
        builder
            .append_data(&mut header, format!("many/{number}"), &[][..])
            .unwrap();
    }
    fs::write(&tar, builder.into_inner().unwrap()).unwrap();
    let stored = Source::Root(tar)
        .load(&store(dir.path()), &How::default())
        .unwrap();
    assert!(stored.bytes < 16 << 20, "{stored:?}");
    let image = fs::metadata(&stored.root).unwrap().len();
    assert!(image > 5 << 30, "{image}");
}
