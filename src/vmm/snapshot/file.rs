//! The layout of a snapshot's file.
//!
//! ```text
//! 0        header: magic, version, sections and their checksums       4 KiB
//! 4096     sections, each at a multiple of 8, in the header's order
//! n * 2 MiB   guest RAM, ascending in GPA; what ephemeral disks hold, each at a multiple of 4 KiB, to the end of the file
//! ```
//!
//! Numbers are little-endian. A reader skips sections that it does not know if they are marked as optional, takes any minor version,
//! and refuses another major one.

use std::cmp::Ordering;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use super::error::FormatError;

/// The first bytes of a snapshot. The last two notice a transfer as text.
pub const MAGIC: [u8; 8] = *b"MINIVM\r\n";
/// Raised when older readers must not read the file.
pub const MAJOR: u16 = 1;
/// Raised when something is added that older readers may skip.
pub const MINOR: u16 = 0;
/// ELF's number of the architecture: EM_X86_64.
const ARCHITECTURE: u32 = 62;

/// Bytes of the header.
pub const HEADER_LEN: usize = 4096;
/// Guest RAM begins at a multiple of this.
pub const RAM_ALIGN: u64 = 2 << 20;
/// Bytes of a page, and what overlays are aligned to.
pub const PAGE_SIZE: u64 = 4096;
/// Most bytes before the RAM: 64 vCPUs take 1 MiB.
const MAX_RAM_OFFSET: u64 = 16 << 20;

/// Sections that the header has room for.
pub const MAX_SECTIONS: usize = (HEADER_LEN - 32) / size_of::<Entry>();
const SECTION_ALIGN: u64 = 8;

/// The first bytes of the file.
#[derive(Clone, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    major: u16,
    minor: u16,
    architecture: u32,
    /// Entries of the table.
    count: u32,
    /// Of the header, in which it counts itself as zero.
    crc: u32,
    reserved: u64,
    table: [Entry; MAX_SECTIONS],
}

const _: () = assert!(size_of::<Header>() == HEADER_LEN && cfg!(target_endian = "little"));

impl Header {
    fn checksum(&self) -> u32 {
        let unsigned = Self {
            crc: 0,
            ..self.clone()
        };
        crc32fast::hash(unsigned.as_bytes())
    }
}

/// What a section is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Kind {
    /// [`super::record::Meta`], as JSON.
    Meta = 1,
    /// kvm_clock_data.
    Clock = 2,
    /// [`crate::arch::state::VcpuState`], encoded.
    Vcpu = 3,
    /// The records of all devices ([`minivmm_devices::state`]), as JSON.
    Devices = 4,
    /// Guest RAM.
    Ram = 5,
    /// What the guest has written to an ephemeral disk; behind the RAM, in the order of the disks.
    Overlay = 6,
}

impl Kind {
    fn from_number(number: u32) -> Option<Self> {
        let front = [Self::Meta, Self::Clock, Self::Vcpu, Self::Devices];
        let all = front.into_iter().chain([Self::Ram, Self::Overlay]);
        all.into_iter().find(|kind| *kind as u32 == number)
    }
}

/// An entry of the header's table.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Entry {
    kind: u32,
    /// Bit 0: who does not know the kind may skip it.
    flags: u32,
    offset: u64,
    len: u64,
    crc: u32,
    reserved: u32,
}

impl Entry {
    fn new(kind: Kind, Bulk { offset, len, crc }: Bulk) -> Self {
        Self {
            kind: kind as u32,
            flags: 0,
            offset,
            len,
            crc,
            reserved: 0,
        }
    }
}

/// A section that is not read but mapped or used in place: RAM, or an overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bulk {
    /// Offset in the file.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Over its pages that are not all zeros: see `sparse.rs`.
    pub crc: u32,
}

/// Where the RAM of a file with these sections begins, and what is before it.
pub struct Front {
    /// Offset of the RAM.
    pub ram_offset: u64,
    bytes: Vec<u8>,
    entries: Vec<Entry>,
}

impl Front {
    /// Lays out the sections. More than the header has room for are an error.
    pub fn new(sections: &[(Kind, Vec<u8>)]) -> Result<Self, FormatError> {
        if sections.len() >= MAX_SECTIONS {
            return Err(FormatError::Table);
        }
        let mut bytes = vec![0; HEADER_LEN];
        let mut entries = Vec::with_capacity(sections.len() + 1);
        for (kind, section) in sections {
            bytes.resize(bytes.len().next_multiple_of(SECTION_ALIGN as usize), 0);
            let (offset, len) = (bytes.len() as u64, section.len() as u64);
            let crc = crc32fast::hash(section);
            entries.push(Entry::new(*kind, Bulk { offset, len, crc }));
            bytes.extend_from_slice(section);
        }
        let ram_offset = (bytes.len() as u64).next_multiple_of(RAM_ALIGN);
        if ram_offset > MAX_RAM_OFFSET {
            return Err(FormatError::Table);
        }
        Ok(Self {
            ram_offset,
            bytes,
            entries,
        })
    }

    /// Header and sections, once RAM and overlays are known.
    pub fn finish(mut self, ram: Bulk, overlays: &[Bulk]) -> Vec<u8> {
        self.entries.push(Entry::new(Kind::Ram, ram));
        let overlays = overlays.iter().map(|bulk| Entry::new(Kind::Overlay, *bulk));
        self.entries.extend(overlays);
        let mut header = Header {
            magic: MAGIC,
            major: MAJOR,
            minor: MINOR,
            architecture: ARCHITECTURE,
            count: self.entries.len() as u32,
            ..Header::new_zeroed()
        };
        for (place, entry) in header.table.iter_mut().zip(self.entries) {
            *place = entry;
        }
        header.crc = header.checksum();
        if let Some(front) = self.bytes.get_mut(..HEADER_LEN) {
            front.copy_from_slice(header.as_bytes());
        }
        self.bytes
    }
}

/// The sections of a file, checked.
pub struct Sections {
    /// The file's minor version.
    pub minor: u16,
    /// Where the RAM is.
    pub ram: Bulk,
    /// Where the overlays are.
    pub overlays: Vec<Bulk>,
    front: Vec<u8>,
    entries: Vec<(Kind, std::ops::Range<usize>)>,
}

impl Sections {
    /// Reads and checks header and sections of a file of `file_len` bytes; not its RAM. Nothing that the file says is allocated
    /// before it is bounded.
    pub fn read(file: &File, file_len: u64) -> Result<Self, FormatError> {
        let mut header = Header::new_zeroed();
        read(file, header.as_mut_bytes(), 0)?;
        let table = check_header(&header)?;
        let ram = table.iter().position(|e| e.kind == Kind::Ram as u32);
        let (ahead, bulk) = table.split_at(ram.ok_or(FormatError::Table)?);
        check_table(ahead, bulk, file_len)?;
        let mut bulk = bulk.iter().map(|entry| Bulk {
            offset: entry.offset,
            len: entry.len,
            crc: entry.crc,
        });
        let ram = bulk.next().ok_or(FormatError::Table)?;
        // Sections alone, not the alignment behind them.
        let end = ahead.iter().map(|entry| entry.offset + entry.len).max();
        let mut front = vec![0; end.unwrap_or(0) as usize];
        read(file, &mut front, 0)?;
        let mut entries = Vec::with_capacity(ahead.len());
        for entry in ahead {
            let range = entry.offset as usize..(entry.offset + entry.len) as usize;
            let section = front.get(range.clone()).ok_or(FormatError::Table)?;
            if crc32fast::hash(section) != entry.crc {
                let what = format!("section {}", entry.kind);
                return Err(FormatError::Checksum(what));
            }
            match Kind::from_number(entry.kind) {
                Some(kind) => entries.push((kind, range)),
                None if entry.flags & 1 != 0 => {}
                None => {
                    return Err(FormatError::Unusable(format!(
                        "has a section (kind {}) that this minivmm does not know: it is from a newer one",
                        entry.kind
                    )));
                }
            }
        }
        Ok(Self {
            minor: header.minor,
            ram,
            overlays: bulk.collect(),
            front,
            entries,
        })
    }

    /// The sections of this kind in their order.
    pub fn all(&self, kind: Kind) -> impl Iterator<Item = &[u8]> {
        let of_kind = self.entries.iter().filter(move |entry| entry.0 == kind);
        of_kind.map(|(_, range)| self.front.get(range.clone()).unwrap_or_default())
    }

    /// The only section of this kind.
    pub fn one(&self, kind: Kind) -> Result<&[u8], FormatError> {
        let mut all = self.all(kind);
        match (all.next(), all.next()) {
            (Some(section), None) => Ok(section),
            _ => Err(FormatError::Unusable(format!(
                "has not exactly one section of kind {}",
                kind as u32
            ))),
        }
    }
}

fn read(file: &File, bytes: &mut [u8], offset: u64) -> Result<(), FormatError> {
    file.read_exact_at(bytes, offset)
        .map_err(|e| match e.kind() {
            io::ErrorKind::UnexpectedEof => FormatError::Truncated,
            _ => FormatError::Read(e),
        })
}

/// The table of a header.
fn check_header(header: &Header) -> Result<&[Entry], FormatError> {
    let Header { major, minor, .. } = *header;
    let unusable = |what| Err(FormatError::Unusable(what));
    if header.magic != MAGIC {
        return unusable("is not a snapshot".into());
    }
    if major != MAJOR {
        return unusable(format!(
            "has format version {major}.{minor}, and this minivmm reads {MAJOR}.x"
        ));
    }
    if header.architecture != ARCHITECTURE {
        return unusable(format!(
            "is of another architecture (ELF machine {}, not x86-64)",
            header.architecture
        ));
    }
    if header.checksum() != header.crc {
        return Err(FormatError::Checksum("its header".into()));
    }
    let table = header.table.get(..header.count as usize);
    table.ok_or(FormatError::Table)
}

/// Sections lie one behind the other; `bulk` begins with the RAM and ends with the file.
fn check_table(ahead: &[Entry], bulk: &[Entry], file_len: u64) -> Result<(), FormatError> {
    let mut free_from = HEADER_LEN as u64;
    for (index, entry) in ahead.iter().chain(bulk).enumerate() {
        let behind_ram = index.checked_sub(ahead.len());
        let (kind, align) = match behind_ram {
            None => (None, 1),
            Some(0) => (Some(Kind::Ram), RAM_ALIGN),
            Some(_) => (Some(Kind::Overlay), PAGE_SIZE),
        };
        let end = entry.offset.checked_add(entry.len);
        let fits = entry.offset >= free_from
            && entry.offset.is_multiple_of(align)
            && kind.is_none_or(|kind| kind as u32 == entry.kind)
            && (behind_ram.is_some() || end.is_some_and(|end| end <= MAX_RAM_OFFSET))
            && (kind != Some(Kind::Ram) || entry.offset <= MAX_RAM_OFFSET);
        free_from = end.filter(|_| fits).ok_or(FormatError::Table)?;
    }
    match free_from.cmp(&file_len) {
        Ordering::Equal => Ok(()),
        Ordering::Greater => Err(FormatError::Truncated),
        Ordering::Less => Err(FormatError::Table),
    }
}
