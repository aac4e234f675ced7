//! Container images: read, verified, and merged into one read-only file system, which a store keeps.
//!
//! Nothing of an image is unpacked to the host's file system: layers are read as streams and written into one EROFS. So neither
//! its names nor its owners, devices or attributes mean anything to the host.

mod blob;
mod erofs;
mod layer;
mod limits;
mod oci;
mod rootfs;
mod store;
mod tar;
#[cfg(test)]
mod tests;
mod tree;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

pub use blob::Digest;
pub use oci::ImageConfig;
pub use store::{Meta, Store, Stored};

use blob::{Parts, open_regular, unpacked};
use erofs::Data;
use layer::Merge;
use rootfs::{Listing, stamp};
use tar::bad;

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
    /// An OCI layout, a directory or an archive, or an archive of `docker save`; and the name of the image, if there are several.
    File(PathBuf, Option<String>),
    /// Such an archive on stdin.
    Stdin,
    /// A directory that is the root, or an archive of it.
    Root(PathBuf),
    /// What is in the store under this name or digest.
    Stored(String),
}

impl Source {
    /// What `text` means: `-` is stdin; what has a slash in front or is there is a file, perhaps with `:NAME`; the rest is stored.
    pub fn parse(text: &str) -> Self {
        if text == "-" {
            return Self::Stdin;
        }
        let path = Path::new(text);
        let with_name = text.rsplit_once(':');
        match with_name {
            _ if path.exists() => Self::File(path.to_owned(), None),
            Some((file, name)) if Path::new(file).exists() => {
                Self::File(file.into(), Some(name.to_owned()))
            }
            _ if text.starts_with(['/', '.']) => Self::File(path.to_owned(), None),
            _ => Self::Stored(text.to_owned()),
        }
    }

    fn shown(&self) -> String {
        match self {
            Self::Stdin => "on stdin".to_owned(),
            Self::File(path, Some(name)) => format!("{}:{name}", path.display()),
            Self::File(path, None) | Self::Root(path) => path.display().to_string(),
            Self::Stored(name) => name.clone(),
        }
    }

    /// Finds the image in the store, or puts it there.
    pub fn load(&self, store: &Store) -> Result<Stored, ImageError> {
        let loaded = match self {
            Self::Stdin => Parts::stream(&mut io::stdin().lock())
                .and_then(|parts| load(store, &parts, None, self.shown())),
            Self::File(path, name) => Parts::open(path)
                .and_then(|parts| load(store, &parts, name.as_deref(), self.shown())),
            Self::Root(path) => load_root(store, path),
            Self::Stored(name) => load_stored(store, name),
        };
        loaded.map_err(|source| ImageError {
            image: self.shown(),
            source,
        })
    }
}

fn load(store: &Store, parts: &Parts, name: Option<&str>, shown: String) -> io::Result<Stored> {
    let image = oci::Image::find(parts, name)?;
    store.get_or_make(&image.digest, |file| {
        let mut data = Data::new(file);
        let mut merge = Merge::new(&mut data);
        for (number, layer) in image.layers.iter().enumerate() {
            layer
                .read(parts, |content| merge.layer(content, true))
                .map_err(|e| {
                    let (number, count) = (number + 1, image.layers.len());
                    let shown = format!("layer {number} of {count} ({}): {e}", layer.name);
                    io::Error::new(e.kind(), shown)
                })?;
        }
        let meta = Meta {
            name: image.name.unwrap_or(shown),
            digest: image.digest.clone(),
            config: image.config,
        };
        let tree = merge.tree;
        Ok((meta, data.finish(&tree)?))
    })
}

/// A root file system is known by what changes with it, so that its content is read once.
fn load_root(store: &Store, path: &Path) -> io::Result<Stored> {
    let metadata = fs::metadata(path)?;
    let meta = |digest: &Digest| Meta {
        name: path.display().to_string(),
        digest: digest.clone(),
        config: ImageConfig::default(),
    };
    if metadata.is_dir() {
        let listing = Listing::read(path)?;
        let digest = listing.digest();
        return store.get_or_make(&digest, |file| {
            let mut data = Data::new(file);
            let mut merge = Merge::new(&mut data);
            listing.add_to(&mut merge)?;
            let tree = merge.tree;
            Ok((meta(&digest), data.finish(&tree)?))
        });
    }
    let archive = open_regular(path)?;
    let digest = Digest::of(stamp(&archive.metadata()?).as_bytes());
    store.get_or_make(&digest, |file| {
        let mut data = Data::new(file);
        let mut merge = Merge::new(&mut data);
        merge.layer(unpacked(archive)?, false)?;
        let tree = merge.tree;
        Ok((meta(&digest), data.finish(&tree)?))
    })
}

fn load_stored(store: &Store, name: &str) -> io::Result<Stored> {
    let mut found = store.called(name)?;
    match (found.pop(), found.is_empty()) {
        (Some(stored), true) => Ok(stored),
        (Some(_), false) => Err(bad("several images in the store have this name")),
        (None, _) => Err(io::Error::new(
            io::ErrorKind::NotFound,
            "there is no such file, and no such image in the store; images come from an OCI layout or an archive of docker save, not \
             from a registry yet: skopeo copy docker://NAME oci:DIR",
        )),
    }
}
