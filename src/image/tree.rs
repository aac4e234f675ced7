//! The file system of an image in memory, but for the content of its files: layers are applied to it one after another.
//!
//! Names lead nowhere but into this tree: `..` and symbolic links are resolved within it, as a kernel would below a root.

use std::collections::BTreeMap;
use std::io;

use super::limits::{MAX_DEPTH, MAX_MEMBERS, MAX_METADATA, MAX_NAME, MAX_PATH, MAX_SYMLINKS, bad};

/// Index of an inode in its tree.
pub(super) type Id = usize;
/// The root directory.
pub(super) const ROOT: Id = 0;

/// Bytes that a name or an extended attribute takes in memory beside its own: its place in a map, and its allocation.
pub(super) const ENTRY_BYTES: usize = 64;
/// Bytes that a map takes from its first entry on: a node has room for eleven.
const NODE_BYTES: usize = 512;

/// What an inode is.
#[derive(Debug, Clone)]
pub(super) enum Content {
    Directory(BTreeMap<Vec<u8>, Entry>),
    /// Its first block in the image, and its size in bytes.
    File {
        block: u32,
        size: u64,
    },
    Symlink(Vec<u8>),
    /// A device, FIFO or socket: its numbers, as Linux encodes them (new_encode_dev).
    Special(u32),
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) id: Id,
    /// The layer that put it there.
    layer: usize,
}

/// A file of any kind.
#[derive(Debug, Clone)]
pub(super) struct Inode {
    /// Type and permissions, as stat(2) has them.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: (i64, u32),
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) content: Content,
    /// Of a directory in the tree: the last layer that had it, or something in it.
    pub(super) layer: usize,
    /// Of a directory: the last layer that removed all that lower layers have in it; 0 if none did.
    pub(super) hidden: usize,
}

impl Inode {
    pub(super) fn new(mode: u32, content: Content) -> Self {
        Self {
            mode,
            uid: 0,
            gid: 0,
            mtime: (0, 0),
            xattrs: BTreeMap::new(),
            content,
            layer: 0,
            hidden: 0,
        }
    }

    fn directory() -> Self {
        Self::new(libc::S_IFDIR | 0o755, Content::Directory(BTreeMap::new()))
    }

    /// Bytes of its link and extended attributes in memory.
    fn weight(&self) -> usize {
        let link = match &self.content {
            Content::Symlink(target) => target.len(),
            _ => 0,
        };
        let node = if self.xattrs.is_empty() {
            0
        } else {
            NODE_BYTES
        };
        let xattrs = self.xattrs.iter();
        let xattrs = xattrs.map(|(k, v)| ENTRY_BYTES + k.len() + v.len());
        link + node + xattrs.sum::<usize>()
    }
}

/// The tree, and which layer it is at.
pub(super) struct Tree {
    inodes: Vec<Inode>,
    layer: usize,
    /// How many more inodes it can take; those that lost their names count, too.
    pub(super) inodes_left: usize,
    /// Likewise, bytes of names, links and extended attributes.
    pub(super) metadata_left: usize,
}

/// The components of a path; `None` if it leaves the root by `..`, or has a name that no file can have.
pub(super) fn components(path: &[u8]) -> Option<Vec<&[u8]>> {
    let parts = path.split(|byte| *byte == b'/');
    parts
        .filter(|part| !part.is_empty() && *part != b".")
        .map(|part| (part != b".." && part.len() <= MAX_NAME && !part.contains(&0)).then_some(part))
        .collect()
}

impl Tree {
    pub(super) fn new() -> Self {
        Self {
            inodes: vec![Inode::directory()],
            layer: 0,
            inodes_left: MAX_MEMBERS,
            metadata_left: MAX_METADATA,
        }
    }

    /// From here on, names are those of the next layer.
    pub(super) fn next_layer(&mut self) {
        self.layer += 1;
    }

    pub(super) fn inode(&self, id: Id) -> io::Result<&Inode> {
        self.inodes.get(id).ok_or_else(|| bad("no such inode"))
    }

    fn inode_mut(&mut self, id: Id) -> io::Result<&mut Inode> {
        self.inodes.get_mut(id).ok_or_else(|| bad("no such inode"))
    }

    /// How many inodes there are; some may have no name any more.
    pub(super) fn len(&self) -> usize {
        self.inodes.len()
    }

    /// What is in a directory; `None` for anything else.
    pub(super) fn children(&self, id: Id) -> Option<&BTreeMap<Vec<u8>, Entry>> {
        match &self.inodes.get(id)?.content {
            Content::Directory(children) => Some(children),
            _ => None,
        }
    }

    fn children_mut(&mut self, id: Id) -> io::Result<&mut BTreeMap<Vec<u8>, Entry>> {
        match &mut self.inode_mut(id)?.content {
            Content::Directory(children) => Ok(children),
            _ => Err(bad("a file where a directory has to be")),
        }
    }

    fn child(&self, directory: Id, name: &[u8]) -> Option<Entry> {
        self.children(directory)?.get(name).copied()
    }

    /// The directory that `path` names, through symbolic links; made if need be and `create`. `None` if it is not there.
    pub(super) fn directory(&mut self, path: &[&[u8]], create: bool) -> io::Result<Option<Id>> {
        // The directories from the root to where the walk is.
        let mut stack = vec![ROOT];
        // Components to come, the next one last.
        let mut todo: Vec<Vec<u8>> = path.iter().rev().map(|part| part.to_vec()).collect();
        let mut symlinks = 0;
        // Bytes of their targets, and so a limit of the components that one path can lead through.
        let mut followed = 0;
        while let Some(part) = todo.pop() {
            let here = stack.last().copied().unwrap_or(ROOT);
            if part == b".." {
                if stack.len() > 1 {
                    stack.pop();
                }
                continue;
            }
            let id = match self.child(here, &part) {
                Some(entry) => entry.id,
                None if !create => return Ok(None),
                None => self.add(here, &part, Inode::directory())?,
            };
            match &self.inode(id)?.content {
                Content::Directory(_) => {
                    if create {
                        self.touch(here)?;
                    }
                    stack.push(id);
                    if stack.len() > MAX_DEPTH {
                        return Err(bad(format!("more than {MAX_DEPTH} nested directories")));
                    }
                }
                Content::Symlink(target) => {
                    symlinks += 1;
                    if symlinks > MAX_SYMLINKS {
                        return Err(bad("a loop of symbolic links"));
                    }
                    followed += target.len();
                    if followed > MAX_PATH {
                        return Err(bad(format!(
                            "symbolic links of more than {MAX_PATH} bytes on the way to it"
                        )));
                    }
                    let parts = target.split(|byte| *byte == b'/');
                    let parts = parts.filter(|part| !part.is_empty() && *part != b".");
                    let parts: Vec<Vec<u8>> = parts.map(<[u8]>::to_vec).collect();
                    if target.starts_with(b"/") {
                        stack.truncate(1);
                    }
                    if parts.iter().any(|part| part.len() > MAX_NAME) {
                        return Err(bad("a symbolic link with a name that is too long"));
                    }
                    todo.extend(parts.into_iter().rev());
                }
                _ if !create => return Ok(None),
                _ => return Err(bad("a file where a directory has to be")),
            }
        }
        let end = stack.last().copied().unwrap_or(ROOT);
        if create {
            self.touch(end)?;
        }
        Ok(Some(end))
    }

    /// The current layer has something in this directory.
    fn touch(&mut self, directory: Id) -> io::Result<()> {
        let layer = self.layer;
        self.inode_mut(directory)?.layer = layer;
        Ok(())
    }

    /// The file that `path` names; a symbolic link at its end is not followed.
    pub(super) fn find(&mut self, path: &[&[u8]]) -> io::Result<Option<Id>> {
        let Some((name, parents)) = path.split_last() else {
            return Ok(Some(ROOT));
        };
        let Some(parent) = self.directory(parents, false)? else {
            return Ok(None);
        };
        Ok(self.child(parent, name).map(|entry| entry.id))
    }

    /// Puts an inode into a directory. A directory that is there keeps its content if the new one is a directory; anything else
    /// that is there loses this name.
    pub(super) fn add(&mut self, directory: Id, name: &[u8], inode: Inode) -> io::Result<Id> {
        self.weigh(ENTRY_BYTES + name.len() + inode.weight())?;
        let layer = self.layer;
        let there = self.child(directory, name);
        if let (Some(entry), Content::Directory(_)) = (there, &inode.content)
            && self.children(entry.id).is_some()
        {
            self.set_attributes(entry.id, inode)?;
            self.children_mut(directory)?
                .insert(name.to_vec(), Entry { layer, ..entry });
            return Ok(entry.id);
        }
        if matches!(inode.content, Content::Directory(_)) {
            self.weigh(NODE_BYTES)?;
        }
        // Directories that only a name deeper down implies are no members of an archive: they count here.
        let left = self.inodes_left.checked_sub(1);
        self.inodes_left =
            left.ok_or_else(|| bad(format!("it has more than {MAX_MEMBERS} files")))?;
        let id = self.inodes.len();
        self.inodes.push(Inode { layer, ..inode });
        self.children_mut(directory)?
            .insert(name.to_vec(), Entry { id, layer });
        Ok(id)
    }

    /// Gives a directory, such as the root, the attributes of another; its content stays.
    pub(super) fn set_attributes(&mut self, id: Id, new: Inode) -> io::Result<()> {
        let layer = self.layer;
        let inode = self.inode_mut(id)?;
        *inode = Inode {
            content: std::mem::replace(&mut inode.content, Content::Special(0)),
            layer,
            hidden: inode.hidden,
            ..new
        };
        Ok(())
    }

    /// Gives a file another name. `over` is whether it replaces what this layer has put there.
    pub(super) fn link(
        &mut self,
        directory: Id,
        name: &[u8],
        id: Id,
        over: bool,
    ) -> io::Result<()> {
        if self.children(id).is_some() {
            return Err(bad("a hard link to a directory"));
        }
        self.weigh(ENTRY_BYTES + name.len())?;
        let layer = self.layer;
        let children = self.children_mut(directory)?;
        if over || children.get(name).is_none_or(|entry| entry.layer != layer) {
            children.insert(name.to_vec(), Entry { id, layer });
        }
        Ok(())
    }

    /// Removes what lower layers have put below this name; what this layer has put there stays.
    pub(super) fn hide(&mut self, directory: Id, name: &[u8]) -> io::Result<()> {
        let Some(entry) = self.child(directory, name) else {
            return Ok(());
        };
        let inode = self.inode(entry.id)?;
        let is_directory = matches!(inode.content, Content::Directory(_));
        if is_directory && inode.layer == self.layer {
            self.hide_all(entry.id)
        } else if entry.layer == self.layer {
            Ok(())
        } else {
            self.children_mut(directory)?.remove(name);
            Ok(())
        }
    }

    /// The same for all names in a directory. Directories are nested up to a limit, and so are these calls.
    pub(super) fn hide_all(&mut self, directory: Id) -> io::Result<()> {
        let layer = self.layer;
        let hidden = &mut self.inode_mut(directory)?.hidden;
        // A second time there is nothing to remove, since a layer only adds names of its own; and a layer with many files and
        // many whiteouts is not to take their product in time.
        if std::mem::replace(hidden, layer) == layer {
            return Ok(());
        }
        let names: Vec<Vec<u8>> = self.children_mut(directory)?.keys().cloned().collect();
        names.iter().try_for_each(|name| self.hide(directory, name))
    }

    /// Takes bytes of memory from what the tree can have.
    pub(super) fn weigh(&mut self, bytes: usize) -> io::Result<()> {
        let left = self.metadata_left.checked_sub(bytes);
        self.metadata_left =
            left.ok_or_else(|| bad("its names and attributes take more than 256 MiB"))?;
        Ok(())
    }
}
