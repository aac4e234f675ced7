//! The modules that a distribution's kernel needs for an image: from the tree beside it or of this host.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::boot::inspect;

/// What an image needs. The checksum is for libcrc32c, which asks for it by a way that needs a program.
const WANTED: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "crc32c_generic",
    "erofs",
    "overlay",
];
/// Largest module in bytes, unpacked.
const MAX_MODULE: u64 = 64 << 20;

/// The modules that `kernel` needs, in the order in which they are loaded: a name for each, and what is in it. Empty where all is
/// built in, or no modules of this kernel are there.
pub(super) fn needed(kernel: &Path) -> io::Result<Vec<(String, Vec<u8>)>> {
    let Some(tree) = tree(kernel) else {
        return Ok(Vec::new());
    };
    let list = match fs::read_to_string(tree.join("modules.dep")) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let files = in_order(&list);
    let read = |file: &&str| {
        let path = tree.join(file);
        let content = unpacked(&path).map_err(|e| {
            io::Error::new(e.kind(), format!("cannot read {}: {e}", path.display()))
        })?;
        Ok((format!("{}.ko", module_name(file)), content))
    };
    files.iter().map(read).collect()
}

/// The tree of a kernel's modules.
fn tree(kernel: &Path) -> Option<PathBuf> {
    let beside = kernel.canonicalize().ok()?.parent()?.join("lib/modules");
    let version = inspect::version(kernel).ok()?;
    let version = version.as_deref().and_then(|v| v.split(' ').next());
    let version = version.filter(|version| !version.contains('/'));
    let of_version = version.into_iter().flat_map(|version| {
        [&beside, Path::new("/lib/modules")].map(|modules| modules.join(version))
    });
    // An ELF kernel does not say which version it is.
    let only = match version {
        Some(_) => None,
        None => fs::read_dir(&beside).ok()?.flatten().next(),
    };
    let only = only.map(|entry| entry.path());
    of_version.chain(only).find(|tree| tree.is_dir())
}

/// A module's name, by which others are known to need it.
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    let name = name.split(".ko").next().unwrap_or(name);
    name.replace('-', "_")
}

/// The files of what is wanted and of what that needs, from modules.dep: a line for each file, behind it those that it needs, the
/// one that is loaded first at the end.
fn in_order(list: &str) -> Vec<&str> {
    let lines = list.lines().filter_map(|line| line.split_once(':'));
    let by_name: BTreeMap<String, (&str, &str)> =
        lines.map(|line| (module_name(line.0), line)).collect();
    let mut order = Vec::new();
    for name in WANTED {
        if let Some((file, needs)) = by_name.get(*name) {
            let needs = needs.split_whitespace().rev();
            for file in needs.chain([*file]) {
                if !order.contains(&file) {
                    order.push(file);
                }
            }
        }
    }
    order
}

/// A module, which may be compressed, as its name says.
fn unpacked(path: &Path) -> io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let reader: Box<dyn Read> = match path.extension().and_then(|e| e.to_str()) {
        Some("xz") => Box::new(lzma_rust2::XzReader::new(file, true)),
        Some("gz") => Box::new(flate2::read::MultiGzDecoder::new(file)),
        Some("zst") => {
            Box::new(ruzstd::decoding::StreamingDecoder::new(file).map_err(io::Error::other)?)
        }
        _ => Box::new(file),
    };
    let mut content = Vec::new();
    reader.take(MAX_MODULE + 1).read_to_end(&mut content)?;
    if content.len() as u64 > MAX_MODULE {
        return Err(io::Error::other("it is too large"));
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_first() {
        let list = "kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko.xz\n\
                    kernel/lib/libcrc32c.ko.xz:\n\
                    kernel/drivers/virtio/virtio_mmio.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
                    kernel/drivers/block/virtio_blk.ko: kernel/drivers/virtio/virtio.ko kernel/drivers/virtio/virtio_ring.ko\n\
                    kernel/drivers/net/other.ko:\n";
        let names: Vec<String> = in_order(list).into_iter().map(module_name).collect();
        let wanted = "virtio_ring virtio virtio_mmio virtio_blk libcrc32c erofs";
        assert_eq!(names.join(" "), wanted);
        assert_eq!(module_name("a/crc32c-generic.ko.zst"), "crc32c_generic");
    }
}
