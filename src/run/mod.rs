//! What `minivmm run` boots: a kernel, and an initramfs with minivmm itself as its first process.

mod disk;
mod kernel;
mod modules;
mod network;
mod running;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use rustix::fs::{MemfdFlags, memfd_create};

pub use disk::{Disks, Kept};
pub use kernel::{KernelError, find as find_kernel};
pub use network::passt_network;
pub use running::{Claim, Info, Running, Vm};

use modules::Module;

use crate::boot::FileIdentity;
use crate::config::VmConfig;
use crate::guest::{INIT, MODULES, SETUP, Setup};
use crate::tools::cpio::{write_end, write_member};

/// This program, which is the guest's first process.
const PROGRAM: &str = "/proc/self/exe";

/// The path of a file of this process that may have no other.
pub fn descriptor(file: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// The files that this kernel and its initramfs are made of, of which any change makes other ones. Its modules change with their list.
pub(crate) fn ingredients(kernel: &Path) -> io::Result<Vec<FileIdentity>> {
    let modules = modules::list(kernel).filter(|list| list.exists());
    let files = [kernel.to_owned(), PROGRAM.into()];
    let identity = |file| Ok(FileIdentity::of(&fs::metadata(file)?));
    files.into_iter().chain(modules).map(identity).collect()
}

/// Writes the initramfs for this VM into a file without a name. The modules that its kernel needs are added to `setup`.
pub fn initramfs(config: &VmConfig, mut setup: Setup) -> io::Result<File> {
    let modules = modules::needed(config)?;
    let names = |modules: &Vec<Module>| modules.iter().map(|(name, _)| name.clone()).collect();
    [setup.modules, setup.later_modules] = modules.each_ref().map(names);
    let program = fs::read(PROGRAM)?;
    let file = File::from(memfd_create("initramfs", MemfdFlags::CLOEXEC)?);
    let mut out = BufWriter::new(&file);
    let none = (0, 0);
    for dir in ["dev", "proc", ".minivmm", MODULES] {
        let dir = dir.trim_start_matches('/');
        write_member(&mut out, dir, libc::S_IFDIR | 0o755, none, &[])?;
    }
    // The kernel opens it for the first process, before that can mount anything.
    write_member(&mut out, "dev/console", libc::S_IFCHR | 0o600, (5, 1), &[])?;
    let mut add = |path: &str, mode: u32, content: &[u8]| {
        let name = path.trim_start_matches('/');
        write_member(&mut out, name, libc::S_IFREG | mode, none, content)
    };
    add(INIT, 0o755, &program)?;
    add(SETUP, 0o600, &serde_json::to_vec(&setup)?)?;
    for (name, content) in modules.iter().flatten() {
        add(&format!("{MODULES}/{name}"), 0o600, content)?;
    }
    write_end(&mut out)?;
    out.flush()?;
    drop(out);
    Ok(file)
}
