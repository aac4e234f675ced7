//! What an initrd file is, and whether the kernel can unpack it.

use std::io::Read;
use std::path::Path;

use flate2::read::GzDecoder;
use memchr::memmem;

use super::check::Check;
use super::config::{KernelConfig, Setting};
use crate::boot::{self, BootError, Compression};
use crate::size;
use crate::tools::cpio;

/// Most bytes that are read, and most that are decompressed.
const MAX_LEN: u64 = 1 << 30;

/// Inspects an initrd file, and checks that a kernel with this configuration unpacks it.
pub fn check_initrd(path: &Path, kernel_config: Option<&KernelConfig>) -> Vec<Check> {
    inspect(path, kernel_config).unwrap_or_else(|error| vec![Check::unusable("file", &error)])
}

fn inspect(path: &Path, config: Option<&KernelConfig>) -> Result<Vec<Check>, BootError> {
    let input = boot::inspect::initrd(path)?;
    let mut checks = vec![Check::info("size", size(input.len()))];
    if config.is_some_and(|config| config.get("BLK_DEV_INITRD") != Setting::Yes) {
        checks.push(
            Check::fail("kernel support", "the kernel takes no initrd")
                .hint("build the kernel with CONFIG_BLK_DEV_INITRD=y"),
        );
    }
    let mut file = Vec::new();
    if let Err(error) = input.reader().take(MAX_LEN).read_to_end(&mut file) {
        checks.push(Check::unusable("file", &error));
    }
    checks.extend(check_archives(&file, config));
    Ok(checks)
}

/// Archives may follow one another, plain ones first: microcode, then the rest (early-userspace/buffer-format.rst).
fn check_archives(file: &[u8], config: Option<&KernelConfig>) -> Vec<Check> {
    let mut checks = Vec::new();
    let mut init = false;
    let mut rest = file;
    for number in 1.. {
        let subject = format!("archive {number}");
        if cpio::is_member(rest) {
            let Some(end) = memmem::find(rest, cpio::TRAILER) else {
                checks.push(damaged(subject, "a cpio archive without an end"));
                return checks;
            };
            let (archive, behind) = rest.split_at(end + cpio::TRAILER.len());
            init |= has_init(archive);
            checks.push(Check::ok(subject, format!("cpio, {}", size(end as u64))));
            let padding = behind.iter().take_while(|byte| **byte == 0).count();
            rest = behind.get(padding..).unwrap_or_default();
        } else if let Some(compression) = Compression::identify(rest) {
            checks.push(check_compression(number, compression, config));
            let mut unpacked = Vec::new();
            let mut decoder = GzDecoder::new(rest).take(MAX_LEN);
            match compression {
                Compression::Gzip => match decoder.read_to_end(&mut unpacked) {
                    Ok(_) => init |= has_init(&unpacked),
                    Err(error) => {
                        checks.push(damaged(subject, &error.to_string()));
                        return checks;
                    }
                },
                // Nobody knows what is in it.
                _ => return checks,
            }
            break;
        } else if number == 1 {
            checks.push(
                Check::warn(subject, "no format that Linux is known to unpack").hint(
                    "make a cpio archive: (cd DIR && find . | cpio -o -H newc) > initrd.cpio",
                ),
            );
            return checks;
        } else {
            if !rest.is_empty() {
                let found = "unknown bytes follow; the kernel will not unpack them";
                checks.push(Check::warn(subject, found));
            }
            break;
        }
    }
    checks.push(check_init(init));
    checks
}

fn damaged(subject: String, why: &str) -> Check {
    Check::fail(subject, format!("damaged: {why}")).hint("make or download the initrd again")
}

/// Whether an archive has a member that the kernel would run.
fn has_init(archive: &[u8]) -> bool {
    let names: [&[u8]; 3] = [b"init\0", b"./init\0", b"/init\0"];
    names.iter().any(|name| {
        memmem::find_iter(archive, name).any(|at| {
            let header = at.checked_sub(cpio::HEADER_LEN);
            header.is_some_and(|at| archive.get(at..).is_some_and(cpio::is_member))
        })
    })
}

fn check_init(present: bool) -> Check {
    if present {
        Check::ok("/init", "present")
    } else {
        Check::warn(
            "/init",
            "absent: the kernel will look for a root file system instead",
        )
        .hint("add an executable /init, or name one with rdinit= on the kernel's command line")
    }
}

fn check_compression(
    archive: usize,
    compression: Compression,
    config: Option<&KernelConfig>,
) -> Check {
    let subject = format!("archive {archive} format");
    if compression == Compression::Lz4Frame {
        return Check::fail(
            subject,
            "LZ4 in the frame format; Linux reads only the legacy format",
        )
        .hint("compress it with lz4 -l");
    }
    let option = format!("RD_{}", compression.config_suffix());
    match config.map(|config| config.get(&option)) {
        Some(Setting::Yes) => Check::ok(subject, format!("{compression}, which this kernel unpacks")),
        Some(_) => Check::fail(subject, format!("{compression}, which this kernel does not unpack")).hint(format!(
            "give it uncompressed or in a format that the kernel knows, or build the kernel with CONFIG_{option}=y"
        )),
        None => Check::info(subject, format!("{compression}; the kernel needs CONFIG_{option}=y")),
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use proptest::prelude::*;
    use tempfile::NamedTempFile;

    use super::super::check::Verdict;
    use super::*;

    fn cpio(members: &[(&str, &[u8])]) -> Vec<u8> {
        let mut archive = Vec::new();
        for (name, data) in members {
            cpio::write_member(&mut archive, name, 0o100_755, (0, 0), data).unwrap();
        }
        cpio::write_end(&mut archive).unwrap();
        archive
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn check(bytes: &[u8], config: &str) -> Vec<(String, String, Verdict)> {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(bytes).unwrap();
        let config = KernelConfig::parse("test", config);
        check_initrd(file.path(), config.as_ref())
            .into_iter()
            .map(|check| (check.subject, check.found, check.verdict))
            .collect()
    }

    fn verdict(checks: &[(String, String, Verdict)], subject: &str) -> Verdict {
        checks
            .iter()
            .find(|check| check.0 == subject)
            .unwrap_or_else(|| panic!("{subject}: {checks:?}"))
            .2
    }

    #[test]
    fn microcode_before_a_compressed_archive() {
        let mut initrd = cpio(&[("kernel/x86/microcode/AuthenticAMD.bin", &[1; 1001])]);
        initrd.resize(initrd.len().next_multiple_of(512), 0);
        initrd.extend(gzip(&cpio(&[
            ("bin", b""),
            ("init", b"#!/bin/sh"),
            ("etc", b"abc"),
        ])));
        let checks = check(&initrd, "CONFIG_BLK_DEV_INITRD=y\nCONFIG_RD_GZIP=y\n");
        assert!(checks[1].1.starts_with("cpio, 1"), "{checks:?}");
        assert_eq!(verdict(&checks, "archive 2 format"), Verdict::Ok);
        assert_eq!(verdict(&checks, "/init"), Verdict::Ok);

        let checks = check(&initrd, "CONFIG_BLK_DEV_INITRD=y\nCONFIG_RD_XZ=y\n");
        assert_eq!(verdict(&checks, "archive 2 format"), Verdict::Fail);
    }

    #[test]
    fn unusable_initrds_are_reported() {
        assert_eq!(
            verdict(&check(&cpio(&[("bin", b"")]), ""), "/init"),
            Verdict::Warn
        );
        assert_eq!(
            verdict(&check(b"\x04\x22\x4d\x18....", ""), "archive 1 format"),
            Verdict::Fail
        );
        assert_eq!(
            verdict(&check(b"\x28\xb5\x2f\xfd....", ""), "archive 1 format"),
            Verdict::Info
        );
        assert_eq!(
            verdict(&check(b"what is this", ""), "archive 1"),
            Verdict::Warn
        );
        assert_eq!(
            verdict(
                &check(&cpio(&[("init", &[1; 900])])[..500], ""),
                "archive 1"
            ),
            Verdict::Fail
        );
        assert_eq!(
            verdict(&check(&cpio(&[]), "CONFIG_A=y"), "kernel support"),
            Verdict::Fail
        );
        assert_eq!(verdict(&check(b"\x7fELF", ""), "file"), Verdict::Fail);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn mutated_archives(at in 0usize..300, bytes in prop::collection::vec(any::<u8>(), 0..9), packed: bool) {
            let mut initrd = cpio(&[("kernel", &[1; 100]), ("init", b"#!/bin/sh")]);
            if packed {
                initrd = gzip(&initrd);
            }
            for (offset, byte) in bytes.into_iter().enumerate() {
                if let Some(target) = initrd.get_mut(at + offset) {
                    *target = byte;
                }
            }
            check(&initrd, "CONFIG_RD_GZIP=y");
        }
    }
}
