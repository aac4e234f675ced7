//! What a kernel file is, and whether it can be booted here.

use std::path::Path;

use serde::Serialize;

use super::check::Check;
use super::config::{self, KernelConfig};
use super::scan::{self, Found};
use crate::boot::inspect::KernelInfo;
use crate::boot::{self, InputFile, KernelFormat};

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
    let (mut info, image) = match boot::inspect::kernel(path) {
        Ok(kernel) => kernel,
        Err(error) => {
            let checks = vec![Check::unusable("file", &error)];
            return KernelReport {
                info: None,
                checks,
                config: None,
            };
        }
    };
    let found = image.as_ref().map(scan_file).unwrap_or_default();
    info.version = info.version.or(found.version);
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

fn scan_file(input: &InputFile) -> Found {
    scan::scan(input.reader()).unwrap_or_default()
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
