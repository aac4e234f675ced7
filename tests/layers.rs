//! The layers of the code, as docs/architecture.md draws them: each imports only from below, and no files import one
//! another in a circle.
//!
//! What a file imports is read from its syntax: `use` declarations and paths, followed through re-exports to the file that
//! defines the name. Tests inside the sources do not count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use syn::visit::{self, Visit};

/// The layers of src/, from the top: a file may import from its own layer and from those below, and from devices.
const LAYERS: &[&[&str]] = &[
    &["main"],
    &["cli"],
    &["run", "tools", "image"],
    &["observe"],
    &["console"],
    &["sandbox"],
    &["vmm"],
    &["boot", "acpi"],
    &["arch"],
    &["host"],
    &["config", "guest"],
    &["lib", "text"],
];

/// Crates that only these modules may name.
const RESERVED_CRATES: &[(&str, &[&str])] = &[
    ("clap", &["main", "cli", "tools"]),
    ("kvm_ioctls", &["vmm", "arch", "host", "tools"]),
];

/// The layers whose messages a library's user sees: command-line options mean nothing there.
const WITHOUT_OPTIONS: &[&str] = &[
    "run", "image", "guest", "console", "sandbox", "vmm", "boot", "acpi", "arch", "host", "config",
];

/// A module: its path within the crate, such as `vmm::vcpu`, and what its file says.
#[derive(Default)]
struct Module {
    /// Names that the file imports, and the absolute paths that they stand for.
    imports: BTreeMap<String, Vec<String>>,
    /// Absolute paths that the file uses, imports among them.
    paths: BTreeSet<Vec<String>>,
    /// String literals.
    literals: Vec<String>,
}

/// Reads one file's syntax. `here` is the file's module path.
struct Reader<'a> {
    here: &'a [String],
    children: BTreeSet<String>,
    /// How many modules within the file surround what is read.
    inline_depth: usize,
    module: Module,
}

impl Reader<'_> {
    /// The absolute path that `path` stands for, if it leads into this crate or to another one by name.
    fn absolute(&self, path: &[String]) -> Option<Vec<String>> {
        let (first, rest) = path.split_first()?;
        let mut absolute = match first.as_str() {
            "crate" | "minivmm" => vec![],
            "self" => self.here.to_vec(),
            "super" => {
                let levels = path.iter().take_while(|name| *name == "super").count();
                // Out of modules within this file first.
                let files = levels.saturating_sub(self.inline_depth);
                let mut parent = self
                    .here
                    .get(..self.here.len().checked_sub(files)?)?
                    .to_vec();
                parent.extend_from_slice(&path[levels..]);
                return Some(parent);
            }
            child if self.children.contains(child) => {
                let mut path = self.here.to_vec();
                path.push(child.into());
                path
            }
            // Another crate, or a name that is in scope.
            _ => return None,
        };
        absolute.extend_from_slice(rest);
        Some(absolute)
    }

    fn add_use(&mut self, prefix: &mut Vec<String>, tree: &syn::UseTree) {
        match tree {
            syn::UseTree::Path(path) => {
                prefix.push(path.ident.to_string());
                self.add_use(prefix, &path.tree);
                prefix.pop();
            }
            syn::UseTree::Group(group) => {
                for tree in &group.items {
                    self.add_use(prefix, tree);
                }
            }
            syn::UseTree::Name(name) => self.add_name(prefix, &name.ident, &name.ident),
            syn::UseTree::Rename(name) => self.add_name(prefix, &name.ident, &name.rename),
            syn::UseTree::Glob(_) => {
                if let Some(path) = self.absolute(prefix) {
                    self.module.paths.insert(path);
                }
            }
        }
    }

    fn add_name(&mut self, prefix: &[String], name: &syn::Ident, local: &syn::Ident) {
        let mut path = prefix.to_vec();
        if name != "self" {
            path.push(name.to_string());
        }
        let local = if local == "self" {
            path.last().cloned().unwrap_or_default()
        } else {
            local.to_string()
        };
        let path = self.absolute(&path).unwrap_or_else(|| {
            // Of another crate: kept for the reserved ones.
            let mut foreign = vec!["::".to_string()];
            foreign.extend(path);
            foreign
        });
        self.module.paths.insert(path.clone());
        self.module.imports.insert(local, path);
    }
}

fn is_test_only(attributes: &[syn::Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && matches!(&attribute.meta, syn::Meta::List(list)
                if list.tokens.to_string().split(|c: char| !c.is_alphanumeric()).any(|word| word == "test"))
    })
}

impl<'ast> Visit<'ast> for Reader<'_> {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !is_test_only(&item.attrs) {
            self.inline_depth += 1;
            visit::visit_item_mod(self, item);
            self.inline_depth -= 1;
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !is_test_only(&item.attrs) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        if !is_test_only(&item.attrs) {
            self.add_use(&mut Vec::new(), &item.tree);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        let names: Vec<String> = path.segments.iter().map(|s| s.ident.to_string()).collect();
        let imported = names.first().and_then(|name| self.module.imports.get(name));
        match imported {
            Some(start) => {
                let path = start.iter().chain(&names[1..]).cloned().collect();
                self.module.paths.insert(path);
            }
            None if names.len() > 1 => {
                let path = self
                    .absolute(&names)
                    .unwrap_or_else(|| std::iter::once("::".to_string()).chain(names).collect());
                self.module.paths.insert(path);
            }
            None => {}
        }
        visit::visit_path(self, path);
    }

    fn visit_lit_str(&mut self, literal: &'ast syn::LitStr) {
        self.module.literals.push(literal.value());
    }

    fn visit_macro(&mut self, item: &'ast syn::Macro) {
        // The strings of log and format macros, without their grammar.
        for token in item.tokens.clone() {
            if let Ok(literal) = syn::parse2::<syn::LitStr>(token.into()) {
                self.module.literals.push(literal.value());
            }
        }
    }

    fn visit_attribute(&mut self, attribute: &'ast syn::Attribute) {
        // thiserror's messages; documentation may name options.
        if attribute.path().is_ident("error")
            && let syn::Meta::List(list) = &attribute.meta
        {
            for token in list.tokens.clone() {
                if let Ok(literal) = syn::parse2::<syn::LitStr>(token.into()) {
                    self.module.literals.push(literal.value());
                }
            }
        }
    }
}

/// A crate's modules by path.
#[derive(Default)]
struct Crate(BTreeMap<Vec<String>, Module>);

impl Crate {
    /// Reads all sources below `root`, but for tests.
    fn read(root: &Path) -> Self {
        let mut files = Vec::new();
        collect(root, &mut Vec::new(), &mut files);
        Self::parse(files)
    }

    /// `files` are module paths and sources.
    fn parse(files: Vec<(Vec<String>, String)>) -> Self {
        let names: BTreeSet<Vec<String>> = files.iter().map(|(path, _)| path.clone()).collect();
        let modules = files.into_iter().map(|(here, source)| {
            let children = names
                .iter()
                .filter(|path| path.len() == here.len() + 1 && path.starts_with(&here))
                .filter_map(|path| path.last().cloned())
                .collect();
            let mut reader = Reader {
                here: &here,
                children,
                inline_depth: 0,
                module: Module::default(),
            };
            let syntax = syn::parse_file(&source).unwrap_or_else(|e| panic!("{here:?}: {e}"));
            // Imports first: a path may use a name that is imported further down.
            for item in &syntax.items {
                if let syn::Item::Use(item) = item {
                    reader.visit_item_use(item);
                }
            }
            reader.visit_file(&syntax);
            (here.clone(), reader.module)
        });
        Self(modules.collect())
    }

    /// The module that defines what `path` names, through re-exports.
    fn target(&self, path: &[String]) -> Option<&[String]> {
        if path.first().is_some_and(|name| name == "::") {
            return None;
        }
        let len = (0..=path.len())
            .rev()
            .find(|len| self.0.contains_key(&path[..*len]))?;
        let (name, module) = self.0.get_key_value(&path[..len])?;
        if let Some(next) = path.get(len)
            && let Some(import) = module.imports.get(next)
            && import != path
        {
            let onward: Vec<String> = import.iter().chain(&path[len + 1..]).cloned().collect();
            if onward.first().is_some_and(|name| name == "::") {
                // Another crate's, under a name of this module.
                return Some(name);
            }
            return self.target(&onward);
        }
        Some(name)
    }

    /// Who imports from whom.
    fn arrows(&self) -> BTreeMap<&[String], BTreeSet<&[String]>> {
        let mut arrows: BTreeMap<&[String], BTreeSet<&[String]>> = BTreeMap::new();
        for (from, module) in &self.0 {
            let targets = module.paths.iter().filter_map(|path| self.target(path));
            let targets = targets.filter(|to| *to != from.as_slice());
            arrows.insert(from, targets.collect());
        }
        arrows
    }

    /// Arrows that lead upwards in `layers`.
    fn upward(&self, layers: &[&[&str]]) -> Vec<String> {
        let rank = |path: &[String]| {
            let top = path.first().map_or("lib", String::as_str);
            let rank = layers.iter().position(|layer| layer.contains(&top));
            rank.unwrap_or_else(|| panic!("{top} is in no layer"))
        };
        let arrows = self.arrows();
        let pairs = arrows
            .iter()
            .flat_map(|(from, to)| to.iter().map(move |to| (*from, *to)));
        // What lies in the crate's root may be used anywhere; the root only declares modules.
        pairs
            .filter(|(from, to)| !from.is_empty() && rank(to) < rank(from))
            .map(|(from, to)| format!("{} imports from {}", shown(from), shown(to)))
            .collect()
    }

    /// Files that import one another, as the strongly connected components with more than one.
    fn circles(&self) -> Vec<String> {
        let arrows = self.arrows();
        let reach = |start: &[String]| {
            let mut seen: BTreeSet<&[String]> = BTreeSet::new();
            let mut next: Vec<&[String]> =
                arrows.get(start).into_iter().flatten().copied().collect();
            while let Some(at) = next.pop() {
                if seen.insert(at) {
                    next.extend(arrows.get(at).into_iter().flatten().copied());
                }
            }
            seen
        };
        let reaches: BTreeMap<&[String], _> =
            arrows.keys().map(|from| (*from, reach(from))).collect();
        let mut circles = BTreeSet::new();
        for (from, reached) in &reaches {
            let circle: Vec<String> = reached
                .iter()
                .filter(|to| reaches.get(*to).is_some_and(|back| back.contains(from)))
                .map(|to| shown(to))
                .collect();
            if !circle.is_empty() {
                circles.insert(circle.join(", "));
            }
        }
        circles.into_iter().collect()
    }
}

fn shown(path: &[String]) -> String {
    if path.is_empty() {
        "lib".into()
    } else {
        path.join("::")
    }
}

fn collect(dir: &Path, here: &mut Vec<String>, files: &mut Vec<(Vec<String>, String)>) {
    let mut entries: Vec<_> = std::fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().path())
        .collect();
    entries.sort();
    for path in entries {
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.is_dir() {
            if stem != "tests" && stem != "conformance" {
                here.push(stem);
                collect(&path, here, files);
                here.pop();
            }
        } else if path.extension().is_some_and(|e| e == "rs")
            && !["tests", "testing", "conformance"].contains(&stem.as_str())
        {
            let mut module = here.clone();
            if stem != "mod" && stem != "lib" {
                module.push(stem);
            }
            files.push((module, std::fs::read_to_string(&path).unwrap()));
        }
    }
}

fn minivmm() -> Crate {
    Crate::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"))
}

fn devices() -> Crate {
    Crate::read(&Path::new(env!("CARGO_MANIFEST_DIR")).join("devices/src"))
}

fn fail_with(what: &str, list: &[String]) {
    assert!(list.is_empty(), "{what}:\n  {}", list.join("\n  "));
}

#[test]
fn layers_import_only_from_below() {
    fail_with("arrows that lead upwards", &minivmm().upward(LAYERS));
}

#[test]
fn no_files_import_one_another_in_a_circle() {
    fail_with("circles in src", &minivmm().circles());
    fail_with("circles in devices", &devices().circles());
}

#[test]
fn crates_stay_in_their_layers() {
    let mut found = Vec::new();
    for (path, module) in &minivmm().0 {
        let top = path.first().map_or("lib", String::as_str);
        for (name, homes) in RESERVED_CRATES {
            let uses = module
                .paths
                .iter()
                .any(|path| path.starts_with(&["::".into(), (*name).into()]));
            if uses && !homes.contains(&top) {
                found.push(format!("{} names {name}", shown(path)));
            }
        }
    }
    for (path, module) in &devices().0 {
        for name in ["kvm_ioctls", "kvm_bindings", "clap"] {
            if module
                .paths
                .iter()
                .any(|path| path.starts_with(&["::".into(), name.into()]))
            {
                found.push(format!("devices {} names {name}", shown(path)));
            }
        }
    }
    fail_with("crates out of place", &found);
}

#[test]
fn messages_of_lower_layers_name_no_options() {
    let mut found = Vec::new();
    for (path, module) in &minivmm().0 {
        if path
            .first()
            .is_some_and(|top| WITHOUT_OPTIONS.contains(&top.as_str()))
        {
            for literal in &module.literals {
                let names_option = literal.match_indices("--").any(|(at, _)| {
                    let before = literal[..at].chars().next_back();
                    let after = literal[at + 2..].chars().next();
                    before.is_none_or(|c| !c.is_alphanumeric() && c != '-')
                        && after.is_some_and(|c| c.is_ascii_lowercase())
                });
                if names_option {
                    found.push(format!("{}: {literal:?}", shown(path)));
                }
            }
        }
    }
    fail_with("command-line options in lower layers", &found);
}

/// The checks themselves: what is planted is found.
#[test]
fn planted_faults_are_found() {
    let file = |path: &str, source: &str| {
        let path = path
            .split("::")
            .filter(|p| !p.is_empty())
            .map(String::from)
            .collect();
        (path, source.to_string())
    };
    let good = vec![
        file("", "pub mod vmm; pub mod boot; pub mod config;"),
        file(
            "vmm",
            "mod inner; pub use inner::Thing; use crate::boot::load;",
        ),
        file("vmm::inner", "pub struct Thing; use crate::config::Vm;"),
        file("boot", "pub fn load() { let _ = crate::config::Vm; }"),
        file(
            "config",
            "pub struct Vm; #[cfg(test)] mod t { use crate::vmm::Thing; }",
        ),
    ];
    let layers: &[&[&str]] = &[&["vmm"], &["boot"], &["config"], &["lib"]];
    let parsed = Crate::parse(good.clone());
    assert!(parsed.upward(layers).is_empty() && parsed.circles().is_empty());

    for (path, source, upward) in [
        (
            "config",
            "use crate::vmm::Thing;",
            "config imports from vmm::inner",
        ),
        (
            "config",
            "fn f() { crate::vmm::run(); }",
            "config imports from vmm",
        ),
        (
            "boot",
            "use super::super::vmm;\nfn f() { vmm::inner::g(); }",
            "boot imports from vmm",
        ),
    ] {
        let mut planted = good.clone();
        planted.push(file(&format!("{path}::planted"), source));
        let found = Crate::parse(planted).upward(layers);
        assert!(
            found
                .iter()
                .any(|f| f.replace("::planted", "").starts_with(upward)),
            "{source}: {found:?}"
        );
    }

    let mut planted = good;
    planted.push(file("vmm::child", "use super::helper;"));
    planted[1].1.push_str(" use child::g; pub fn helper() {}");
    assert_eq!(Crate::parse(planted).circles(), ["vmm, vmm::child"]);
}
