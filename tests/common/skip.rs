//! What a test does that cannot run here. The unit tests of both packages have it as well.

use std::io::Write;

/// Says that the test that calls it was skipped, and why; in CI, where everything has to run, it fails.
#[track_caller]
pub(crate) fn skip(why: &str) {
    let ci = std::env::var_os("CI").is_some_and(|ci| !ci.is_empty());
    assert!(!ci, "skipped, which in CI is a failure: {why}");
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    // Not eprintln!, which nobody sees of a test that passes.
    _ = writeln!(std::io::stderr(), "SKIPPED {test}: {why}");
}
