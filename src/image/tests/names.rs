//! Which of several images it is.

use std::fs;
use std::path::Path;

use tempfile::TempDir;

use super::{compressed, docker_archive, file, layer, layout, make, put, store};
use crate::image::{How, Source, Stored};

/// Adds an image to a layout: its digest, and a descriptor with `more` in it.
fn add(dir: &Path, content: &str, more: &str) -> (String, String) {
    layout(dir, &compressed(&[layer(&[file("a", content)])]));
    let index = fs::read(dir.join("index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    let manifest = &index["manifests"][0];
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let digest = manifest["digest"].as_str().unwrap().to_owned();
    let size = &manifest["size"];
    let text = format!(r#"{{"mediaType":"{kind}","digest":"{digest}","size":{size},{more}}}"#);
    (digest, text)
}

/// As docker 25 and later do.
fn saved_as(name: &str, tag: &str) -> String {
    format!(
        r#""annotations":{{"io.containerd.image.name":"docker.io/library/{name}:{tag}","org.opencontainers.image.ref.name":"{tag}"}}"#
    )
}

fn index(dir: &Path, manifests: &[&str]) {
    let manifests = manifests.join(",");
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{manifests}]}}"#);
    fs::write(dir.join("index.json"), index).unwrap();
}

/// The image that the command line names so.
fn load(dir: &Path, text: &str) -> Result<Stored, String> {
    let loaded = Source::parse(text).load(&store(dir), &How::default());
    loaded.map_err(|e| crate::error_chain(&e))
}

#[test]
fn an_archive_of_docker_25_is_asked_by_name_or_tag() {
    let dir = TempDir::new().unwrap();
    let oci = dir.path().join("oci");
    let (one, tagged) = add(&oci, "1", &saved_as("debian", "12"));
    let (_, latest) = add(&oci, "1", &saved_as("debian", "latest"));
    let (two, other) = add(&oci, "2", &saved_as("other", "latest"));
    let load = |name: &str| load(dir.path(), &format!("{}{name}", oci.display()));
    // Two names are one image.
    index(&oci, &[&tagged, &latest]);
    assert_eq!(load("").unwrap().meta.digest.to_string(), one);
    index(&oci, &[&tagged, &latest, &other]);
    for (name, digest) in [
        (":debian:12", &one),
        (":docker.io/library/debian:12", &one),
        (":debian", &one),
        (":12", &one),
        (":other:latest", &two),
    ] {
        let stored = load(name).unwrap();
        assert_eq!(stored.meta.digest.to_string(), *digest, "{name}");
    }
    let error = load(":latest").unwrap_err();
    let names = "(docker.io/library/debian:latest, docker.io/library/other:latest)";
    assert!(error.contains(names), "{error}");
    let error = load(":debian:13").unwrap_err();
    assert!(error.ends_with("no such image is in it"), "{error}");
}

#[test]
fn an_archive_of_docker_save_is_asked_by_name() {
    let dir = TempDir::new().unwrap();
    let plain = layer(&[file("a", "x")]);
    let saved = dir.path().join("saved.tar");
    docker_archive(&saved, &plain, &["docker.io/library/debian:12", "b:1"]);
    let load = |name: &str| load(dir.path(), &format!("{}{name}", saved.display()));
    load(":debian:12").unwrap();
    load(":docker.io/library/debian:12").unwrap();
    assert!(load("").unwrap_err().contains("several images"));
    assert!(load(":debian").unwrap_err().contains("no such image"));
}

#[test]
fn of_an_index_the_first_that_fits_is_taken() {
    let dir = TempDir::new().unwrap();
    let oci = dir.path().join("oci");
    let platform = |architecture: &str| {
        format!(r#""platform":{{"os":"linux","architecture":"{architecture}"}}"#)
    };
    let (silent, nothing) = add(&oci, "0", r#""annotations":{}"#);
    let (_, arm) = add(&oci, "1", &platform("arm64"));
    let (first, gzip) = add(&oci, "2", &platform("amd64"));
    let (_, zstd) = add(&oci, "3", &platform("amd64"));
    let load = |manifests: &[&str]| {
        index(&oci, manifests);
        let blob = put(&oci, &fs::read(oci.join("index.json")).unwrap());
        let kind = "application/vnd.oci.image.index.v1+json";
        index(&oci, &[&format!(r#"{{"mediaType":"{kind}",{blob}}}"#)]);
        let stored = load(dir.path(), oci.to_str().unwrap())?;
        Ok::<_, String>(stored.meta.digest.to_string())
    };
    assert_eq!(load(&[&nothing, &arm, &gzip, &zstd]), Ok(first));
    assert_eq!(load(&[&arm, &nothing, &nothing]), Ok(silent));
    let error = load(&[&arm]).unwrap_err();
    assert!(error.ends_with("only for: linux/arm64"), "{error}");
}

#[test]
fn what_is_a_file_and_in_the_store_is_refused() {
    let made = make(&[vec![file("a", "x")]]);
    let dir = made.dir.path();
    let load = |file: &str| {
        let source = Source::File(file.into(), None);
        let loaded = source.load(&store(dir), &How::default());
        crate::error_chain(&loaded.unwrap_err())
    };
    // Its name in the store, and its digest.
    let hex = made.stored.as_ref().unwrap().meta.digest.hex();
    for text in ["it", &hex[..12]] {
        let error = load(text);
        assert!(error.contains(&format!("write ./{text} ")), "{error}");
        // Looked for in the current directory of the tests, which does not have it.
        let error = load(&format!("./{text}"));
        assert!(error.contains("No such file"), "{error}");
    }
}
