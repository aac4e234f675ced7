//! What a kernel file is, and whether it can be booted here.

use std::path::Path;

use serde::Serialize;

use super::check::Check;
use super::config::{self, KernelConfig};
use super::input::FileReader;
use super::scan::{self, Found};
use crate::boot::bzimage::BzImage;
use crate::boot::direct::DirectKernel;
use crate::boot::elf::{Class, ElfKernel};
use crate::boot::format::{self, FileKind};
use crate::boot::input::InputFile;
use crate::boot::payload;
use crate::boot::ram::mib_ceil;
use crate::boot::{BootError, KernelFormat, Role};
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

/// A kernel file and its checks.
#[derive(Debug, Serialize)]
pub struct KernelReport {
    /// What it is, if it is a kernel that can be loaded.
    pub info: Option<KernelInfo>,
    /// The checks.
    pub checks: Vec<Check>,
    /// Its build configuration, where one was found.
    #[serde(skip)]
    pub config: Option<KernelConfig>,
}

/// Inspects a kernel file; the checks come with what they are based on.
pub fn inspect_kernel(path: &Path) -> KernelReport {
    let (info, found) = match read(path) {
        Ok(read) => read,
        Err(error) => {
            let checks = vec![Check::unusable("file", &error)];
            return KernelReport {
                info: None,
                checks,
                config: None,
            };
        }
    };
    let mut checks = check_info(&info);
    let config = found
        .config
        .or_else(|| KernelConfig::next_to(path, info.version.as_deref()));
    match &config {
        Some(config) => {
            checks.push(Check::ok("configuration", &config.origin));
            checks.extend(config::check_config(config));
        }
        None => checks.push(no_config(&info)),
    }
    KernelReport {
        info: Some(info),
        checks,
        config,
    }
}

fn read(path: &Path) -> Result<(KernelInfo, Found), BootError> {
    let input = InputFile::open(Role::Kernel, path)?;
    let head = input.head()?;
    match FileKind::identify(&head) {
        FileKind::BzImage => read_bzimage(&input, &BzImage::parse(&input, &head)?),
        FileKind::Elf => read_elf(&input, &ElfKernel::parse(&input, &head)?),
        kind => Err(format::not_a_kernel(&input, kind, &head)),
    }
}

fn read_bzimage(input: &InputFile, image: &BzImage) -> Result<(KernelInfo, Found), BootError> {
    let compression = payload::format(input, image)
        .map(|format| format.to_string())
        .ok();
    let (found, decompresses_itself) = match DirectKernel::open(input, image, None) {
        Ok((kernel, _)) => (scan_file(kernel.file()), None),
        Err(why) => (Found::default(), Some(error_chain(&why))),
    };
    let info = KernelInfo {
        format: KernelFormat::BzImage,
        version: image.version.clone().or_else(|| found.version.clone()),
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
    Ok((info, found))
}

fn read_elf(input: &InputFile, kernel: &ElfKernel) -> Result<(KernelInfo, Found), BootError> {
    let linux64_entry = match (kernel.entry_64(input), kernel.pvh_entry) {
        (Ok(entry), _) => Some(entry),
        // Started by PVH it needs no other entry.
        (Err(_), Some(_)) => None,
        (Err(error), None) => return Err(error),
    };
    let found = scan_file(input);
    let info = KernelInfo {
        format: match kernel.class {
            Class::Bits64 => KernelFormat::Elf64,
            Class::Bits32 => KernelFormat::Elf32,
        },
        version: found.version.clone(),
        boot_protocol: None,
        compression: None,
        decompresses_itself: None,
        linux64_entry,
        pvh_entry: kernel.pvh_entry,
        load_gpa: kernel.range().start,
        min_memory_mib: mib_ceil(kernel.range().end),
        cmdline_max: crate::boot::CMDLINE_DEFAULT_MAX,
        initrd_end_max: None,
    };
    Ok((info, found))
}

fn scan_file(input: &InputFile) -> Found {
    scan::scan(FileReader::new(input, 0)).unwrap_or_default()
}

fn check_info(info: &KernelInfo) -> Vec<Check> {
    let format = match (info.format, info.boot_protocol) {
        (KernelFormat::BzImage, Some(version)) => {
            format!(
                "bzImage, boot protocol {}.{:02}",
                version >> 8,
                version & 0xff
            )
        }
        (KernelFormat::BzImage, None) => "bzImage".to_owned(),
        (KernelFormat::Elf64, _) => "vmlinux (ELF, 64 bits)".to_owned(),
        (KernelFormat::Elf32, _) => "vmlinux (ELF, 32 bits)".to_owned(),
    };
    let mut checks = vec![Check::ok("format", format)];
    checks.push(match &info.version {
        Some(version) => Check::ok("version", version),
        None => Check::info("version", "not found: perhaps not Linux"),
    });
    if info.format == KernelFormat::BzImage {
        let compression = info.compression.as_deref().unwrap_or("an unknown format");
        checks.push(match &info.decompresses_itself {
            None => Check::ok(
                "payload",
                format!("compressed: {compression}; minivmm decompresses it, once for many boots"),
            ),
            Some(why) => Check::info(
                "payload",
                format!(
                    "compressed: {compression}; the guest decompresses it at every boot: {why}"
                ),
            ),
        });
    }
    match info.linux64_entry {
        Some(entry) => checks.push(Check::ok("64-bit entry", format!("{entry:#x}"))),
        None => checks.push(Check::info("64-bit entry", "none")),
    }
    match (info.pvh_entry, info.format) {
        (Some(entry), _) => checks.push(Check::ok("PVH entry", format!("{entry:#x}"))),
        (None, KernelFormat::BzImage) => {}
        (None, _) => checks.push(Check::info(
            "PVH entry",
            "none: it starts by the Linux protocol",
        )),
    }
    checks.push(Check::info(
        "memory",
        format!(
            "{} MiB at least, loaded at {:#x}",
            info.min_memory_mib, info.load_gpa
        ),
    ));
    checks.push(Check::info(
        "command line",
        format!("{} bytes at most", info.cmdline_max),
    ));
    if let Some(end) = info.initrd_end_max {
        checks.push(Check::info("initrd", format!("below {end:#x}")));
    }
    checks
}

fn no_config(info: &KernelInfo) -> Check {
    let release = info
        .version
        .as_deref()
        .and_then(|version| version.split_whitespace().next());
    let name = release.map_or("config".to_owned(), |release| format!("config-{release}"));
    let found = if info.decompresses_itself.is_some() {
        format!("not looked for inside the payload, and no {name} next to the kernel")
    } else {
        format!("none embedded (CONFIG_IKCONFIG), and no {name} next to the kernel")
    };
    Check::info("configuration", found).hint(format!(
        "put {name} next to the kernel to have its options checked"
    ))
}
