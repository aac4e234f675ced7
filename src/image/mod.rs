//! Container images: read, verified, and merged into one read-only file system, which a store keeps.
//!
//! Nothing of an image is unpacked to the host's file system: layers are read as streams and written into one EROFS. So neither
//! its names nor its owners, devices or attributes mean anything to the host.

mod blob;
mod digest;
mod erofs;
mod layer;
mod limits;
mod oci;
mod pax;
mod reference;
#[cfg(feature = "registry")]
mod registry;
mod rootfs;
mod store;
mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use digest::Digest;
pub use oci::ImageConfig;
pub use store::{Meta, Store, Stored};

use blob::{Parts, open_regular, unpacked};
use layer::Merge;
use limits::bad;
#[cfg(feature = "registry")]
use reference::Reference;
pub(crate) use rootfs::Listing;
use rootfs::stamp;

use crate::about;

/// Why an image cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the image {image}")]
pub struct ImageError {
    /// What the user calls it.
    pub image: String,
    /// Why.
    pub source: io::Error,
}

/// Where an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// An OCI layout, a directory or an archive, or an archive of `docker save`; and the name of the image, if there are several. What
    /// could be an image in the store as well is refused, unless it begins with `/` or `.`.
    File(PathBuf, Option<String>),
    /// Such an archive on stdin.
    Stdin,
    /// A directory that is the root, or an archive of it.
    Root(PathBuf),
    /// What is in the store under this name or digest, and if there is nothing, in a registry.
    Named(String),
    /// What is in a registry under this name now.
    #[cfg(feature = "registry")]
    Registry(String),
}

/// How an image is loaded.
#[derive(Default)]
pub struct How<'a> {
    /// A registry on another host may have no TLS.
    pub insecure: bool,
    /// Is told how far it is.
    pub progress: Option<&'a dyn Fn(&Progress)>,
}

/// How far the reading of an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Which of its layers is read, from 1 on.
    pub layer: usize,
    /// How many it has.
    pub layers: usize,
    /// Bytes of the layer that have been read.
    pub bytes: u64,
    /// Bytes that the layer has, if the image says so.
    pub size: Option<u64>,
}

impl Source {
    /// What `text` means: `-` is stdin; what has a slash in front or is there is a file, perhaps with `:NAME`, which may have colons
    /// as well; the rest is a name.
    pub fn parse(text: &str) -> Self {
        if text == "-" {
            return Self::Stdin;
        }
        let path = Path::new(text);
        let mut colons = text.match_indices(':').map(|(at, _)| text.split_at(at));
        let with_name = colons.find(|(file, _)| Path::new(file).exists());
        match with_name {
            _ if path.exists() => Self::File(path.to_owned(), None),
            Some((file, name)) => {
                let name = name.strip_prefix(':').unwrap_or(name);
                Self::File(file.into(), Some(name.to_owned()))
            }
            _ if text.starts_with(['/', '.']) => Self::File(path.to_owned(), None),
            _ => Self::Named(text.to_owned()),
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Stdin => "on stdin".to_owned(),
            Self::File(path, Some(name)) => format!("{}:{name}", path.display()),
            Self::File(path, None) | Self::Root(path) => path.display().to_string(),
            Self::Named(name) => name.clone(),
            #[cfg(feature = "registry")]
            Self::Registry(name) => name.clone(),
        }
    }

    /// Finds the image in the store, or puts it there.
    pub fn load(&self, store: &Store, how: &How<'_>) -> Result<Stored, ImageError> {
        let loaded = match self {
            Self::Stdin => Parts::stream(io::stdin().lock(), &|reader| store.spool(reader))
                .and_then(|parts| load(store, &parts, None, self.shown(), how)),
            Self::File(path, name) => check_not_stored(store, &self.shown())
                .and_then(|()| Parts::open(path, &|reader| store.spool(reader)))
                .and_then(|parts| load(store, &parts, name.as_deref(), absolute(path)?, how)),
            Self::Root(path) => load_root(store, path),
            Self::Named(name) => load_named(store, name, how),
            #[cfg(feature = "registry")]
            Self::Registry(name) => load_from_registry(store, name, how),
        };
        loaded.map_err(|source| ImageError {
            image: self.shown(),
            source,
        })
    }
}

/// Refuses what means a file here and would mean an image elsewhere: which one is run must not depend on the current directory.
fn check_not_stored(store: &Store, text: &str) -> io::Result<()> {
    if text.starts_with(['/', '.']) || store.called(text)?.is_empty() {
        return Ok(());
    }
    Err(bad(format!(
        "it is both a file here and an image in the store: write ./{text} for the file, or the beginning of the image's digest"
    )))
}

/// How a file without a name of its own is called in the store: no other file is, and no image in a registry.
fn absolute(path: &Path) -> io::Result<String> {
    Ok(std::path::absolute(path)?.display().to_string())
}

fn load(
    store: &Store,
    parts: &Parts,
    name: Option<&str>,
    default_name: String,
    how: &How<'_>,
) -> io::Result<Stored> {
    let image = oci::Image::find(parts, name)?;
    let name = image.name.unwrap_or(default_name);
    // Compressed, as far as they are.
    let layers = image.layers.iter().flat_map(|layer| &layer.blob);
    let bytes = layers.map(|(_, size)| *size).fold(0, u64::saturating_add);
    let stored = store.get_or_make(&image.digest, bytes, |file| {
        let mut merge = Merge::new(file);
        for (number, layer) in image.layers.iter().enumerate() {
            let progress = |bytes| {
                if let Some(progress) = how.progress {
                    progress(&Progress {
                        layer: number + 1,
                        layers: image.layers.len(),
                        bytes,
                        size: layer.blob.as_ref().map(|(_, size)| *size),
                    });
                }
            };
            layer
                .read(parts, &progress, |content| merge.layer(content, true))
                .map_err(|e| {
                    let (number, count) = (number + 1, image.layers.len());
                    about(format_args!("layer {number} of {count} ({})", layer.name))(e)
                })?;
        }
        Ok((image.config, merge.finish()?))
    })?;
    store.name(stored, &name)
}

/// A root file system is known by what changes with it, so that its content is read once.
fn load_root(store: &Store, path: &Path) -> io::Result<Stored> {
    let metadata = fs::metadata(path)?;
    let name = absolute(path)?;
    if metadata.is_dir() {
        let listing = Listing::read(path)?;
        let digest = listing.digest();
        let stored = store.get_or_make(&digest, listing.bytes(), |file| {
            let mut merge = Merge::new(file);
            listing.add_to(&mut merge)?;
            Ok((ImageConfig::default(), merge.finish()?))
        })?;
        return store.replace(stored, &name);
    }
    let archive = open_regular(path)?;
    let metadata = archive.metadata()?;
    let digest = Digest::of(stamp(&metadata).as_bytes());
    let stored = store.get_or_make(&digest, metadata.len(), |file| {
        let mut merge = Merge::new(file);
        merge.layer(unpacked(archive)?, false)?;
        Ok((ImageConfig::default(), merge.finish()?))
    })?;
    store.replace(stored, &name)
}

fn load_named(store: &Store, name: &str, how: &How<'_>) -> io::Result<Stored> {
    let mut found = store.called(name)?;
    match (found.pop(), found.is_empty()) {
        (Some(stored), true) => store.used(stored),
        (Some(_), false) => Err(bad("several images in the store have this name")),
        (None, _) => load_missing(store, name, how),
    }
}

#[cfg(not(feature = "registry"))]
fn load_missing(_: &Store, _: &str, _: &How<'_>) -> io::Result<Stored> {
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "there is no such file, and no such image in the store; this minivmm was built without a registry client",
    ))
}

#[cfg(feature = "registry")]
fn load_missing(store: &Store, name: &str, how: &How<'_>) -> io::Result<Stored> {
    let what = "it is neither a file nor in the store, and from the registry";
    load_from_registry(store, name, how).map_err(about(what))
}

#[cfg(feature = "registry")]
fn load_from_registry(store: &Store, name: &str, how: &How<'_>) -> io::Result<Stored> {
    let reference: Reference = name.parse().map_err(bad)?;
    let shown = reference.to_string();
    let repository = registry::Repository::new(reference, how.insecure)?;
    load(
        store,
        &Parts::Registry(Box::new(repository)),
        None,
        shown,
        how,
    )
}
