//! What the JSON of an image says: OCI image specification 1.1 (image-layout.md, image-index.md, manifest.md, config.md) and the
//! archives of `docker save`.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::blob::{Hashing, Parts};
use super::digest::Digest;
use super::limits::{MAX_INDEXES, MAX_JSON, MAX_LAYERS, bad};
use super::reference::same_image;

/// Media types of an index.
const INDEXES: &[&str] = &[
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
];
/// Media types of a configuration.
const CONFIGS: &[&str] = &[
    "application/vnd.oci.image.config.v1+json",
    "application/vnd.docker.container.image.v1+json",
];
/// How media types of layers begin, and how they end; which compression it is, the layer itself says.
const LAYERS: &[&str] = &[
    "application/vnd.oci.image.layer.",
    "application/vnd.docker.image.rootfs.",
];
const ARCHIVES: &[&str] = &["tar", "tar+gzip", "tar.gzip", "tar+zstd", "tar.zstd"];
/// The annotation of an index that gives an image a name; docker's has only the tag in it.
const REF_NAME: &str = "org.opencontainers.image.ref.name";
/// The same by containerd, with the repository.
const IMAGE_NAME: &str = "io.containerd.image.name";

/// A blob by its digest.
#[derive(Debug, Clone, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: Digest,
    size: u64,
    platform: Option<Platform>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Deserialize)]
struct Platform {
    architecture: String,
    os: String,
    variant: Option<String>,
}

/// An index or a manifest. What claims to be both is neither (CVE-2021-41190).
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    media_type: Option<String>,
    manifests: Option<Vec<Descriptor>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
}

/// An entry of manifest.json in an archive of `docker save`.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// An image's configuration, as far as it matters here.
#[derive(Debug, Deserialize)]
struct ConfigFile {
    architecture: Option<String>,
    os: Option<String>,
    config: Option<ImageConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    diff_ids: Vec<Digest>,
}

/// How an image's program is started. Null and absent are the same.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct ImageConfig {
    /// User, or user and group, by name or number.
    pub user: Option<String>,
    /// NAME=VALUE.
    pub env: Option<Vec<String>>,
    /// The words before the command.
    pub entrypoint: Option<Vec<String>>,
    /// The command, unless another is given.
    pub cmd: Option<Vec<String>>,
    /// Work directory.
    pub working_dir: Option<String>,
    /// The signal that asks it to end, by name or number.
    pub stop_signal: Option<String>,
}

/// A layer: where it is, and what it has to be.
pub(super) struct Layer {
    pub(super) name: String,
    /// Digest and size of the blob, if the image says so.
    pub(super) blob: Option<(Digest, u64)>,
    /// Digest of the archive in it.
    pub(super) diff_id: Digest,
}

/// An image whose parts are to be read.
pub(super) struct Image {
    /// That of its manifest, or in an archive without one of its configuration.
    pub(super) digest: Digest,
    /// What its archive or index calls it.
    pub(super) name: Option<String>,
    pub(super) config: ImageConfig,
    pub(super) layers: Vec<Layer>,
}

fn parse<T: DeserializeOwned>(what: &str, bytes: &[u8]) -> io::Result<T> {
    serde_json::from_slice(bytes).map_err(|e| bad(format!("{what}: {e}")))
}

impl Descriptor {
    /// What it is called in a layout, and what it has to be.
    fn place(&self) -> (String, (Digest, u64)) {
        let name = format!("blobs/sha256/{}", self.digest.hex());
        (name, (self.digest.clone(), self.size))
    }

    /// What an index calls it, the full name first.
    fn names(&self) -> impl Iterator<Item = &String> {
        let names = [IMAGE_NAME, REF_NAME].map(|key| self.annotations.get(key));
        names.into_iter().flatten()
    }

    fn platform(&self) -> Option<String> {
        let platform = self.platform.as_ref()?;
        let variant = platform.variant.iter().map(|variant| format!("/{variant}"));
        let variant: String = variant.collect();
        Some(format!(
            "{}/{}{variant}",
            platform.os, platform.architecture
        ))
    }

    /// Whether it is for this machine; `None` if it does not say. Variants ask for processors that not everyone has; attestations are
    /// for "unknown/unknown".
    fn fits(&self) -> Option<bool> {
        let platform = self.platform()?;
        Some(["linux/amd64", "linux/amd64/v1"].contains(&platform.as_str()))
    }

    fn is_config(&self) -> bool {
        CONFIGS.contains(&self.media_type.as_str())
    }

    fn is_layer(&self) -> bool {
        let kind = LAYERS.iter().find_map(|l| self.media_type.strip_prefix(l));
        kind.is_some_and(|kind| ARCHIVES.iter().any(|archive| kind.ends_with(archive)))
    }
}

/// Reads a blob of JSON, and verifies it.
fn read(parts: &Parts, blob: &Descriptor) -> io::Result<Vec<u8>> {
    if blob.size > MAX_JSON {
        return Err(bad(format!("{} has {} bytes", blob.digest, blob.size)));
    }
    let bytes = match parts {
        #[cfg(feature = "registry")]
        Parts::Registry(repository) if !blob.is_config() => {
            repository.manifest(Some(&blob.digest))?.bytes
        }
        _ => {
            let (name, place) = blob.place();
            parts.read_all(&name, Some(&place))?
        }
    };
    if bytes.len() as u64 != blob.size || Digest::of(&bytes) != blob.digest {
        return Err(bad(format!("{} is not what its digest says", blob.digest)));
    }
    Ok(bytes)
}

impl Image {
    /// Finds the image in `parts`; if there are several, the one that is called `name`.
    pub(super) fn find(parts: &Parts, name: Option<&str>) -> io::Result<Self> {
        #[cfg(feature = "registry")]
        if let Parts::Registry(repository) = parts {
            let manifest = repository.manifest(None)?;
            let chosen = Descriptor {
                media_type: manifest.media_type,
                digest: manifest.digest,
                size: manifest.bytes.len() as u64,
                platform: None,
                annotations: BTreeMap::new(),
            };
            return Self::of_manifest(parts, chosen, manifest.bytes, None);
        }
        if parts.has("index.json") && parts.has("oci-layout") {
            Self::from_layout(parts, name)
        } else if parts.has("manifest.json") {
            Self::from_docker_archive(parts, name)
        } else {
            Err(bad(
                "it has neither index.json and oci-layout (an OCI layout) nor manifest.json (docker save)",
            ))
        }
    }

    fn from_layout(parts: &Parts, name: Option<&str>) -> io::Result<Self> {
        let index: Document = parse("index.json", &parts.read_all("index.json", None)?)?;
        let mut all = index.manifests.unwrap_or_default();
        if let Some(name) = name {
            all.retain(|blob| blob.names().any(|other| same_image(other, name)));
            if all.is_empty() {
                return Err(no_such_image());
            }
        }
        // An image with several names is there several times.
        let mut digests = BTreeSet::new();
        let fitting = all.iter().filter(|blob| blob.fits() != Some(false));
        let images = fitting.filter(|blob| digests.insert(&blob.digest));
        let names = images.map(|blob| match blob.names().next() {
            Some(name) => name.clone(),
            None => blob.digest.to_string(),
        });
        let names: Vec<String> = names.collect();
        if names.len() > 1 {
            return Err(several(&names));
        }
        let chosen = choose(&all)?.clone();
        let called = chosen.names().next().cloned();
        let bytes = read(parts, &chosen)?;
        Self::of_manifest(parts, chosen, bytes, called)
    }

    /// The image that `bytes`, an index or a manifest, leads to.
    fn of_manifest(
        parts: &Parts,
        mut chosen: Descriptor,
        mut bytes: Vec<u8>,
        called: Option<String>,
    ) -> io::Result<Self> {
        // An index may name indexes.
        for _ in 0..MAX_INDEXES {
            let document: Document = parse(&chosen.digest.to_string(), &bytes)?;
            let is_index = INDEXES.contains(&chosen.media_type.as_str());
            match (document.manifests, document.config, document.layers) {
                _ if (document.media_type.as_ref()).is_some_and(|t| *t != chosen.media_type) => {
                    return Err(bad(format!(
                        "{} is of type '{}', and what names it says '{}'",
                        chosen.digest,
                        document.media_type.unwrap_or_default(),
                        chosen.media_type
                    )));
                }
                (Some(manifests), None, None) if is_index => {
                    chosen = choose(&manifests)?.clone();
                    bytes = read(parts, &chosen)?;
                }
                (None, Some(config), Some(layers)) if !is_index => {
                    let strange = [&config].into_iter().filter(|c| !c.is_config());
                    let strange = strange.chain(layers.iter().filter(|l| !l.is_layer()));
                    if let Some(blob) = strange.into_iter().next() {
                        return Err(bad(format!(
                            "it is no container image: it has a part of type '{}'",
                            blob.media_type
                        )));
                    }
                    let file = parse(&config.digest.to_string(), &read(parts, &config)?)?;
                    let layers = layers.iter().map(Descriptor::place);
                    let layers = layers.map(|(name, blob)| (name, Some(blob)));
                    return Self::new(chosen.digest, called, file, layers.collect());
                }
                _ => {
                    return Err(bad(format!(
                        "{} has not what belongs into its type, '{}'",
                        chosen.digest, chosen.media_type
                    )));
                }
            }
        }
        Err(bad("its indexes are nested too deep"))
    }

    fn from_docker_archive(parts: &Parts, name: Option<&str>) -> io::Result<Self> {
        let mut images: Vec<SavedImage> =
            parse("manifest.json", &parts.read_all("manifest.json", None)?)?;
        let tags = |image: &SavedImage| image.repo_tags.clone().unwrap_or_default();
        if let Some(name) = name {
            images.retain(|image| tags(image).iter().any(|tag| same_image(tag, name)));
        }
        let (image, others) = images.split_first().ok_or_else(no_such_image)?;
        if !others.is_empty() {
            let names: Vec<String> = images.iter().flat_map(tags).collect();
            return Err(several(&names));
        }
        let bytes = parts.read_all(&image.config, None)?;
        let digest = Digest::of(&bytes);
        // Its name is its digest, in either format.
        let stem = image.config.strip_suffix(".json");
        let stem = stem.or_else(|| image.config.strip_prefix("blobs/sha256/"));
        if stem != Some(digest.hex()) {
            return Err(bad(format!("{} is not what its name says", image.config)));
        }
        let layers = image.layers.iter().map(|name| (name.clone(), None));
        Self::new(
            digest,
            tags(image).into_iter().next(),
            parse(&image.config, &bytes)?,
            layers.collect(),
        )
    }

    fn new(
        digest: Digest,
        name: Option<String>,
        file: ConfigFile,
        layers: Vec<(String, Option<(Digest, u64)>)>,
    ) -> io::Result<Self> {
        let platform = [file.os, file.architecture].map(Option::unwrap_or_default);
        if platform != ["linux", "amd64"] {
            return Err(bad(format!(
                "it is for {}, not for linux/amd64",
                platform.join("/")
            )));
        }
        if layers.len() != file.rootfs.diff_ids.len() || layers.len() > MAX_LAYERS {
            return Err(bad(format!(
                "it has {} layers, and its configuration {}; at most {MAX_LAYERS} are possible",
                layers.len(),
                file.rootfs.diff_ids.len()
            )));
        }
        let layers = layers.into_iter().zip(file.rootfs.diff_ids);
        Ok(Self {
            digest,
            name,
            config: file.config.unwrap_or_default(),
            layers: layers
                .map(|((name, blob), diff_id)| Layer {
                    name,
                    blob,
                    diff_id,
                })
                .collect(),
        })
    }
}

fn several(names: &[String]) -> io::Error {
    bad(format!(
        "it has several images ({}): give one's name, as in FILE:NAME",
        names.join(", ")
    ))
}

fn no_such_image() -> io::Error {
    bad("no such image is in it")
}

/// The image for this machine: the first that says so, or else the first that says nothing (image-index.md, "manifests").
fn choose(manifests: &[Descriptor]) -> io::Result<&Descriptor> {
    let first = |fits| manifests.iter().find(|blob| blob.fits() == fits);
    first(Some(true)).or_else(|| first(None)).ok_or_else(|| {
        let there: Vec<String> = manifests.iter().filter_map(Descriptor::platform).collect();
        bad(format!(
            "it has no image for linux/amd64, only for: {}",
            there.join(", ")
        ))
    })
}

impl Layer {
    /// Has `use_content` read the archive in the layer, and verifies digests and size of all that was read.
    pub(super) fn read(
        &self,
        parts: &Parts,
        progress: &dyn Fn(u64),
        use_content: impl FnOnce(&mut dyn Read) -> io::Result<()>,
    ) -> io::Result<()> {
        let size = self.blob.as_ref().map_or(u64::MAX - 1, |(_, size)| *size);
        let stored = parts.read(&self.name, self.blob.as_ref())?;
        let mut blob = Hashing::new(stored.take(size + 1), progress);
        let mut content = Hashing::new(super::blob::unpacked(&mut blob)?, &|_| ());
        use_content(&mut content)?;
        let (diff_id, _) = content.finish()?;
        let (digest, bytes) = blob.finish()?;
        if let Some((wanted, size)) = &self.blob
            && (*wanted != digest || *size != bytes)
        {
            return Err(bad(format!("its {bytes} bytes have the digest {digest}")));
        }
        if diff_id != self.diff_id {
            return Err(bad(format!(
                "unpacked, its digest is {diff_id} instead of {}",
                self.diff_id
            )));
        }
        Ok(())
    }
}
