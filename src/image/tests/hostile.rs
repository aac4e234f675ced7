//! Images that nobody should have made.

use std::fs;
use std::path::Path;

use ::tar::{Builder, EntryType, Header};
use tempfile::TempDir;

use super::{
    Entry, Made, compressed, entry, file, gzip, header, layer, layout, make, names, store,
};
use crate::image::digest::Digest;
use crate::image::layer::Merge;
use crate::image::tar::Archive;
use crate::image::tree::{Content, Inode, ROOT, Tree};
use crate::image::{How, Source};

#[test]
fn hostile_names_end_in_errors() {
    let long = "n".repeat(80) + "/";
    let deep: Vec<Entry> = (1..9)
        .flat_map(|number| {
            // Each link leads 20 directories deeper.
            let above = match number {
                1 => String::new(),
                _ => format!("l{}/", number - 1),
            };
            let target = above + &["d"; 20].join("/");
            [
                entry(&target, EntryType::Directory, ""),
                entry(&format!("l{number}"), EntryType::Symlink, target.as_str()),
            ]
        })
        .collect();
    let twice = vec![
        entry("x", EntryType::Symlink, "y"),
        entry("y", EntryType::Symlink, "x"),
        file("x/file", ""),
    ];
    for (entries, wanted) in [
        (vec![file("../out", "")], "no file in an image can have"),
        (
            vec![file("a/../../out", "")],
            "no file in an image can have",
        ),
        (
            vec![entry("h", EntryType::Link, "../../etc/passwd")],
            "out of the image",
        ),
        (vec![entry("h", EntryType::Link, "none")], "is not there"),
        (
            vec![
                entry("d", EntryType::Directory, ""),
                entry("h", EntryType::Link, "d"),
            ],
            "hard link to a directory",
        ),
        (
            vec![file("f", ""), file("f/g", "")],
            "a file where a directory has to be",
        ),
        (vec![file(".wh.", "")], "whiteout of nothing"),
        (vec![entry("s", EntryType::Symlink, "")], "wrong length"),
        (
            vec![entry(".", EntryType::Symlink, "x")],
            "the root is no directory",
        ),
        (vec![entry("t", EntryType::new(b'Z'), "")], "type 0x5a"),
        (twice, "a loop of symbolic links"),
        (deep, "nested directories"),
        (vec![file(&long, "")], ""),
    ] {
        let made = make(&[entries]);
        if wanted.is_empty() {
            made.stored.unwrap();
        } else {
            assert!(made.error().contains(wanted), "{wanted}: {}", made.error());
        }
    }
}

/// An image whose only layer is these bytes.
#[track_caller]
fn refused(plain: &[u8], stored: &[u8], wanted: &str) {
    let dir = TempDir::new().unwrap();
    layout(
        &dir.path().join("oci"),
        &[(plain.to_vec(), stored.to_vec())],
    );
    let loaded =
        Source::File(dir.path().join("oci"), None).load(&store(dir.path()), &How::default());
    let error = crate::error_chain(&loaded.unwrap_err());
    assert!(error.contains(wanted), "{wanted}: {error}");
    // Nothing is left of it.
    assert!(store(dir.path()).list().unwrap().is_empty());
    let left = fs::read_dir(dir.path().join("store/v1")).unwrap();
    assert!(
        left.map(|e| e.unwrap().file_name())
            .all(|n| n.to_str().unwrap().ends_with(".lock"))
    );
}

#[test]
fn damaged_archives_end_in_errors() {
    let good = layer(&[file("a", &"x".repeat(2000))]);
    refused(&good[..600], &good[..600], "it is cut off");
    refused(b"no archive", b"no archive", "it is cut off");
    let mut wrong = good.clone();
    wrong[0] = b'b';
    refused(&wrong, &wrong, "no tar archive, or damaged");
    let packed = gzip(&good);
    refused(&good, &packed[..packed.len() - 9], "");
    refused(&good, &[&packed[..], b"behind it"].concat(), "");
    // Another content than the configuration says.
    refused(&wrong, &packed, "its digest is");
    let pax = |records: &str, times: usize| {
        let mut header = header(Header::new_ustar(), EntryType::XHeader, records.len());
        header.set_cksum();
        let mut builder = Builder::new(Vec::new());
        builder.append(&header, records.as_bytes()).unwrap();
        let mut bytes = builder.into_inner().unwrap();
        bytes.truncate(bytes.len() - 1024);
        [bytes.repeat(times), good.clone()].concat()
    };
    for (records, wanted) in [
        ("99 path=x\n", "damaged extended header"),
        ("-5 path=x\n", "damaged extended header"),
        ("9 path=x", "damaged extended header"),
        ("10 size=x\n", "bad size"),
        ("28 size=99999999999999999999\n", "damaged"),
        ("20 size=99999999999\n", "too large"),
        ("26 uid=4294967296000000\n", "damaged"),
        ("12 path=a\0b\n", "bad path"),
        ("22 GNU.sparse.major=2\n", "bad GNU.sparse.major"),
        ("25 GNU.sparse.numbytes=1\n", "bad GNU.sparse.numbytes"),
        ("22 GNU.sparse.map=1,x\n", "bad GNU.sparse.map"),
        ("27 GNU.sparse.size=9999999\n", "sizes do not agree"),
        ("31 GNU.sparse.size=99999999999\n", "too large"),
        (
            "21 GNU.sparse.size=9\n20 GNU.sparse.map=9\n",
            "half a piece",
        ),
        ("21 GNU.sparse.size=9\n22 GNU.sparse.map=9,1\n", "overlap"),
        (
            "25 GNU.sparse.realsize=9\n22 GNU.sparse.major=1\n",
            "a damaged sparse file",
        ),
        ("18 uid=4294967296\n", "more than 32 bits"),
    ] {
        let archive = pax(records, 1);
        refused(&archive, &archive, wanted);
    }
    // Together they have as much room as one.
    let archive = pax(&format!("60000 comment={}\n", "x".repeat(59_985)), 3);
    refused(&archive, &archive, "an extended header of 60000 bytes");
    // The size in the extended header counts, so that no member hides in the content of another (CVE-2025-62518).
    let inner = layer(&[file("hidden", "x")]);
    let length = format!("{}", inner.len());
    let records = format!("{} size={length}\n", length.len() + 9);
    let mut header = header(Header::new_ustar(), EntryType::Regular, 0);
    header.set_path("outer").unwrap();
    header.set_cksum();
    let archive = pax(&records, 1);
    let archive = [
        &archive[..1024],
        header.as_bytes(),
        &inner[..],
        &[0; 1024][..],
    ]
    .concat();
    let dir = TempDir::new().unwrap();
    layout(&dir.path().join("oci"), &[(archive.clone(), archive)]);
    let stored =
        Source::File(dir.path().join("oci"), None).load(&store(dir.path()), &How::default());
    let made = Made { dir, stored };
    if let Some(tree) = made.tree() {
        assert_eq!(names(&tree), ["outer"]);
    }
}

#[test]
fn an_archive_is_unpacked_once() {
    let dir = TempDir::new().unwrap();
    let archive = dir.path().join("saved.tar");
    let twice = gzip(&gzip(&layer(&[file("manifest.json", "[]")])));
    // Three times, and so on: no more is looked at than the second.
    for bytes in [gzip(&twice), twice] {
        fs::write(&archive, bytes).unwrap();
        let loaded = Source::File(archive.clone(), None).load(&store(dir.path()), &How::default());
        let error = crate::error_chain(&loaded.unwrap_err());
        assert!(error.ends_with("compressed more than once"), "{error}");
    }
}

#[test]
fn what_digests_do_not_cover_is_refused() {
    let plain = layer(&[file("a", "x")]);
    let edit = |change: &dyn Fn(&Path)| {
        let dir = TempDir::new().unwrap();
        let oci = dir.path().join("oci");
        layout(&oci, &compressed(std::slice::from_ref(&plain)));
        change(&oci);
        let loaded = Source::File(oci, None).load(&store(dir.path()), &How::default());
        crate::error_chain(&loaded.unwrap_err())
    };
    let replace = |from: &'static str, to: &'static str| {
        move |dir: &Path| {
            let index = fs::read_to_string(dir.join("index.json")).unwrap();
            assert!(index.contains(from));
            fs::write(dir.join("index.json"), index.replace(from, to)).unwrap();
        }
    };
    let blobs = |change: fn(&mut Vec<u8>, usize)| {
        move |dir: &Path| {
            for (number, blob) in fs::read_dir(dir.join("blobs/sha256")).unwrap().enumerate() {
                let path = blob.unwrap().path();
                let mut bytes = fs::read(&path).unwrap();
                change(&mut bytes, number);
                fs::write(path, bytes).unwrap();
            }
        }
    };
    let longer = edit(&blobs(|bytes, _| bytes.push(b' ')));
    assert!(longer.contains("is not what its digest says"), "{longer}");
    let size = edit(&replace("\"size\":", "\"size\":9"));
    assert!(
        size.contains("is not what its digest says") || size.contains("bytes"),
        "{size}"
    );
    let digest = edit(&replace("sha256:", "sha256:../"));
    assert!(digest.contains("no digest of the form"), "{digest}");
    let platform = edit(&replace(
        "\"annotations\"",
        "\"platform\":{\"os\":\"linux\",\"architecture\":\"arm64\"},\"annotations\"",
    ));
    assert!(platform.contains("only for: linux/arm64"), "{platform}");
    let json = edit(&|dir| fs::write(dir.join("index.json"), "[".repeat(5 << 20)).unwrap());
    assert!(json.contains("longer than 4 MiB"), "{json}");
    let missing = edit(&|dir| fs::remove_file(dir.join("oci-layout")).unwrap());
    assert!(missing.contains("neither index.json"), "{missing}");
}

#[test]
fn names_in_an_images_json_stay_in_its_directory() {
    let dir = TempDir::new().unwrap();
    let saved = dir.path().join("saved");
    fs::create_dir(&saved).unwrap();
    let plain = layer(&[file("a", "x")]);
    let config = format!(
        r#"{{"architecture":"amd64","os":"linux","rootfs":{{"diff_ids":["{}"]}}}}"#,
        Digest::of(&plain)
    );
    let name = format!("{}.json", Digest::of(config.as_bytes()).hex());
    fs::write(saved.join(&name), &config).unwrap();
    for path in ["layer.tar", "saved/layer.tar"] {
        fs::write(dir.path().join(path), &plain).unwrap();
    }
    let load = |layer: &str| {
        let manifest = format!(r#"[{{"Config":"{name}","Layers":["{layer}"]}}]"#);
        fs::write(saved.join("manifest.json"), manifest).unwrap();
        Source::File(saved.clone(), None).load(&store(dir.path()), &How::default())
    };
    let absolute = dir.path().join("layer.tar");
    for outside in ["../layer.tar", absolute.to_str().unwrap()] {
        let error = crate::error_chain(&load(outside).unwrap_err());
        assert!(error.contains("is not in it"), "{error}");
    }
    load("layer.tar").unwrap();
}

/// Applies an archive as a layer; what was wrong with it.
#[track_caller]
fn refused_layer(merge: &mut Merge, archive: &[u8], wanted: &str) {
    let error = merge.layer(archive, true).unwrap_err().to_string();
    assert!(error.contains(wanted), "{wanted}: {error}");
}

fn merge() -> Merge {
    Merge::new(tempfile::tempfile().unwrap())
}

/// A header and its content, in whole blocks.
fn member(mut header: Header, content: &[u8]) -> Vec<u8> {
    header.set_cksum();
    let mut bytes = [header.as_bytes(), content].concat();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

#[test]
fn directories_that_only_names_imply_count() {
    let mut merge = merge();
    merge.tree.inodes_left = 8;
    let archive = layer(&[file("a/b/c/f", ""), file("a/b/c/g", "")]);
    merge.layer(&archive[..], true).unwrap();
    let archive = layer(&[file("x/d/d/d/f", "")]);
    refused_layer(&mut merge, &archive, "more than 1000000 files");
}

#[test]
fn names_and_attributes_weigh_what_they_take_in_memory() {
    let mut one = merge();
    one.tree.metadata_left = 100;
    let archive = layer(&[file("a", ""), file("b", "")]);
    refused_layer(&mut one, &archive, "more than 256 MiB");
    let mut two = merge();
    two.tree.metadata_left = 600;
    let attribute = Entry {
        xattr: Some(("user.a".to_owned(), b"x".to_vec())),
        ..file("a", "")
    };
    refused_layer(&mut two, &layer(&[attribute]), "more than 256 MiB");
    // A directory again is the one that is there.
    let mut three = merge();
    three.tree.metadata_left = 800;
    let directory = entry("d", EntryType::Directory, "");
    let archive = layer(&[directory.clone(), directory]);
    three.layer(&archive[..], true).unwrap();
    refused_layer(
        &mut three,
        &layer(&[entry("e", EntryType::Directory, "")]),
        "more than 256 MiB",
    );
}

#[test]
fn targets_of_links_are_bounded() {
    let target = "t".repeat(4097);
    let pax = format!("4112 linkpath={target}\n");
    for kind in [EntryType::Link, EntryType::Symlink] {
        for (extension, content) in [
            (EntryType::GNULongLink, target.as_bytes()),
            (EntryType::XHeader, pax.as_bytes()),
        ] {
            let long = member(header(Header::new_gnu(), extension, content.len()), content);
            let archive = [long, layer(&[entry("link", kind, "t")])].concat();
            refused(&archive, &archive, "a link of 4097 bytes");
        }
    }
    // Links that wait for their targets are in memory as well.
    let mut merge = merge();
    merge.tree.metadata_left = 150;
    let links = ["a", "b", "c"].map(|name| entry(name, EntryType::Link, "none"));
    refused_layer(&mut merge, &layer(&links), "more than 256 MiB");
}

#[test]
fn whiteouts_take_no_more_time_where_there_are_many() {
    let many = 10_000;
    let directory = || {
        Inode::new(
            libc::S_IFDIR | 0o755,
            Content::Directory(Default::default()),
        )
    };
    let special = || Inode::new(libc::S_IFIFO, Content::Special(0));
    let mut tree = Tree::new();
    for layer in 0..2 {
        tree.next_layer();
        let d = tree.directory(&[b"d"], true).unwrap().unwrap();
        for number in 0..many {
            let name = format!("{layer} {number}");
            tree.add(d, name.as_bytes(), special()).unwrap();
        }
        let start = std::time::Instant::now();
        for _ in 0..many {
            tree.hide_all(d).unwrap();
            tree.hide(ROOT, b"d").unwrap();
            // Its attributes may come in between.
            assert_eq!(tree.add(ROOT, b"d", directory()).unwrap(), d);
        }
        // Milliseconds; it would be minutes if each whiteout looked at all names.
        assert!(start.elapsed().as_secs() < 5);
        // Those of this layer, and none of those below.
        let names: Vec<&Vec<u8>> = tree.children(d).unwrap().keys().collect();
        let prefix = format!("{layer} ").into_bytes();
        assert_eq!(names.len(), many);
        assert!(names.iter().all(|name| name.starts_with(&prefix)));
    }
}

#[test]
fn symbolic_links_lead_through_a_bounded_number_of_names() {
    let mut tree = Tree::new();
    let target = b"a/../".repeat(4095 / 5);
    let link = |target: &[u8]| Inode::new(libc::S_IFLNK | 0o777, Content::Symlink(target.into()));
    tree.add(ROOT, b"s", link(&target)).unwrap();
    tree.add(ROOT, b"slashes", link(&[b'/'; 4095])).unwrap();
    for name in [&b"s"[..], b"slashes"] {
        assert_eq!(tree.directory(&[name], true).unwrap(), Some(ROOT));
        let error = tree.directory(&[name, name], true).unwrap_err().to_string();
        assert!(
            error.contains("symbolic links of more than 4096 bytes"),
            "{error}"
        );
    }
}

#[test]
fn all_bytes_of_archives_count() {
    let good = layer(&[file("a", "x")]);
    let after_the_end = [&good[..], &[0; 9000]].concat();
    let global = header(Header::new_ustar(), EntryType::XGlobalHeader, 0);
    let extensions = [member(global, b"").repeat(20), good.clone()].concat();
    for archive in [after_the_end, extensions] {
        let mut enough = merge();
        enough.unread = archive.len() as u64;
        enough.layer(&archive[..], true).unwrap();
        let mut less = merge();
        less.unread = archive.len() as u64 - 1;
        refused_layer(&mut less, &archive, "more than 32 GiB, unpacked");
    }
    // Those of all layers.
    let mut merge = merge();
    merge.unread = good.len() as u64 * 2 - 1;
    merge.layer(&good[..], true).unwrap();
    refused_layer(&mut merge, &good, "more than 32 GiB, unpacked");
}

#[test]
fn device_numbers_are_read_of_devices_only_and_may_be_empty() {
    let numbers = |kind: EntryType, field: &[u8; 8]| {
        let mut header = header(Header::new_ustar(), kind, 0);
        header.set_path("x").unwrap();
        header.as_ustar_mut().unwrap().dev_major = *field;
        header.as_ustar_mut().unwrap().dev_minor = *field;
        let archive = member(header, b"");
        let member = Archive::new(&archive[..]).next();
        member.map(|member| member.unwrap().device)
    };
    for field in [b"\0\0\0\0\0\0\0\0", b"        ", b"garbage\0"] {
        assert_eq!(numbers(EntryType::Fifo, field).unwrap(), (0, 0));
    }
    for kind in [EntryType::Char, EntryType::Block] {
        assert_eq!(numbers(kind, &[0; 8]).unwrap(), (0, 0));
        assert_eq!(numbers(kind, b"       \0").unwrap(), (0, 0));
        assert_eq!(numbers(kind, b"0000012\0").unwrap(), (10, 10));
        assert!(numbers(kind, b"garbage\0").is_err());
    }
}

/// Where another reader goes on, it sees other members.
#[test]
fn only_files_have_content() {
    let inner = member(header(Header::new_ustar(), EntryType::Regular, 0), b"");
    let names = |outer: Header, extension: &[u8]| {
        let archive = [extension, &member(outer, b""), &inner].concat();
        let mut archive = Archive::new(&archive[..]);
        let mut count = 0;
        while let Some(member) = archive.next()? {
            assert_eq!(member.size, 0);
            count += 1;
        }
        std::io::Result::Ok(count)
    };
    let pax = b"12 size=512\n";
    let pax = member(
        header(Header::new_ustar(), EntryType::XHeader, pax.len()),
        pax,
    );
    for kind in [
        EntryType::Link,
        EntryType::Symlink,
        EntryType::Char,
        EntryType::Block,
        EntryType::Directory,
        EntryType::Fifo,
    ] {
        assert_eq!(
            names(header(Header::new_ustar(), kind, 512), b"").unwrap(),
            2
        );
        assert_eq!(
            names(header(Header::new_ustar(), kind, 0), &pax).unwrap(),
            2
        );
    }
    // Before POSIX, a directory was a file whose name ends so; readers do not agree on its content.
    let mut old = header(Header::new_old(), EntryType::Regular, 512);
    old.as_old_mut().name[..2].copy_from_slice(b"d/");
    let error = names(old, b"").unwrap_err().to_string();
    assert!(error.contains("a directory with content"), "{error}");
}
