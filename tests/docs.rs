//! What the documents point to exists: links, their headings, and the paths of files in the tree.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Directories of the tree. A word in backticks that begins with one of them is a path.
const DIRECTORIES: &[&str] = &[
    "src/",
    "devices/",
    "tests/",
    "guest-kernels/",
    "docs/",
    "examples/",
    "fuzz/",
    ".ci/",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn documents() -> Vec<PathBuf> {
    let mut all: Vec<PathBuf> = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"]
        .map(|name| root().join(name))
        .to_vec();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|e| e == "md") {
            all.push(path);
        }
    }
    all.push(root().join("guest-kernels/README.md"));
    all.push(root().join("guest-kernels/kernel/README.md"));
    all
}

/// The anchors of a document's headings, as Markdown's renderers make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let heading = line.trim_start_matches('#').trim().to_lowercase();
            let kept = heading
                .chars()
                .filter(|c| c.is_alphanumeric() || " -_".contains(*c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

/// The targets of `[text](target)`.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let rest = text.split("](").skip(1);
    rest.filter_map(|rest| rest.split(')').next())
}

/// What stands in backticks and looks like a path of the tree.
fn paths(text: &str) -> impl Iterator<Item = &str> {
    let quoted = text.split('`').skip(1).step_by(2);
    quoted.filter(|word| {
        DIRECTORIES.iter().any(|dir| word.starts_with(dir))
            && !word.contains([' ', '\n', '*', '$'])
            && !word.contains("NAME")
    })
}

#[test]
fn links_and_paths_in_the_documents_exist() {
    let (mut missing, mut seen) = (Vec::new(), 0);
    for document in documents() {
        let text = fs::read_to_string(&document).unwrap_or_else(|e| panic!("{document:?}: {e}"));
        for link in links(&text).filter(|link| !link.contains("://")) {
            seen += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => document.clone(),
                file => document.parent().unwrap().join(file),
            };
            let there = match anchor {
                "" => target.exists(),
                anchor => fs::read_to_string(&target).is_ok_and(|t| anchors(&t).contains(anchor)),
            };
            if !there {
                missing.push(format!("{}: link {link}", document.display()));
            }
        }
        for path in paths(&text) {
            seen += 1;
            if !root().join(path).exists() {
                missing.push(format!("{}: path {path}", document.display()));
            }
        }
    }
    assert!(seen > 100, "only {seen} links and paths were found");
    assert!(missing.is_empty(), "{missing:#?}");
}
