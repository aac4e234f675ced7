//! Registries that lie, break off, want tokens: servers of a test's own. Nothing here needs a guest.

mod common;
#[path = "common/pulled.rs"]
mod pulled;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use common::http::{Answer, Request, Server};
use common::limit::within;
use common::{PATIENCE, run, wait};
use pulled::{Image, SIZE};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

/// What a registry answers that has this layout as the image `a`.
fn answer(oci: &Path, request: &Request) -> Answer {
    let found = |digest: &str| fs::read(oci.join("blobs/sha256").join(digest)).ok();
    let index = || {
        let index: serde_json::Value =
            serde_json::from_slice(&fs::read(oci.join("index.json")).unwrap()).unwrap();
        let digest = index["manifests"][0]["digest"].as_str().unwrap().to_owned();
        found(digest.strip_prefix("sha256:").unwrap())
    };
    let path = request.path.strip_prefix("/v2/a/").unwrap_or_default();
    let (kind, name) = path.split_once('/').unwrap_or_default();
    let bytes = match name.strip_prefix("sha256:") {
        Some(digest) => found(digest),
        None => index(),
    };
    match bytes {
        Some(bytes) if kind == "manifests" => {
            Answer::new(200, &bytes).with("Content-Type", MANIFEST)
        }
        Some(bytes) => Answer::new(200, &bytes),
        None => Answer::new(404, b""),
    }
}

/// A registry whose answers are changed.
fn server(
    image: &Image,
    change: impl Fn(&Request, Answer) -> Answer + Send + Sync + 'static,
) -> Server {
    let oci = image.path("oci");
    Server::start(move |request| change(request, answer(&oci, request)))
}

type Change = fn(Answer) -> Answer;

/// A manifest with `to` where it had `from`.
fn edited(answer: Answer, from: &str, to: &str) -> Answer {
    let text = String::from_utf8(answer.body).unwrap();
    assert!(text.contains(from), "{text}");
    let body = text.replacen(from, to, 1).into_bytes();
    Answer { body, ..answer }
}

fn manifest(body: &[u8]) -> Answer {
    Answer::new(200, body).with("Content-Type", MANIFEST)
}

/// Lies in place of a manifest, and what is said of them.
const MANIFESTS: &[(Change, &str)] = &[
    (
        |_| Answer::new(200, b"<html>").with("Content-Type", "text/html; x"),
        "of type 'text/html'",
    ),
    (
        |a| Answer::new(200, &a.body).with("Content-Type", INDEX),
        "has not what belongs into its type",
    ),
    (
        |a| {
            edited(
                a,
                "{",
                r#"{"mediaType":"application/vnd.oci.image.index.v1+json","#,
            )
        },
        "and what names it says",
    ),
    (
        |a| edited(a, "image.config.v1+json", "other.v1+json"),
        "no container image",
    ),
    (
        |a| edited(a, "layer.v1.tar", "layer.v1.tar+gzip+encrypted"),
        "no container image",
    ),
    (
        |a| edited(a, r#""layers""#, r#""manifests":[],"layers""#),
        "has not what belongs into its type",
    ),
    (
        |a| edited(a, r#""size":"#, r#""size":1"#),
        "the manifest says 1",
    ),
    (
        |a| edited(a, r#""size":"#, r#""size":99999999999"#),
        "has 99999999999",
    ),
    (
        |a| edited(a, "sha256:", "sha256:../"),
        "no digest of the form",
    ),
    (|a| edited(a, "]", ",{}]"), "missing field"),
    (|_| manifest(&[b'['; 5 << 20]), "more than 4096 KiB"),
    (
        |_| manifest(format!(r#"{{"a":{}"#, "[".repeat(10_000)).as_bytes()),
        "EOF while parsing a list",
    ),
    (
        |_| Answer::new(302, b"").with("Location", "/v2/a/manifests/latest"),
        "too many redirects",
    ),
    (
        |_| Answer::new(401, b"").with("WWW-Authenticate", "Negotiate x"),
        "of a kind that is not known",
    ),
    (
        |_| Answer::new(500, b"\x1b[2J"),
        "500 Internal Server Error",
    ),
    (
        |_| {
            Answer::new(
                429,
                br#"{"errors":[{"code":"TOOMANY","message":"\u001b[2J"}]}"#,
            )
        },
        "(TOOMANY: \\u{1b}[2J)",
    ),
];

/// Lies in place of a blob.
const BLOBS: &[(Change, &str)] = &[
    (longer, "the manifest says"),
    (other, "digest"),
    (endless, "the manifest says"),
    (chunked, ""),
    (|_| Answer::new(404, b""), "has no such image"),
    (
        |a| Answer { status: 206, ..a }.with("Content-Range", "bytes 5-9/10"),
        "the manifest says",
    ),
    (
        |a| Answer { status: 206, ..a }.with("Content-Range", "lies"),
        "a wrong Content-Range",
    ),
];

fn longer(mut answer: Answer) -> Answer {
    answer.body.push(0);
    answer
}

fn other(mut answer: Answer) -> Answer {
    let last = answer.body.len() - 1;
    answer.body[last] ^= 1;
    answer
}

fn endless(mut answer: Answer) -> Answer {
    answer.body.resize(answer.body.len() + (8 << 20), 0);
    answer.with("Content-Length", "18446744073709551615")
}

fn chunked(answer: Answer) -> Answer {
    let body = [b"5000000\r\n", &[0; 5 << 24][..], b"\r\n0\r\n\r\n"].concat();
    let answer = Answer { body, ..answer };
    answer
        .with("Content-Length", "0")
        .with("Transfer-Encoding", "chunked")
}

#[test]
fn a_registry_that_lies_is_refused() {
    let image = Image::new();
    for (changes, of_manifests) in [(MANIFESTS, true), (BLOBS, false)] {
        for (change, wanted) in changes {
            let server = server(&image, move |request, answer| {
                match request.path.starts_with("/v2/a/manifests/") == of_manifests {
                    true => change(answer),
                    false => answer,
                }
            });
            image.assert_refused(&format!("127.0.0.1:{}/a", server.port), wanted);
        }
    }
    // By digest, another manifest.
    let server = server(&image, |_, answer| other(answer));
    let name = format!("127.0.0.1:{}/a@{}", server.port, image.digest);
    image.assert_refused(&name, "sent another manifest");
}

#[test]
fn of_an_index_the_image_for_this_machine_is_taken() {
    let image = Image::new();
    let digest = image.digest.clone();
    let size = fs::metadata(image.path("oci/blobs/sha256").join(&digest[7..]))
        .unwrap()
        .len();
    let entry = |digest: &str, architecture: &str| {
        format!(
            r#"{{"mediaType":"{MANIFEST}","digest":"{digest}","size":{size},"platform":{{"os":"linux","architecture":"{architecture}"}}}}"#
        )
    };
    let none = format!("sha256:{}", "0".repeat(64));
    let index = |entries: &[String]| {
        format!(
            r#"{{"schemaVersion":2,"mediaType":"{INDEX}","manifests":[{}]}}"#,
            entries.join(",")
        )
    };
    let both = index(&[
        entry(&none, "arm64"),
        entry(&digest, "amd64"),
        entry(&none, "unknown"),
    ]);
    let foreign = index(&[entry(&none, "arm64"), entry(&none, "riscv64")]);
    for (text, good) in [(both, true), (foreign, false)] {
        let server = server(&image, move |request, answer| match request.path.as_str() {
            "/v2/a/manifests/1" => Answer::new(200, text.as_bytes()).with("Content-Type", INDEX),
            _ => answer,
        });
        let name = format!("127.0.0.1:{}/a:1", server.port);
        if good {
            image.assert_pulled(&image.pull(&name));
            run(&mut image.minivmm(&["rmi", &name])).assert_code(0);
        } else {
            image.assert_refused(
                &name,
                "no image for linux/amd64, only for: linux/arm64, linux/riscv64",
            );
        }
    }
}

#[test]
fn tokens_are_had_from_the_registrys_server_and_renewed() {
    let image = Image::new();
    let tokens = Arc::new(AtomicUsize::new(0));
    let (given, port) = (Arc::clone(&tokens), Arc::new(AtomicUsize::new(0)));
    let own = Arc::clone(&port);
    let server = server(&image, move |request, answer| {
        if request.path.starts_with("/token?") {
            assert!(
                request.path.contains("scope=repository%3Aa%3Apull"),
                "{}",
                request.path
            );
            assert!(
                request.path.contains("service=a%20b") || request.path.contains("service=a+b"),
                "{}",
                request.path
            );
            let number = given.fetch_add(1, Ordering::SeqCst);
            return Answer::new(200, format!(r#"{{"token":"t{number}"}}"#).as_bytes());
        }
        // The first token is good for the manifest only.
        let wanted = if request.path.contains("/manifests/") {
            "Bearer t0"
        } else {
            "Bearer t1"
        };
        if request.header("authorization") == Some(wanted) {
            return answer;
        }
        let realm = format!("http://127.0.0.1:{}/token", own.load(Ordering::SeqCst));
        let challenge =
            format!(r#"Bearer realm="{realm}",service="a b",scope="repository:a:pull""#);
        Answer::new(401, b"").with("WWW-Authenticate", &challenge)
    });
    port.store(server.port.into(), Ordering::SeqCst);
    image.assert_pulled(&image.pull(&format!("127.0.0.1:{}/a", server.port)));
    assert_eq!(tokens.load(Ordering::SeqCst), 2);
}

#[test]
fn a_registry_without_ranges_and_one_that_never_stops_breaking() {
    let image = Image::new();
    let blob = |request: &Request, size: usize| request.path.contains("/blobs/") && size > SIZE;
    let breaks = AtomicBool::new(true);
    let once = server(&image, move |request, mut answer| {
        if blob(request, answer.body.len()) && breaks.swap(false, Ordering::SeqCst) {
            answer.sent = SIZE / 2;
        }
        answer
    });
    image.assert_pulled(&image.pull(&format!("127.0.0.1:{}/a", once.port)));
    let asked = once.requests();
    let ranges: Vec<_> = asked.iter().filter_map(|r| r.header("range")).collect();
    assert_eq!(ranges, [format!("bytes={}-", SIZE / 2)]);
    fs::remove_dir_all(image.path(".cache")).unwrap();
    // Each connection brings a little.
    let always = server(&image, move |request, mut answer| {
        if blob(request, answer.body.len()) {
            let at = request.header("range").map_or(0, |range| {
                let start = range.strip_prefix("bytes=").unwrap();
                start.strip_suffix('-').unwrap().parse().unwrap()
            });
            answer.sent = at + 1;
        }
        answer
    });
    image.assert_refused(
        &format!("127.0.0.1:{}/a", always.port),
        "it broke off 7 times",
    );
}

#[test]
fn two_at_once_and_a_killed_one_leave_one_image() {
    let image = Image::new();
    let stalled = Arc::new(AtomicBool::new(true));
    let (stalls, large) = (Arc::clone(&stalled), Arc::new(AtomicUsize::new(0)));
    let count = Arc::clone(&large);
    let server = server(&image, move |_, answer| {
        if answer.body.len() > SIZE {
            count.fetch_add(1, Ordering::SeqCst);
            while stalls.load(Ordering::SeqCst) {
                thread::park_timeout(Duration::from_millis(5));
            }
        }
        answer
    });
    let name = format!("127.0.0.1:{}/a", server.port);
    let start = || image.minivmm(&["pull", &name]).spawn().unwrap();
    let mut killed = start();
    within(PATIENCE, || {
        (large.load(Ordering::SeqCst) == 1).then_some(())
    })
    .expect("it downloads");
    killed.kill().unwrap();
    killed.wait().unwrap();
    let both = [start(), start()];
    within(PATIENCE, || {
        (large.load(Ordering::SeqCst) == 2).then_some(())
    })
    .expect("the next does");
    stalled.store(false, Ordering::SeqCst);
    for child in both {
        let output = wait(child, PATIENCE);
        assert!(output.status.success(), "{output:?}");
    }
    image.assert_pulled(&image.pull(&name));
    assert_eq!(
        large.load(Ordering::SeqCst),
        2,
        "the last one waited for the other's"
    );
    let left = fs::read_dir(image.path(".cache/minivmm/images/v1")).unwrap();
    let left = left.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    assert!(left.into_iter().all(|name| !name.starts_with('.')));
}
