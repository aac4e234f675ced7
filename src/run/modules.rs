//! The modules that a distribution's kernel needs for an image: from the tree beside it or of this host.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use crate::about;
use crate::boot::inspect;
use crate::config::VmConfig;

/// What an image needs. The checksum is for libcrc32c, which asks for it by a way that needs a program.
const WANTED: &[&str] = &[
    "virtio_mmio",
    "virtio_blk",
    "virtio_console",
    "crc32c_generic",
    "erofs",
    "overlay",
];
/// What its network needs.
const NETWORK: &[&str] = &["virtio_net"];
/// What a disk for what is written needs.
const DISK: &[&str] = &["ext4"];
/// What other programs in the VM need, for their streams.
const LATER: &[&str] = &["vmw_vsock_virtio_transport"];
/// The list of all modules of a tree, with what each needs.
const LIST: &str = "modules.dep";
/// Largest module in bytes, unpacked.
const MAX_MODULE: u64 = 64 << 20;

/// A module: its name, and what is in it.
pub(super) type Module = (String, Vec<u8>);

/// The modules that the kernel of this VM needs, in the order in which they are loaded: those for a program, and those for others beside it.
/// Empty where all is built in, or no modules of this kernel are there.
pub(super) fn needed(config: &VmConfig) -> io::Result<[Vec<Module>; 2]> {
    let Some(tree) = tree(&config.kernel) else {
        return Ok(Default::default());
    };
    let list = match fs::read_to_string(tree.join(LIST)) {
        Ok(list) => list,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Default::default()),
        Err(e) => return Err(e),
    };
    let network = NETWORK.iter().filter(|_| !config.nets.is_empty());
    let disk = DISK.iter().filter(|_| config.disks.len() > 1);
    let wanted = WANTED.iter().chain(network).chain(disk);
    let files = in_order(&list, wanted);
    let read = |file: &&str| -> io::Result<Module> {
        let path = tree.join(file);
        let content = unpacked(&path);
        let content = content.map_err(about(format_args!("cannot read {}", path.display())))?;
        Ok((format!("{}.ko", module_name(file)), content))
    };
    let mut later = in_order(&list, LATER.iter());
    later.retain(|file| !files.contains(file));
    let read_all = |files: &[&str]| files.iter().map(read).collect::<io::Result<_>>();
    Ok([read_all(&files)?, read_all(&later)?])
}

/// The list of a kernel's modules, if there is a tree of them.
pub(super) fn list(kernel: &Path) -> Option<PathBuf> {
    Some(tree(kernel)?.join(LIST))
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
fn in_order<'a>(list: &'a str, wanted: impl Iterator<Item = &'a &'a str>) -> Vec<&'a str> {
    let lines = list.lines().filter_map(|line| line.split_once(':'));
    let by_name: BTreeMap<String, (&str, &str)> =
        lines.map(|line| (module_name(line.0), line)).collect();
    let mut order = Vec::new();
    for name in wanted {
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
        let names: Vec<String> = in_order(list, WANTED.iter())
            .into_iter()
            .map(module_name)
            .collect();
        let wanted = "virtio_ring virtio virtio_mmio virtio_blk libcrc32c erofs";
        assert_eq!(names.join(" "), wanted);
        assert_eq!(module_name("a/crc32c-generic.ko.zst"), "crc32c_generic");
    }
}
