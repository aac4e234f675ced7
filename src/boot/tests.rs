//! Loading of made-up kernels: what a good one gives, what each bad one says, and that no bytes whatever make it panic.

use std::io::Write;
use std::path::PathBuf;

use linux_loader::bootparam::boot_params;
use linux_loader::loader::elf::start_info::{
    hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use proptest::prelude::*;
use tempfile::{NamedTempFile, TempDir};
use vm_memory::{Bytes, GuestAddress};

use super::*;

mod direct;
mod hostile;
mod payload;
mod refusals;

const LOAD: u64 = 0x100_0000;

fn mem(mib: u64) -> GuestMemory {
    mem_of(mib * MIB)
}

fn mem_of(bytes: u64) -> GuestMemory {
    let low = bytes.min(layout::MMIO_GAP_START);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if bytes > low {
        ranges.push((GuestAddress(layout::MMIO_GAP_END), (bytes - low) as usize));
    }
    GuestMemory::from_ranges(&ranges).unwrap()
}

fn file(bytes: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(bytes).unwrap();
    file
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    bytes[at..at + value.len()].copy_from_slice(value);
}

/// A bzImage with 2 setup sectors and 4 KiB of code; code byte n is n & 0xff.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0u8; 3 * 512];
    put(&mut image, 0x1f1, &[2]);
    put(&mut image, 0x1f4, &256u32.to_le_bytes());
    put(&mut image, 0x1fe, &0xaa55u16.to_le_bytes());
    put(&mut image, 0x200, &[0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, 0x206, &0x20fu16.to_le_bytes());
    put(&mut image, 0x20e, &0x100u16.to_le_bytes());
    put(&mut image, 0x211, &[0x81]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1]);
    put(&mut image, 0x236, &0x3u16.to_le_bytes());
    put(&mut image, 0x238, &2047u32.to_le_bytes());
    put(&mut image, 0x248, &0x300u32.to_le_bytes());
    put(&mut image, 0x24c, &0x400u32.to_le_bytes());
    put(&mut image, 0x258, &LOAD.to_le_bytes());
    put(&mut image, 0x260, &0x40_0000u32.to_le_bytes());
    put(&mut image, 0x300, b"6.1.0-test (builder) #1 SMP\0");
    image.extend((0..4096).map(|n| n as u8));
    image
}

/// Notes: one by GNU to step over, then the PVH entry.
fn notes(entry: &[u8]) -> Vec<u8> {
    let mut notes = Vec::new();
    for (name, kind, desc) in [
        (&b"GNU\0"[..], 3u32, &[1u8, 2, 3, 4, 5][..]),
        (&b"Xen\0"[..], 18, entry),
    ] {
        notes.extend((name.len() as u32).to_le_bytes());
        notes.extend((desc.len() as u32).to_le_bytes());
        notes.extend(kind.to_le_bytes());
        notes.extend(name);
        notes.extend(desc);
        notes.resize(notes.len().next_multiple_of(4), 0);
    }
    notes
}

/// A 64-bit ELF kernel of two segments, and a note segment if there are notes.
fn elf64(notes: &[u8]) -> Vec<u8> {
    let headers: [(u32, u64, u64, u64, u64); 3] = [
        (1, 0x200, LOAD, 0x100, 0x1000),
        (1, 0x300, LOAD + 0x1000, 0x80, 0x3000),
        (4, 0x400, 0, notes.len() as u64, notes.len() as u64),
    ];
    let count = if notes.is_empty() { 2 } else { 3 };
    let mut image = vec![0u8; 0x400];
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &62u16.to_le_bytes());
    put(&mut image, 24, &(LOAD + 0x10).to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &56u16.to_le_bytes());
    put(&mut image, 56, &(count as u16).to_le_bytes());
    for (index, (kind, offset, gpa, file_size, mem_size)) in
        headers.into_iter().take(count).enumerate()
    {
        let at = 64 + 56 * index;
        put(&mut image, at, &kind.to_le_bytes());
        put(&mut image, at + 8, &offset.to_le_bytes());
        put(&mut image, at + 24, &gpa.to_le_bytes());
        put(&mut image, at + 32, &file_size.to_le_bytes());
        put(&mut image, at + 40, &mem_size.to_le_bytes());
        put(&mut image, at + 48, &4u64.to_le_bytes());
    }
    image[0x200..0x380].fill(0xcc);
    image.extend(notes);
    image
}

/// A 32-bit ELF kernel of one segment with the PVH note.
fn elf32(notes: &[u8]) -> Vec<u8> {
    let headers: [(u32, u32, u32, u32, u32); 2] = [
        (1, 0x200, LOAD as u32, 0x100, 0x1000),
        (4, 0x300, 0, notes.len() as u32, notes.len() as u32),
    ];
    let mut image = vec![0u8; 0x300];
    put(&mut image, 0, b"\x7fELF\x01\x01\x01");
    put(&mut image, 16, &2u16.to_le_bytes());
    put(&mut image, 18, &3u16.to_le_bytes());
    put(&mut image, 24, &(LOAD as u32).to_le_bytes());
    put(&mut image, 28, &52u32.to_le_bytes());
    put(&mut image, 42, &32u16.to_le_bytes());
    put(&mut image, 44, &2u16.to_le_bytes());
    for (index, (kind, offset, gpa, file_size, mem_size)) in headers.into_iter().enumerate() {
        let at = 52 + 32 * index;
        for (field, value) in [
            (0, kind),
            (4, offset),
            (12, gpa),
            (16, file_size),
            (20, mem_size),
        ] {
            put(&mut image, at + field, &value.to_le_bytes());
        }
    }
    image.extend(notes);
    image
}

fn source(kernel: &Path) -> BootSource<'_> {
    BootSource {
        kernel,
        initrd: None,
        cmdline: "console=ttyS0",
        protocol: BootProtocol::Auto,
        cache: None,
        may_cache: true,
    }
}

fn load_bytes(bytes: &[u8], mem: &GuestMemory) -> Result<LoadedKernel, BootError> {
    load(mem, &source(file(bytes).path()))
}

fn error(bytes: &[u8]) -> String {
    load_bytes(bytes, &mem(64)).unwrap_err().to_string()
}

fn error_with(change: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut image = bzimage();
    change(&mut image);
    error(&image)
}

fn cmdline_in(mem: &GuestMemory) -> Vec<u8> {
    let mut bytes = [0; 14];
    mem.read_slice(&mut bytes, GuestAddress(layout::CMDLINE_START))
        .unwrap();
    bytes.to_vec()
}

fn contains(message: &str, parts: &[&str]) {
    for part in parts {
        assert!(message.contains(part), "{part:?} is not in {message:?}");
    }
}

#[test]
fn bzimage_with_initrd() {
    let mem = mem(64);
    let kernel = file(&bzimage());
    let initrd = file(&[b"070701".as_slice(), &[7; 5000]].concat());
    let loaded = load(
        &mem,
        &BootSource {
            initrd: Some(initrd.path()),
            ..source(kernel.path())
        },
    )
    .unwrap();

    let start = 64 * MIB - 8192;
    assert_eq!(
        loaded,
        LoadedKernel {
            entry: Entry::Linux64 {
                rip: LOAD + 0x200,
                boot_params: layout::BOOT_PARAMS_START
            },
            format: KernelFormat::BzImage,
            version: Some("6.1.0-test (builder) #1 SMP".to_owned()),
            kernel_bytes: 4096,
            kernel_loading: Loading::Copied,
            kernel_range: LOAD..LOAD + 0x40_0000,
            initrd_range: Some(start..start + 5006),
        }
    );
    let mut code = vec![0; 4096];
    mem.read_slice(&mut code, GuestAddress(LOAD)).unwrap();
    assert_eq!(code, bzimage()[3 * 512..]);
    assert_eq!(mem.read_obj::<u8>(GuestAddress(start + 5005)).unwrap(), 7);
    assert_eq!(cmdline_in(&mem), b"console=ttyS0\0");

    let params: boot_params = mem
        .read_obj(GuestAddress(layout::BOOT_PARAMS_START))
        .unwrap();
    let hdr = params.hdr;
    assert_eq!({ hdr.header }, 0x5372_6448);
    assert_eq!({ hdr.version }, 0x20f);
    assert_eq!(hdr.type_of_loader, 0xff);
    assert_eq!(hdr.loadflags, 1);
    assert_eq!({ hdr.cmd_line_ptr }, layout::CMDLINE_START as u32);
    assert_eq!(
        ({ hdr.ramdisk_image }, { hdr.ramdisk_size }),
        (start as u32, 5006)
    );
    assert_eq!({ hdr.init_size }, 0x40_0000);
    assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI_START);
    let table = params.e820_table;
    let map: Vec<_> = table[..params.e820_entries.into()]
        .iter()
        .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, 0x9_fc00, 1),
            (0x9_fc00, 0x6_0400, 2),
            (0x10_0000, 63 * MIB, 1),
        ]
    );
}

#[test]
fn the_initrd_keeps_below_the_kernels_limit() {
    let mem = mem(64);
    let mut image = bzimage();
    put(&mut image, 0x236, &1u16.to_le_bytes());
    put(&mut image, 0x22c, &0x1ff_ffffu32.to_le_bytes());
    let (kernel, initrd) = (file(&image), file(&[1; 100]));
    let source = BootSource {
        initrd: Some(initrd.path()),
        ..source(kernel.path())
    };
    assert_eq!(
        load(&mem, &source).unwrap().initrd_range,
        Some(0x1ff_f000..0x1ff_f064)
    );

    let initrd = file(&vec![1; 13 << 20]);
    let source = BootSource {
        initrd: Some(initrd.path()),
        ..source
    };
    let message = load(&mem, &source).unwrap_err().to_string();
    contains(
        &message,
        &[
            "13631488 bytes",
            "does not fit",
            "12582912 bytes",
            "initrd_addr_max",
        ],
    );
}

#[test]
fn memory_above_4_gib_is_in_the_map() {
    let map: Vec<_> =
        crate::arch::memory_map::memory_map(&mem_of(layout::MMIO_GAP_START + 8 * MIB))
            .into_iter()
            .map(|entry| (entry.addr, entry.size))
            .collect();
    assert_eq!(map[2], (0x10_0000, layout::MMIO_GAP_START - 0x10_0000));
    assert_eq!(map[3], (layout::MMIO_GAP_END, 8 * MIB));
}

#[test]
fn elf_by_both_protocols() {
    for (entry, protocol, expected) in [
        (
            &b""[..],
            BootProtocol::Auto,
            Entry::Linux64 {
                rip: LOAD + 0x10,
                boot_params: 0x7000,
            },
        ),
        (
            &0x100_0020u32.to_le_bytes()[..],
            BootProtocol::Auto,
            Entry::Pvh {
                eip: 0x100_0020,
                start_info: 0x6000,
            },
        ),
        (
            &0x100_0020u64.to_le_bytes()[..],
            BootProtocol::Pvh,
            Entry::Pvh {
                eip: 0x100_0020,
                start_info: 0x6000,
            },
        ),
        (
            &0x100_0020u64.to_le_bytes()[..],
            BootProtocol::Linux64,
            Entry::Linux64 {
                rip: LOAD + 0x10,
                boot_params: 0x7000,
            },
        ),
    ] {
        let mem = mem(32);
        let kernel = file(&elf64(&if entry.is_empty() {
            vec![]
        } else {
            notes(entry)
        }));
        let loaded = load(
            &mem,
            &BootSource {
                protocol,
                ..source(kernel.path())
            },
        )
        .unwrap();
        assert_eq!(loaded.entry, expected);
        assert_eq!(loaded.format, KernelFormat::Elf64);
        assert_eq!(loaded.kernel_range, LOAD..LOAD + 0x4000);
        assert_eq!(loaded.kernel_bytes, 0x180);
        assert_eq!(
            mem.read_obj::<u8>(GuestAddress(LOAD + 0x107f)).unwrap(),
            0xcc
        );
        assert_eq!(mem.read_obj::<u8>(GuestAddress(LOAD + 0x1080)).unwrap(), 0);
        assert_eq!(cmdline_in(&mem), b"console=ttyS0\0");
        if matches!(expected, Entry::Linux64 { .. }) {
            let params: boot_params = mem.read_obj(GuestAddress(0x7000)).unwrap();
            assert_eq!({ params.hdr.header }, 0x5372_6448);
            assert_eq!({ params.hdr.boot_flag }, 0xaa55);
            assert_eq!(params.e820_entries, 3);
        }
    }
}

#[test]
fn pvh_start_info() {
    let mem = mem(32);
    let kernel = file(&elf32(&notes(&(LOAD as u32).to_le_bytes())));
    let initrd = file(&[1; 100]);
    let loaded = load(
        &mem,
        &BootSource {
            initrd: Some(initrd.path()),
            ..source(kernel.path())
        },
    )
    .unwrap();
    assert_eq!(
        loaded.entry,
        Entry::Pvh {
            eip: LOAD as u32,
            start_info: 0x6000
        }
    );
    assert_eq!(loaded.format, KernelFormat::Elf32);

    let info: hvm_start_info = mem.read_obj(GuestAddress(0x6000)).unwrap();
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336e_c578, 1, 1)
    );
    assert_eq!(
        (info.cmdline_paddr, info.rsdp_paddr),
        (layout::CMDLINE_START, layout::ACPI_START)
    );
    let module: hvm_modlist_entry = mem.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (32 * MIB - 4096, 100));
    assert_eq!(info.memmap_entries, 3);
    let last: hvm_memmap_table_entry = mem.read_obj(GuestAddress(info.memmap_paddr + 48)).unwrap();
    assert_eq!((last.addr, last.size, last.type_), (0x10_0000, 31 * MIB, 1));
}

#[test]
fn command_lines() {
    let kernel = file(&bzimage());
    let mem = mem(64);
    let try_line = |cmdline: &str| {
        load(
            &mem,
            &BootSource {
                cmdline,
                ..source(kernel.path())
            },
        )
    };
    try_line(&"x".repeat(2047)).unwrap();
    contains(
        &try_line(&"x".repeat(2048)).unwrap_err().to_string(),
        &["2048 bytes", "2047"],
    );
    contains(
        &try_line("a\0b").unwrap_err().to_string(),
        &["a NUL at byte 1"],
    );
    contains(
        &try_line("ab\nb").unwrap_err().to_string(),
        &["a line break at byte 2"],
    );
}

#[test]
fn acpi_stays_where_a_kernel_cannot_do_without() {
    let mut kernel = elf64(&[]);
    for reads_mp_tables in [false, true] {
        if reads_mp_tables {
            put(
                &mut kernel,
                0x210,
                b"Intel MultiProcessor Specification v1.%d",
            );
        }
        let (kernel, mem) = (file(&kernel), mem(64));
        let cmdline = "a acpi=off virtio_mmio.device=4K@0xd0000000:5 -- b";
        let source = BootSource {
            cmdline,
            ..source(kernel.path())
        };
        load(&mem, &source).unwrap();
        let mut bytes = [0; 64];
        mem.read_slice(&mut bytes, GuestAddress(layout::CMDLINE_START))
            .unwrap();
        let expected = if reads_mp_tables { cmdline } else { "a -- b" };
        assert_eq!(
            bytes[..=expected.len()],
            format!("{expected}\0").into_bytes()
        );
    }
}

#[test]
fn an_initrd_larger_than_memory_is_refused_unread() {
    let kernel = file(&bzimage());
    let initrd = NamedTempFile::new().unwrap();
    initrd.as_file().set_len(1 << 40).unwrap();
    let source = BootSource {
        initrd: Some(initrd.path()),
        ..source(kernel.path())
    };
    contains(
        &load(&mem(64), &source).unwrap_err().to_string(),
        &["does not fit", "smaller"],
    );
    initrd.as_file().set_len(60 << 20).unwrap();
    contains(&load(&mem(64), &source).unwrap_err().to_string(), &["204M"]);
}
