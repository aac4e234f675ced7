//! Loading kernels and initramfs images into guest memory.
//!
//! Two protocols start a kernel: Linux's own 64-bit one (Documentation/arch/x86/boot.rst), for bzImages and ELF kernels,
//! and PVH (xen/docs/misc/pvh.pandoc), for ELF kernels with its note. Files are foreign: every length is checked before
//! it is used, nothing is allocated by a length from a file without a bound, and each byte is read at most once,
//! straight into guest memory.
//!
//! Copied, not mapped from the file: a mapped kernel is loaded sooner, but the guest has it in pages of 4 KiB, each a fault of its
//! own. For Debian's vmlinux in an emulated host that was 0.02 s of loading instead of 0.32, and 1.4 s more in the guest.
//! Nor would guests share its text: while it boots, Linux changes 2,558 of that kernel's 2,579 pages of text itself, at return
//! sites, alternatives and calls. (They can have it merged when that is done, see [`enable_ksm`](crate::vmm::memory::enable_ksm).) And
//! nothing that happens to a file reaches a running guest.

mod bytes;
mod bzimage;
mod cache;
mod cmdline;
mod compression;
mod decompress;
mod direct;
mod elf;
mod error;
mod foreign;
mod format;
mod image;
mod initrd;
mod input;
pub mod inspect;
mod kaslr;
mod loaded;
mod payload;
mod ram;
mod relocs;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;

use vm_memory::{ByteValued, GuestMemoryError};

use self::elf::ElfKernel;
pub use crate::arch::regs::Entry;
use crate::arch::{boot_params, layout, pvh};
use crate::config::BootProtocol;
use crate::error_chain;
use bzimage::BzImage;
pub use cache::{data_dir, default_dir as default_cache_dir, user_dir as cache_dir};
pub(crate) use cmdline::{reboots_by_triple_fault, suit as suit_cmdline};
pub use compression::Compression;
use direct::DirectKernel;
pub use error::{BootError, Role};
use format::FileKind;
pub use image::panic_message;
pub(crate) use input::FileIdentity;
pub use input::InputFile;
pub use loaded::{KernelFormat, LoadedKernel, Loading};
use ram::GuestMemory;
pub use ram::MIB;
use ram::{check_fits, low_ram_end};

/// What is to be booted.
#[derive(Debug, Clone, Copy)]
pub struct BootSource<'a> {
    /// The kernel file.
    pub kernel: &'a Path,
    /// The initrd file.
    pub initrd: Option<&'a Path>,
    /// The command line as the kernel shall see it.
    pub cmdline: &'a str,
    /// The protocol to start by.
    pub protocol: BootProtocol,
    /// Where unpacked kernels are kept.
    pub cache: Option<&'a Path>,
    /// Whether a kernel may be added to them, or they are only read.
    pub may_cache: bool,
}

/// Loads kernel, initrd, command line and boot_params or PVH start information into guest memory.
///
/// The memory must be zero: kernels count on a zeroed bss, which is not written here.
pub fn load(mem: &GuestMemory, source: &BootSource<'_>) -> Result<LoadedKernel, BootError> {
    let input = InputFile::open(Role::Kernel, source.kernel)?;
    let head = input.head()?;
    match FileKind::identify(&head) {
        FileKind::BzImage => load_bzimage(mem, source, &input, &BzImage::parse(&input, &head)?),
        FileKind::Elf => load_elf(mem, source, &input, &ElfKernel::parse(&input, &head)?),
        kind => Err(format::not_a_kernel(&input, kind, &head)),
    }
}

fn load_bzimage(
    mem: &GuestMemory,
    source: &BootSource<'_>,
    input: &InputFile,
    image: &BzImage,
) -> Result<LoadedKernel, BootError> {
    if source.protocol == BootProtocol::Pvh {
        return Err(no_pvh(
            input,
            "a bzImage has no PVH entry; take the vmlinux out of it (scripts/extract-vmlinux in the kernel's source) or choose linux64",
        ));
    }
    check_fits(input.path(), mem, image.end_gpa)?;
    cmdline::write(mem, source.cmdline, image.cmdline_max())?;
    let initrd_range = load_initrd(mem, source, image.end_gpa, image.initrd_ceiling())?;
    // The initrd lies above the kernel wherever that is.
    let ram_end = match &initrd_range {
        Some(initrd) => initrd.start,
        None => low_ram_end(mem),
    };
    let direct = DirectKernel::open(input, image, source.cache, source.may_cache)
        .and_then(|(kernel, loading)| Ok((kernel.load(mem, ram_end, source.cmdline)?, loading)));
    let (kernel, loading) = match direct {
        Ok(direct) => direct,
        Err(why) => {
            log::info!(
                "the kernel {} decompresses itself: {}",
                input.path().display(),
                error_chain(&why)
            );
            (image.load(input, mem)?, Loading::Copied)
        }
    };
    if loading != Loading::Copied {
        keep_acpi(mem, source.cmdline, &kernel.range, image.cmdline_max())?;
    }
    boot_params::write(
        mem,
        &image.header_bytes,
        initrd_range.as_ref(),
        kernel.kaslr,
    )
    .map_err(boot_info)?;
    Ok(LoadedKernel {
        entry: Entry::Linux64 {
            rip: kernel.entry,
            boot_params: layout::BOOT_PARAMS_START,
        },
        format: KernelFormat::BzImage,
        version: image.version.clone(),
        kernel_bytes: kernel.file_bytes,
        kernel_loading: loading,
        kernel_range: kernel.range,
        initrd_range,
    })
}

fn load_elf(
    mem: &GuestMemory,
    source: &BootSource<'_>,
    input: &InputFile,
    kernel: &ElfKernel,
) -> Result<LoadedKernel, BootError> {
    let entry = match (source.protocol, kernel.pvh_entry) {
        (BootProtocol::Auto | BootProtocol::Pvh, Some(eip)) => Entry::Pvh {
            eip,
            start_info: layout::PVH_INFO_START as u32,
        },
        (BootProtocol::Pvh, None) => {
            let why = "it has no PVH note; build it with CONFIG_PVH=y or choose linux64";
            return Err(no_pvh(input, why));
        }
        (BootProtocol::Auto | BootProtocol::Linux64, _) => Entry::Linux64 {
            rip: kernel.entry_64(input)?,
            boot_params: layout::BOOT_PARAMS_START,
        },
    };
    let kernel_range = kernel.load(input, mem)?;
    cmdline::write(mem, source.cmdline, cmdline::DEFAULT_MAX)?;
    keep_acpi(mem, source.cmdline, &kernel_range, cmdline::DEFAULT_MAX)?;
    // A kernel without a setup header names no limit; only a 32-bit one has one, its direct map.
    let initrd_ceiling = match kernel.format {
        KernelFormat::Elf32 => 0x3800_0000,
        _ => u64::MAX,
    };
    let initrd_range = load_initrd(mem, source, kernel_range.end, initrd_ceiling)?;
    let written = match entry {
        Entry::Linux64 { .. } => boot_params::write(
            mem,
            boot_params::default_setup_header().as_slice(),
            initrd_range.as_ref(),
            false,
        ),
        Entry::Pvh { .. } => pvh::write(mem, initrd_range.as_ref()),
    };
    written.map_err(boot_info)?;
    Ok(LoadedKernel {
        entry,
        format: kernel.format,
        version: None,
        kernel_bytes: kernel.file_bytes(),
        kernel_loading: Loading::Copied,
        kernel_range,
        initrd_range,
    })
}

fn no_pvh(input: &InputFile, why: &str) -> BootError {
    let path = input.path().display();
    BootError::Refused(format!(
        "{path} cannot be started by the pvh protocol: {why}"
    ))
}

fn boot_info(source: GuestMemoryError) -> BootError {
    BootError::GuestMemory("the boot parameters", layout::PVH_INFO_START, source)
}

/// Without ACPI, Linux finds processors and interrupts in the MP table. A kernel that cannot read one keeps ACPI.
fn keep_acpi(
    mem: &GuestMemory,
    cmdline: &str,
    kernel: &Range<u64>,
    cmdline_max: usize,
) -> Result<(), BootError> {
    if !cmdline::words(cmdline).any(|word| word == "acpi=off")
        || image::reads_mp_tables(mem, kernel)
    {
        return Ok(());
    }
    log::warn!(
        "acpi=off is left out of the kernel command line: this kernel cannot read an MP table (CONFIG_X86_MPPARSE)"
    );
    cmdline::write(mem, &cmdline::with_acpi(cmdline), cmdline_max)
}

fn load_initrd(
    mem: &GuestMemory,
    source: &BootSource<'_>,
    floor: u64,
    ceiling: u64,
) -> Result<Option<Range<u64>>, BootError> {
    source
        .initrd
        .map(|path| initrd::load(mem, path, floor, ceiling))
        .transpose()
}
