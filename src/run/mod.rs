//! What `minivmm run` boots: a kernel, and an initramfs with minivmm itself as its first process.

mod disk;
mod kernel;
mod modules;
mod network;
mod running;

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::Path;

use rustix::fs::{MemfdFlags, memfd_create};

pub use disk::{Disks, Kept};
pub use kernel::{KernelError, find as find_kernel};
pub use network::passt_network;
pub use running::{Claim, Info, Running, Vm};

use modules::Module;

use crate::guest::{INIT, MODULES, ORDERS, Orders};
use crate::tools::cpio::{write_end, write_member};

/// Writes the initramfs for a guest with this kernel into a file without a name. The modules that the kernel needs are added to
/// `orders`.
pub fn initramfs(kernel: &Path, orders: &mut Orders) -> io::Result<File> {
    let modules = modules::needed(kernel, orders)?;
    let names = |modules: &Vec<Module>| modules.iter().map(|(name, _)| name.clone()).collect();
    [orders.modules, orders.later_modules] = modules.each_ref().map(names);
    let program = fs::read("/proc/self/exe")?;
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
    add(ORDERS, 0o600, &serde_json::to_vec(orders)?)?;
    for (name, content) in modules.iter().flatten() {
        add(&format!("{MODULES}/{name}"), 0o600, content)?;
    }
    write_end(&mut out)?;
    out.flush()?;
    drop(out);
    Ok(file)
}
