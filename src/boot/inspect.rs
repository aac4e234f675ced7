//! What kernel and initrd files are, without a VM to load them for.

use std::path::Path;

use serde::Serialize;

use super::bzimage::BzImage;
use super::cmdline;
use super::direct::DirectKernel;
use super::elf::ElfKernel;
use super::error::{BootError, Role};
use super::format::{self, FileKind};
use super::input::InputFile;
use super::loaded::KernelFormat;
use super::payload;
use super::ram::mib_ceil;
use crate::error_chain;

/// What a kernel file says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KernelInfo {
    /// bzImage or ELF.
    pub format: KernelFormat,
    /// "6.1.0-56-cloud-amd64 (...) #1 SMP ...".
    pub version: Option<String>,
    /// Version of the Linux boot protocol, major in the high byte; bzImage only.
    pub boot_protocol: Option<u16>,
    /// How the payload of a bzImage is compressed.
    pub compression: Option<String>,
    /// Why the guest has to decompress itself; `None` if minivmm does it.
    pub decompresses_itself: Option<String>,
    /// GPA of the 64-bit entry.
    pub linux64_entry: Option<u64>,
    /// GPA of the 32-bit PVH entry.
    pub pvh_entry: Option<u32>,
    /// Where it is loaded.
    pub load_gpa: u64,
    /// Least memory of a VM for it in MiB, without what its user space needs.
    pub min_memory_mib: u64,
    /// Longest command line in bytes.
    pub cmdline_max: usize,
    /// End of the memory where an initrd may be; bzImage only.
    pub initrd_end_max: Option<u64>,
}

/// Inspects a kernel file. With what it says of itself comes the uncompressed kernel, unless only the guest can decompress it.
pub fn kernel(path: &Path) -> Result<(KernelInfo, Option<InputFile>), BootError> {
    let input = InputFile::open(Role::Kernel, path)?;
    let head = input.head()?;
    match FileKind::identify(&head) {
        FileKind::BzImage => bzimage(&input, &BzImage::parse(&input, &head)?),
        FileKind::Elf => {
            let kernel = ElfKernel::parse(&input, &head)?;
            Ok((elf(&input, &kernel)?, Some(input)))
        }
        kind => Err(format::not_a_kernel(&input, kind, &head)),
    }
}

/// The version that a bzImage says it is; an ELF file does not.
pub fn version(path: &Path) -> Result<Option<String>, BootError> {
    let input = InputFile::open(Role::Kernel, path)?;
    let head = input.head()?;
    match FileKind::identify(&head) {
        FileKind::BzImage => Ok(BzImage::parse(&input, &head)?.version),
        _ => Ok(None),
    }
}

fn bzimage(
    input: &InputFile,
    image: &BzImage,
) -> Result<(KernelInfo, Option<InputFile>), BootError> {
    let compression = payload::format(input, image)
        .map(|format| format.to_string())
        .ok();
    let (kernel, decompresses_itself) = match DirectKernel::open(input, image, None, false) {
        Ok((kernel, _)) => (Some(kernel.into_file()), None),
        Err(why) => (None, Some(error_chain(&why))),
    };
    let info = KernelInfo {
        format: KernelFormat::BzImage,
        version: image.version.clone(),
        boot_protocol: Some(image.header.version),
        compression,
        decompresses_itself,
        linux64_entry: Some(image.entry_64()),
        pvh_entry: None,
        load_gpa: image.load_gpa,
        min_memory_mib: mib_ceil(image.end_gpa),
        cmdline_max: image.cmdline_max(),
        initrd_end_max: Some(image.initrd_ceiling()).filter(|end| *end != u64::MAX),
    };
    Ok((info, kernel))
}

fn elf(input: &InputFile, kernel: &ElfKernel) -> Result<KernelInfo, BootError> {
    let linux64_entry = match (kernel.entry_64(input), kernel.pvh_entry) {
        (Ok(entry), _) => Some(entry),
        // Started by PVH it needs no other entry.
        (Err(_), Some(_)) => None,
        (Err(error), None) => return Err(error),
    };
    Ok(KernelInfo {
        format: kernel.format,
        version: None,
        boot_protocol: None,
        compression: None,
        decompresses_itself: None,
        linux64_entry,
        pvh_entry: kernel.pvh_entry,
        load_gpa: kernel.range().start,
        min_memory_mib: mib_ceil(kernel.range().end),
        cmdline_max: cmdline::DEFAULT_MAX,
        initrd_end_max: None,
    })
}

/// Opens an initrd, unless the file is something that cannot be one.
pub fn initrd(path: &Path) -> Result<InputFile, BootError> {
    let input = InputFile::open(Role::Initrd, path)?;
    format::check_initrd_kind(&input, &input.head()?)?;
    Ok(input)
}
