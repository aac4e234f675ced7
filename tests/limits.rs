//! Files and functions stay short enough to be read at once.

use std::path::{Path, PathBuf};

/// Lines of a file, tests among them.
const FILE_LINES: usize = 500;
/// Lines of a function.
const FUNCTION_LINES: usize = 80;

fn sources(dir: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            if !path.ends_with("target") {
                sources(&path, found);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

/// The functions of `source`, which rustfmt has formatted, that have more than `limit` lines: their first lines.
fn long_functions(source: &str, limit: usize) -> Vec<&str> {
    let lines: Vec<&str> = source.lines().collect();
    let is_long = |(at, line): &(usize, &&str)| {
        let indent = &line[..line.len() - line.trim_start().len()];
        let end = format!("{indent}}}");
        let is_function = line
            .split_whitespace()
            .take_while(|word| !word.contains('(') || word.starts_with("pub("))
            .any(|word| word == "fn");
        let len = 1 + lines[*at..].iter().take_while(|line| **line != end).count();
        is_function && !line.ends_with(['}', ';']) && len > limit
    };
    let long = lines.iter().enumerate().filter(is_long);
    long.map(|(_, line)| line.trim()).collect()
}

#[test]
fn files_and_functions_are_short() {
    let mut files = Vec::new();
    for dir in ["src", "devices", "tests", "examples", "fuzz"] {
        sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join(dir), &mut files);
    }
    assert!(files.len() > 100, "{files:?}");
    let mut found = Vec::new();
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        let lines = source.lines().count();
        if lines > FILE_LINES {
            found.push(format!("{}: {lines} lines", file.display()));
        }
        for function in long_functions(&source, FUNCTION_LINES) {
            found.push(format!("{}: {function}", file.display()));
        }
    }
    assert!(found.is_empty(), "too long:\n  {}", found.join("\n  "));
}

#[test]
fn long_functions_are_found() {
    let source = "fn a() {\n    1;\n}\n\nimpl B {\n    pub(crate) fn b() {\n        1;\n        2;\n    }\n\n    fn c();\n}\n";
    assert_eq!(
        long_functions(source, 2),
        ["fn a() {", "pub(crate) fn b() {"]
    );
    assert_eq!(long_functions(source, 3), ["pub(crate) fn b() {"]);
    assert!(long_functions(source, 4).is_empty());
}
