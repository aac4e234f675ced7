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
    let mut all: Vec<PathBuf> = [
        "README.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ]
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

/// The text of all Rust files of the tree.
fn sources() -> String {
    let mut text = String::new();
    let mut directories = ["src", "devices/src", "tests"]
        .map(|d| root().join(d))
        .to_vec();
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                directories.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                text += &fs::read_to_string(path).unwrap();
            }
        }
    }
    text
}

#[test]
fn tests_that_the_security_policy_names_exist() {
    let policy = fs::read_to_string(root().join("SECURITY.md")).unwrap();
    let sources = sources();
    let quoted = policy.split('`').skip(1).step_by(2);
    let is_test = |word: &&str| {
        word.contains('_') && word.chars().all(|c| c.is_ascii_lowercase() || c == '_')
    };
    let names: Vec<&str> = quoted.filter(is_test).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in &names {
        assert!(sources.contains(&format!("fn {name}(")), "no test {name}");
    }
    // Each boundary has at least one.
    let (_, boundaries) = policy.split_once("## Boundaries").unwrap();
    let rows = boundaries.split("\n## ").next().unwrap().lines();
    for row in rows.filter(|line| line.starts_with('|')).skip(2) {
        let shown = row.trim_end_matches('|').rsplit('|').next().unwrap();
        assert!(names.iter().any(|name| shown.contains(name)), "{row}");
    }
}
