//! Arguments that say what is booted.

use std::path::PathBuf;

use clap::Args;

use crate::config::{MAX_CPUS, MemorySize, VmConfig};

/// A guest, whatever runs it.
#[derive(Debug, Clone, Default, Args)]
pub struct GuestArgs {
    /// Linux kernel: bzImage, ELF vmlinux or PVH ELF
    #[arg(short, long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM file system (cpio, compressed as the kernel can read it)
    #[arg(short, long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line, in place of the default [default: "console=ttyS0 panic=-1 quiet pci=conf1,noearly
    /// swiotlb=noforce noreplace-smp cryptomgr.notests"; with --console virtio console=hvc0, and earlycon=uart,io,0x3f8 behind it]
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// Add to the kernel command line, as in --append 'loglevel=7 -- /bin/sh'; may be given again
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub append: Vec<String>,
    /// vCPUs, 1 to 64 [default: 1]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=MAX_CPUS.into()))]
    pub cpus: Option<u8>,
    /// Guest memory, as in 512M or 2G [default: 256M]
    #[arg(short, long, value_name = "SIZE")]
    pub memory: Option<MemorySize>,
}

impl GuestArgs {
    /// `base` with these arguments over it.
    pub fn over(self, base: VmConfig) -> VmConfig {
        VmConfig {
            kernel: self.kernel.unwrap_or(base.kernel),
            initrd: self.initrd.or(base.initrd),
            cmdline: self.cmdline.or(base.cmdline),
            append: if self.append.is_empty() {
                base.append
            } else {
                Some(self.append.join(" "))
            },
            cpus: self.cpus.unwrap_or(base.cpus),
            memory: self.memory.unwrap_or(base.memory),
            ..base
        }
    }
}
