//! The man pages and shell completions have every option that the command line has.

#[path = "../examples/man.rs"]
mod man;

use std::fs;
use std::process::Command;

use clap::CommandFactory;
use minivmm::cli::Cli;

/// "fork" for "minivmm-fork.1".
fn page_name(page: &str) -> &str {
    let name = page.trim_end_matches(".1");
    name.rsplit('-').next().unwrap_or(name)
}

#[test]
fn man_pages_and_completions_have_every_option() {
    let dir = tempfile::tempdir().unwrap();
    man::generate(dir.path()).unwrap();
    let read = |name: &str| fs::read_to_string(dir.path().join(name)).unwrap();
    let mut cli = Cli::command();
    cli.build();
    let bash = read("minivmm.bash");
    let of = |command: &clap::Command| -> Vec<String> {
        let arguments = command.get_arguments().filter(|a| !a.is_hide_set());
        arguments
            .filter_map(|a| a.get_long().map(str::to_owned))
            .collect()
    };
    let mut pages = vec![("minivmm.1".to_owned(), of(&cli))];
    for command in cli.get_subcommands().filter(|c| c.get_name() != "help") {
        pages.push((format!("minivmm-{}.1", command.get_name()), of(command)));
    }
    assert_eq!(pages.len(), 15, "{pages:?}");
    // Arguments that subcommands have in common bring no text that stands in place of their own.
    let abouts = cli
        .get_subcommands()
        .map(|c| c.get_about().unwrap().to_string());
    let different: std::collections::BTreeSet<_> = abouts.collect();
    assert_eq!(different.len(), pages.len(), "{different:?}");
    for (page, options) in pages {
        // In roff a hyphen that is none of a word is written \-.
        let text = read(&page).replace("\\-", "-");
        // Others have subcommands, or arguments, and no option but --help.
        let has_options =
            !["snapshot", "images", "rmi", "disks", "ps", "stop"].contains(&page_name(&page));
        let least = if has_options { 3 } else { 1 };
        assert!(options.len() >= least, "{page}: {options:?}");
        for option in options {
            assert!(text.contains(&format!("--{option}")), "{page}: --{option}");
            assert!(bash.contains(&format!("--{option}")), "bash: --{option}");
        }
    }
    for name in ["minivmm.fish", "_minivmm"] {
        assert!(read(name).contains("ephemeral"), "{name} has no help");
    }
    let checked = Command::new("bash")
        .arg("-n")
        .arg(dir.path().join("minivmm.bash"))
        .status()
        .expect("bash runs");
    assert!(checked.success(), "bash cannot read its completions");
}
