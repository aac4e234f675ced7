//! Payloads that Debian's compressors made (tests/payloads/make), whole, cut, damaged and lying.

use std::error::Error;

use super::*;
use crate::boot::error::DirectBootError;
use crate::boot::payload;

const PACKED: [(&str, &[u8]); 5] = [
    ("gzip", include_bytes!("../../../tests/payloads/kernel.gz")),
    (
        "LZMA",
        include_bytes!("../../../tests/payloads/kernel.lzma"),
    ),
    ("xz", include_bytes!("../../../tests/payloads/kernel.xz")),
    (
        "LZ4 (legacy format)",
        include_bytes!("../../../tests/payloads/kernel.lz4"),
    ),
    ("zstd", include_bytes!("../../../tests/payloads/kernel.zst")),
];

/// What tests/payloads/make packs.
fn plain() -> Vec<u8> {
    let lines: String = (1..=3000).map(|n| format!("{n}\n")).collect();
    [b"\x7fELF".as_slice(), lines.repeat(20).as_bytes()].concat()
}

fn packed(name: &str) -> &'static [u8] {
    PACKED.iter().find(|(format, _)| *format == name).unwrap().1
}

/// A bzImage with this payload.
pub(super) fn bzimage_with(payload: &[u8]) -> Vec<u8> {
    let mut image = bzimage();
    let code = image.len() - 4096;
    image.truncate(code + 0x300);
    image.extend(payload);
    image.resize(image.len().next_multiple_of(16), 0);
    let syssize = (image.len() - code) as u32 / 16;
    put(&mut image, 0x1f4, &syssize.to_le_bytes());
    put(&mut image, 0x24c, &(payload.len() as u32).to_le_bytes());
    image
}

fn unpack(payload: &[u8]) -> Result<Vec<u8>, DirectBootError> {
    let file = file(&bzimage_with(payload));
    let input = InputFile::open(Role::Kernel, file.path()).unwrap();
    let image = BzImage::parse(&input, &input.head().unwrap()).unwrap();
    payload::unpack(&input, &image)
}

/// The error and its causes.
fn failure(payload: &[u8]) -> String {
    crate::error_chain(&unpack(payload).unwrap_err() as &dyn Error)
}

/// A stream with another size behind it.
fn claiming(packed: &[u8], size: u32) -> Vec<u8> {
    [&packed[..packed.len() - 4], &size.to_le_bytes()].concat()
}

/// Puts right the CRC-32 that ends `bytes`.
fn seal(bytes: &mut [u8]) {
    let at = bytes.len() - 4;
    let mut crc = flate2::Crc::new();
    crc.update(&bytes[..at]);
    put(bytes, at, &crc.sum().to_le_bytes());
}

#[test]
fn every_format_is_unpacked() {
    for (name, payload) in PACKED {
        assert_eq!(unpack(payload).unwrap(), plain(), "{name}");
    }
}

#[test]
fn a_cut_payload_is_an_error_wherever_it_is_cut() {
    let size = plain().len() as u32;
    for (name, payload) in PACKED {
        for keep in [8, 9, 20, payload.len() / 2, payload.len() - 5] {
            let cut = [&payload[..keep], &size.to_le_bytes()].concat();
            let message = failure(&cut);
            contains(&message, &[name, "payload is damaged"]);
        }
    }
    contains(&failure(b"\x1f\x8b\x08"), &["gzip payload is damaged"]);
}

#[test]
fn damage_is_an_error_where_the_format_has_a_checksum() {
    for name in ["gzip", "xz", "zstd"] {
        let payload = packed(name);
        for at in (20..payload.len() - 8).step_by(97) {
            let mut damaged = payload.to_vec();
            damaged[at] ^= 0x10;
            assert!(
                unpack(&damaged).map_or(true, |kernel| kernel == plain()),
                "{name}, byte {at}"
            );
        }
    }
}

#[test]
fn more_or_less_than_declared_is_an_error() {
    let size = plain().len() as u32;
    for (name, payload) in PACKED {
        // gzip checks the size by itself.
        let more = ["more than it declares", "corrupt", "too small", "not 2"];
        for declared in [size - 1, size / 2] {
            let message = failure(&claiming(payload, declared));
            contains(&message, &[name]);
            assert!(more.iter().any(|m| message.contains(m)), "{message}");
        }
        let message = failure(&claiming(payload, size + 1));
        contains(&message, &[name, "payload is damaged"]);
    }
}

#[test]
fn a_bomb_is_not_set_off() {
    // init_size is 4 MiB in these images.
    let message = failure(&claiming(packed("xz"), u32::MAX));
    contains(
        &message,
        &["claims to hold 4294967295", "room for 4194304 (init_size)"],
    );

    // Dictionaries of 4 GiB: LZMA, xz (in the first block's header, which has a checksum), zstd.
    let mut lzma = packed("LZMA").to_vec();
    put(&mut lzma, 3, &[0xff, 0xff]);
    contains(&failure(&lzma), &["LZMA", "memory"]);
    let mut xz = packed("xz").to_vec();
    let header = 12..12 + (usize::from(xz[12]) + 1) * 4;
    let dictionary = header.start
        + xz[header.clone()]
            .windows(2)
            .position(|w| w == [0x21, 1])
            .unwrap()
        + 2;
    xz[dictionary] = 40;
    seal(&mut xz[header]);
    contains(&failure(&xz), &["xz", "memory"]);
    let mut zstd = packed("zstd").to_vec();
    assert_eq!(zstd[4] & 0x20, 0, "it has a window descriptor");
    zstd[5] = 0xff;
    contains(&failure(&zstd), &["zstd", "Window"]);
}

#[test]
fn lz4_goes_on_after_8_mib_and_after_another_magic() {
    // Literals alone: 15 and so many more (lz4_Block_format.md).
    let block = |bytes: &[u8]| {
        let more = bytes.len() - 15;
        let mut block = vec![0xf0];
        block.extend(vec![255; more / 255]);
        block.push((more % 255) as u8);
        block.extend(bytes);
        [&(block.len() as u32).to_le_bytes(), block.as_slice()].concat()
    };
    let mut kernel = vec![7; (8 << 20) + 100];
    put(&mut kernel, 0, b"\x7fELF");
    let magic = 0x184c_2102u32.to_le_bytes();
    let (first, second) = kernel.split_at(8 << 20);
    let size = kernel.len() as u32;
    let payload = [
        &magic,
        block(first).as_slice(),
        &magic,
        &block(second),
        &size.to_le_bytes(),
    ]
    .concat();
    let mut image = bzimage_with(&payload);
    put(&mut image, 0x260, &(32u32 << 20).to_le_bytes());
    let file = file(&image);
    let input = InputFile::open(Role::Kernel, file.path()).unwrap();
    let image = BzImage::parse(&input, &input.head().unwrap()).unwrap();
    assert!(payload::unpack(&input, &image).unwrap() == kernel);
}

#[test]
fn what_is_no_payload_is_named() {
    contains(
        &failure(b"\x04\x22\x4d\x18 LZ4"),
        &["04 22 4d 18", "not a compression format of Linux kernels"],
    );
    for (name, head) in [("bzip2", b"BZh9"), ("LZO", b"\x89LZO")] {
        let message = failure(&[&head[..], &[0; 8]].concat());
        contains(&message, &["minivmm has no decoder for", name]);
    }
    contains(&failure(b"plain"), &["plain"]);
    contains(&failure(b""), &["not a compression format"]);
    let mut text = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    text.write_all(b"no kernel").unwrap();
    contains(
        &failure(&text.finish().unwrap()),
        &["gzip payload is not an ELF file"],
    );
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 60, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn damaged_payloads(which in 0..PACKED.len(), changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..20), early: bool) {
        let mut payload = PACKED[which].1.to_vec();
        let end = if early { 100 } else { payload.len() };
        for (at, value) in changes {
            payload[at.index(end)] = value;
        }
        if let Ok(kernel) = unpack(&payload) {
            prop_assert!(kernel.starts_with(b"\x7fELF"));
        }
    }
}
