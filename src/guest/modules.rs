//! Modules of the guest's kernel, from the initramfs.

use std::fs::File;
use std::io;
use std::path::Path;

use rustix::io::Errno;
use rustix::system::finit_module;

use super::orders::MODULES;

pub(super) fn open(name: &str) -> io::Result<File> {
    File::open(Path::new(MODULES).join(name))
}

pub(super) fn load(file: &File) -> io::Result<()> {
    match finit_module(file, c"", 0) {
        // It is there already.
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(e) => Err(e.into()),
    }
}
