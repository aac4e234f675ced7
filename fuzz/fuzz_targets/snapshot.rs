//! Whatever a snapshot's file says, opening it is an error, or gives one that can be checked and told of.
#![no_main]

use arbitrary::Arbitrary;
use libfuzzer_sys::fuzz_target;
use minivmm::vmm::snapshot::Snapshot;
use minivmm::vmm::snapshot::file::{Bulk, Front, HEADER_LEN, Kind};
use minivmm_fuzz::{Number, edited, file, path};

#[derive(Debug, Arbitrary)]
enum Input {
    Bytes(Vec<u8>),
    Made(Made),
}

/// A good snapshot, with other numbers at some places.
#[derive(Debug, Default, Arbitrary)]
struct Made {
    /// In the description, as a number or a byte of the text.
    numbers: Vec<(u8, Number)>,
    bytes: Vec<(u16, u8)>,
    vcpus: Vec<Vcpu>,
    clock: Vec<u8>,
    /// Pages of an overlay, which are empty.
    overlay: Option<u16>,
    /// In the header, which has the right checksum nevertheless.
    table: Vec<(u8, Number)>,
    /// Bytes that the file is longer.
    more: i16,
}

/// Counts of a vCPU's state, and how many bytes it has beyond what they make.
#[derive(Debug, Default, Arbitrary)]
struct Vcpu {
    cpuid: u16,
    msrs: u16,
    xsave: Option<u32>,
    more: i8,
}

/// Bytes of a vCPU's state that are always there, of a CPUID entry, of an MSR, and of XSAVE state.
const FIXED: i64 = 24 + 2064;
const CPUID_ENTRY: i64 = 40;
const MSR: i64 = 16;
const XSAVE: u32 = 4096;

const RAM: u64 = 16 << 20;

const META: &str = r#"{"writer":"minivmm 0.1.0","taken_at_ns":1795791109144767012,"mark":8,"generation":1,"config":{"kernel":"marks",
"cpus":1,"memory":"16M","disks":[{"path":"/dev/zero","ephemeral":true}],"console":"serial","serial":"stdio"},
"disks":[{"path":"/dev/zero","len":1048576,"modified":[1,2],"inode":[3,4]}],"cmdline":"quiet",
"kernel":{"entry":{"Linux64":{"rip":1048576,"boot_params":28672}},"format":"elf64","version":null,"kernel_bytes":756,
"kernel_loading":"copied","kernel_range":{"start":1048576,"end":1049332},"initrd_range":null},
"host":{"boot_id":"4cdf28a4","kernel":"6.18","signature":788210,"microcode":""},"processor":"x"}"#;

impl Vcpu {
    fn state(&self) -> Vec<u8> {
        let (cpuid, msrs) = (u32::from(self.cpuid % 300), u32::from(self.msrs % 1100));
        let xsave = self.xsave.unwrap_or(XSAVE);
        let head = [2_000_000, cpuid, msrs, xsave];
        let mut bytes: Vec<u8> = head.into_iter().flat_map(u32::to_le_bytes).collect();
        let len = FIXED + i64::from(xsave % (1 << 17)) + i64::from(cpuid) * CPUID_ENTRY;
        let len = len + i64::from(msrs) * MSR + i64::from(self.more);
        bytes.resize(len as usize, 0);
        bytes
    }
}

/// Makes the checksum of the header right.
fn sign(front: &mut [u8]) {
    if let Some(header) = front.get_mut(..HEADER_LEN) {
        header[20..24].fill(0);
        let crc = crc32fast::hash(header);
        header[20..24].copy_from_slice(&crc.to_le_bytes());
    }
}

/// Opens it; whether that succeeded.
fn open(front: &[u8], len: u64) -> bool {
    let file = file(front);
    file.set_len(len).unwrap();
    let opened = Snapshot::open(&path(&file));
    let good = opened.is_ok();
    if let Ok(mut snapshot) = opened {
        let _ = snapshot.verify();
        let _ = snapshot.check_fork(&snapshot.meta.config.nets);
        let _ = snapshot.use_for_disk("0", "/dev/null".as_ref());
        snapshot.is_realtime = true;
        let _ = snapshot.clock();
        snapshot.check_unchanged().unwrap();
    }
    good
}

fn made(input: Made) -> bool {
    let mut meta = edited(META.as_bytes(), &input.numbers);
    for (at, byte) in input.bytes {
        let at = usize::from(at) % meta.len();
        meta[at] = byte;
    }
    let mut clock = input.clock;
    clock.resize(48, 0);
    let mut sections = vec![(Kind::Meta, meta), (Kind::Clock, clock)];
    sections.push((Kind::Devices, b"{}".to_vec()));
    let vcpus = input.vcpus.iter().take(100);
    sections.extend(vcpus.map(|vcpu| (Kind::Vcpu, vcpu.state())));
    let Ok(front) = Front::new(&sections) else {
        return false;
    };
    let bulk = |offset, len| Bulk {
        offset,
        len,
        crc: 0,
    };
    let ram = bulk(front.ram_offset, RAM);
    let end = ram.offset + ram.len;
    let overlay = input.overlay.map(|pages| bulk(end, u64::from(pages) << 12));
    let bulks: Vec<_> = overlay.into_iter().collect();
    let mut front = front.finish(ram, &bulks);
    for (at, number) in input.table {
        // A 32-bit number, wherever in the first entries it is.
        let at = 16 + usize::from(at) * 4;
        front[at..at + 4].copy_from_slice(&(number.value() as u32).to_le_bytes());
    }
    sign(&mut front);
    let len = end + bulks.first().map_or(0, |bulk| bulk.len);
    open(&front, len.saturating_add_signed(input.more.into()))
}

fuzz_target!(
    init: {
        // The description above is one, without which nothing behind it would be tried.
        let vcpu = Vcpu { cpuid: 1, ..Vcpu::default() };
        let good = Made { vcpus: vec![vcpu], overlay: Some(1), ..Made::default() };
        assert!(made(good));
    },
    |input: Input| {
        match input {
            Input::Bytes(mut bytes) => {
                sign(&mut bytes);
                open(&bytes, bytes.len() as u64)
            }
            Input::Made(input) => made(input),
        };
    }
);
