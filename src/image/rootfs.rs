//! A root file system without an image around it: a directory of the host.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::blob::open_regular;
use super::digest::Digest;
use super::layer::{Merge, keeps_xattr};
use super::limits::{MAX_DEPTH, MAX_MEMBERS, MAX_XATTRS, bad};
use super::tree::{Content, Id, Inode, ROOT};
use crate::about;

/// A file below the directory.
struct Found {
    path: PathBuf,
    metadata: Metadata,
    /// Names on the way to it.
    depth: usize,
}

/// All that is in a directory, but for what is mounted there.
pub(crate) struct Listing(Vec<Found>);

/// What changes with a file's content.
pub(super) fn stamp(m: &Metadata) -> String {
    let times = (m.mtime(), m.mtime_nsec(), m.ctime(), m.ctime_nsec());
    format!("{} {} {} {times:?}", m.dev(), m.ino(), m.len())
}

impl Listing {
    /// Lists a directory.
    pub(crate) fn read(root: &Path) -> io::Result<Self> {
        let metadata = fs::metadata(root).map_err(about(root.display()))?;
        let device = metadata.dev();
        let mut list = vec![Found {
            path: root.to_owned(),
            metadata,
            depth: 0,
        }];
        let mut next = 0;
        while let Some(found) = list.get(next) {
            next += 1;
            let (path, depth) = (found.path.clone(), found.depth + 1);
            if !found.metadata.is_dir() || found.metadata.dev() != device {
                continue;
            }
            if depth > MAX_DEPTH {
                return Err(bad(format!("more than {MAX_DEPTH} nested directories")));
            }
            let entries = fs::read_dir(&path).map_err(about(path.display()))?;
            let mut paths: Vec<PathBuf> = entries
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<_>>()
                .map_err(about(path.display()))?;
            paths.sort();
            for path in paths {
                let metadata = fs::symlink_metadata(&path).map_err(about(path.display()))?;
                list.push(Found {
                    path,
                    metadata,
                    depth,
                });
            }
            if list.len() > MAX_MEMBERS {
                return Err(bad(format!("it has more than {MAX_MEMBERS} files")));
            }
        }
        Ok(Self(list))
    }

    /// All but the directory itself, each behind the directory that it is in.
    pub(crate) fn below_root(&self) -> impl Iterator<Item = (&Path, &Metadata)> {
        let below = self.0.iter().skip(1);
        below.map(|found| (found.path.as_path(), &found.metadata))
    }

    /// Bytes of its files on disk. What has several names is left out.
    pub(super) fn bytes(&self) -> u64 {
        let metadata = self.0.iter().map(|found| &found.metadata);
        let files = metadata.filter(|m| m.is_file() && m.nlink() == 1);
        files.map(|m| m.len().min(m.blocks() * 512)).sum()
    }

    /// Stands for the content, which is not read.
    pub(super) fn digest(&self) -> Digest {
        let stamps = self.0.iter().map(|found| {
            let path = found.path.as_os_str().as_bytes().escape_ascii();
            format!("{path} {}\n", stamp(&found.metadata))
        });
        Digest::of(stamps.collect::<String>().as_bytes())
    }

    /// Puts all of it into the image.
    pub(super) fn add_to(&self, merge: &mut Merge) -> io::Result<()> {
        // Files with several names, and directories.
        let mut links: HashMap<(u64, u64), Id> = HashMap::new();
        let mut directories: HashMap<&Path, Id> = HashMap::new();
        for found in &self.0 {
            let (path, metadata) = (&found.path, &found.metadata);
            if found.depth == 0 {
                let root = inode(path, metadata, Content::Directory(BTreeMap::new()))?;
                merge.tree.set_attributes(ROOT, root)?;
                directories.insert(path, ROOT);
                continue;
            }
            let parent = path.parent().and_then(|parent| directories.get(parent));
            let (Some(parent), Some(name)) = (parent, path.file_name()) else {
                continue;
            };
            let key = (metadata.dev(), metadata.ino());
            if let Some(id) = links.get(&key) {
                merge.tree.link(*parent, name.as_bytes(), *id, true)?;
                continue;
            }
            let content = content(merge, path, metadata).map_err(about(path.display()))?;
            let inode = inode(path, metadata, content).map_err(about(path.display()))?;
            let id = merge.tree.add(*parent, name.as_bytes(), inode)?;
            if metadata.is_dir() {
                directories.insert(path, id);
            } else if metadata.nlink() > 1 {
                links.insert(key, id);
            }
        }
        Ok(())
    }
}

fn content(merge: &mut Merge, path: &Path, metadata: &Metadata) -> io::Result<Content> {
    merge.count(if metadata.is_file() {
        metadata.len()
    } else {
        0
    })?;
    if metadata.is_dir() {
        Ok(Content::Directory(BTreeMap::new()))
    } else if metadata.is_symlink() {
        Ok(Content::Symlink(
            fs::read_link(path)?.into_os_string().into_vec(),
        ))
    } else if metadata.is_file() {
        let mut file = open_regular(path)?;
        merge.file(metadata.len(), &[(0, metadata.len())], |buf| {
            file.read_exact(buf)
        })
    } else {
        let (major, minor) = (
            rustix::fs::major(metadata.rdev()),
            rustix::fs::minor(metadata.rdev()),
        );
        Ok(Content::Special(super::layer::device_number(major, minor)?))
    }
}

fn inode(path: &Path, metadata: &Metadata, content: Content) -> io::Result<Inode> {
    Ok(Inode {
        uid: metadata.uid(),
        gid: metadata.gid(),
        mtime: (metadata.mtime(), metadata.mtime_nsec() as u32),
        xattrs: xattrs(path)?,
        ..Inode::new(metadata.mode(), content)
    })
}

fn xattrs(path: &Path) -> io::Result<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut names = vec![0u8; MAX_XATTRS];
    let length = match rustix::fs::llistxattr(path, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP | rustix::io::Errno::NOSYS) => 0,
        Err(e) => return Err(e.into()),
    };
    names.truncate(length);
    let mut found = BTreeMap::new();
    for name in names.split(|byte| *byte == 0).filter(|n| keeps_xattr(n)) {
        let mut value = vec![0u8; MAX_XATTRS];
        let length = rustix::fs::lgetxattr(path, name, &mut value[..])?;
        value.truncate(length);
        found.insert(name.to_vec(), value);
    }
    Ok(found)
}
