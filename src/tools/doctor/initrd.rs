//! What an initrd file is, and whether the kernel can unpack it.

use std::io::{self, Read};
use std::path::Path;

use flate2::read::GzDecoder;

use super::check::Check;
use super::config::{KernelConfig, Setting};
use crate::boot::{self, BootError, Compression, FileReader, InputFile, MIB};
use crate::tools::cpio::{self, Header};

/// Most archives in a file that are read; early microcode and the rest make two.
const MAX_ARCHIVES: usize = 16;
/// Most members of an archive that are read.
const MAX_MEMBERS: usize = 200_000;
/// Longest run of zeroes between two archives that is skipped.
const MAX_PADDING: u64 = 1 << 20;
/// Most bytes that are decompressed.
const MAX_UNPACKED: u64 = 1 << 30;

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

    // Archives may follow one another, plain ones first: microcode, then the rest (early-userspace/buffer-format.rst).
    let mut at = 0;
    // Whether there is an /init, unless an archive cannot be read to its end.
    let mut has_init = Some(false);
    for archive in 1..=MAX_ARCHIVES {
        let mut magic = [0; 8];
        let count = input.read_some(at, &mut magic)?;
        let mut reader = FileReader::new(&input, at);
        let magic = magic.get(..count).unwrap_or_default();
        let (format, contents) = match Compression::identify(magic) {
            None if cpio::is_member(magic) => ("cpio", Some(walk(&mut reader, FileReader::skip))),
            Some(compression) => {
                checks.push(check_compression(archive, compression, config));
                let contents = (compression == Compression::Gzip).then(|| {
                    let mut unpacked = GzDecoder::new(&mut reader).take(MAX_UNPACKED);
                    walk(&mut unpacked, skip_by_reading)
                });
                reader.at = input.len();
                ("cpio in gzip", contents)
            }
            _ if archive == 1 => {
                has_init = None;
                checks.push(
                    Check::warn("archive 1", "no format that Linux is known to unpack").hint(
                        "make a cpio archive: (cd DIR && find . | cpio -o -H newc) > initrd.cpio",
                    ),
                );
                break;
            }
            _ => {
                checks.push(Check::warn(
                    format!("archive {archive}"),
                    format!("unknown bytes follow at {at:#x}; the kernel will not unpack them"),
                ));
                break;
            }
        };
        let subject = format!("archive {archive}");
        let complete = match contents {
            Some(Ok(contents)) => {
                checks.push(Check::ok(subject, contents.describe(format)));
                has_init = has_init.map(|has| has || contents.has_init);
                contents.complete
            }
            Some(Err(error)) => {
                checks.push(
                    Check::fail(subject, format!("damaged: {error}"))
                        .hint("make or download the initrd again"),
                );
                has_init = None;
                false
            }
            None => {
                has_init = None;
                false
            }
        };
        match next_archive(&input, reader.at)? {
            Some(next) if complete => at = next,
            _ => break,
        }
    }
    checks.extend(has_init.map(check_init));
    Ok(checks)
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

fn size(bytes: u64) -> String {
    if bytes < MIB {
        format!("{bytes} bytes")
    } else {
        format!("{:.1} MiB", bytes as f64 / MIB as f64)
    }
}

/// What is in an archive.
#[derive(Debug, Default)]
struct Contents {
    members: usize,
    bytes: u64,
    has_init: bool,
    /// Whether its end was seen.
    complete: bool,
}

impl Contents {
    fn describe(&self, format: &str) -> String {
        let more = if self.complete { "" } else { " and more" };
        format!(
            "{format}: {} files{more}, {} unpacked",
            self.members,
            size(self.bytes)
        )
    }
}

/// Skips bytes of a stream by reading them.
fn skip_by_reading(reader: &mut impl Read, count: u64) -> io::Result<()> {
    match io::copy(&mut reader.take(count), &mut io::sink())? {
        copied if copied < count => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}

/// Reads a cpio archive up to its trailer, or [`MAX_MEMBERS`].
fn walk<R: Read>(archive: &mut R, skip: fn(&mut R, u64) -> io::Result<()>) -> io::Result<Contents> {
    let mut contents = Contents::default();
    while contents.members < MAX_MEMBERS {
        let header = Header::read(archive).map_err(|error| {
            let number = contents.members + 1;
            io::Error::new(error.kind(), format!("member {number}: {error}"))
        })?;
        if header.name == cpio::TRAILER {
            contents.complete = true;
            break;
        }
        contents.has_init |= matches!(&header.name[..], b"init" | b"./init" | b"/init");
        contents.members += 1;
        contents.bytes = contents.bytes.saturating_add(header.size.into());
        let padding = cpio::padding(header.size as usize);
        skip(archive, u64::from(header.size) + padding as u64)?;
    }
    Ok(contents)
}

/// Where the next archive begins after the zeroes at `at`.
fn next_archive(input: &InputFile, at: u64) -> Result<Option<u64>, BootError> {
    let mut buf = [0; 4096];
    let mut here = at;
    while here - at < MAX_PADDING {
        let count = input.read_some(here, &mut buf)?;
        let read = buf.get(..count).unwrap_or_default();
        if let Some(offset) = read.iter().position(|byte| *byte != 0) {
            return Ok(Some(here + offset as u64));
        }
        if count < buf.len() {
            return Ok(None);
        }
        here += count as u64;
    }
    Ok(None)
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
        for (name, data) in members.iter().chain(&[("TRAILER!!!", &b""[..])]) {
            let header = Header::new(name.as_bytes(), data.len() as u32);
            header.write(&mut archive).unwrap();
            archive.extend(*data);
            archive.resize(archive.len().next_multiple_of(4), 0);
        }
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
        assert_eq!(checks[1].1, "cpio: 1 files, 1001 bytes unpacked");
        assert_eq!(verdict(&checks, "archive 2 format"), Verdict::Ok);
        assert_eq!(checks[3].1, "cpio in gzip: 3 files, 12 bytes unpacked");
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
