//! ELF kernels: segments, entry point and the PVH note. Both classes are read, because a 32-bit kernel may have a PVH
//! entry.

use std::ops::Range;

use ::elf::abi;
use ::elf::endian::AnyEndian;
use ::elf::file::{Class, FileHeader, parse_ident};
use ::elf::note::{Note, NoteIterator};
use ::elf::parse::ParseAt;
use ::elf::segment::{ProgramHeader, SegmentTable};

use super::bytes::{array, u32_at};
use super::error::BootError;
use super::foreign;
use super::input::InputFile;
use super::loaded::KernelFormat;
use super::ram::{GuestMemory, check_fits};
use crate::arch::layout;

/// Bytes of the shorter header, that of the 32-bit class.
const MIN_HEADER_LEN: u64 = 52;
/// Maximum number of program headers; Linux has five.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Maximum length of a note segment in bytes; Linux has about 500.
const MAX_NOTES_LEN: u64 = 64 << 10;
/// Type of the note with the 32-bit entry (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u64 = 18;

/// What to do about an ELF file that is no kernel.
const KERNEL: &str = "give a bzImage (vmlinuz) or a vmlinux";

/// A part of the file that is loaded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Segment {
    /// Where it is in the file.
    pub(crate) offset: u64,
    /// Bytes in the file.
    pub(crate) file_size: u64,
    /// Where it goes.
    pub(crate) gpa: u64,
    /// End of its memory, which may go beyond the bytes from the file; the rest is zero.
    pub(crate) end_gpa: u64,
}

/// An ELF kernel whose headers have been read and checked.
#[derive(Debug, Clone)]
pub(crate) struct ElfKernel {
    /// Of which class it is.
    pub(crate) format: KernelFormat,
    /// `e_entry`. Linux has the physical address here.
    pub(crate) entry: u64,
    /// Ascending, not overlapping, above 1 MiB and below the MMIO gap.
    pub(crate) segments: Vec<Segment>,
    /// Where the PVH protocol enters.
    pub(crate) pvh_entry: Option<u32>,
    /// It has a dynamic section, to be relocated by; Linux has none.
    dynamic: bool,
    /// Where the file ends by its headers. Linkers write the section headers last; what follows is no part of it.
    pub(crate) file_end: u64,
}

impl ElfKernel {
    /// Reads and checks the headers and notes; `head` is the file's beginning. Other systems' kernels, which would be started by
    /// other protocols, are refused by name.
    pub(crate) fn parse(input: &InputFile, head: &[u8]) -> Result<Self, BootError> {
        let parsed = Self::parse_headers(input, head);
        if parsed
            .as_ref()
            .is_ok_and(|kernel| kernel.pvh_entry.is_some())
        {
            return parsed;
        }
        let odd = parsed.as_ref().map_or(true, |kernel| kernel.dynamic);
        match foreign::refuse(input, odd)? {
            Some(foreign) => Err(foreign),
            None => parsed,
        }
    }

    fn parse_headers(input: &InputFile, head: &[u8]) -> Result<Self, BootError> {
        let header = read_header(input, head)?;
        let headers = read_program_headers(input, &header)?;
        let segments = segments(input, &headers)?;
        let pvh_entry = match find_pvh_entry(input, &header, &headers)? {
            Some(gpa) if contains(&segments, gpa.into()) => Some(gpa),
            Some(gpa) => {
                return Err(input.malformed(format!(
                    "its PVH entry {gpa:#x} lies in none of its segments"
                )));
            }
            None => None,
        };
        Ok(Self {
            format: match header.class {
                Class::ELF32 => KernelFormat::Elf32,
                Class::ELF64 => KernelFormat::Elf64,
            },
            entry: header.e_entry,
            segments,
            pvh_entry,
            dynamic: headers
                .iter()
                .any(|header| header.p_type == abi::PT_DYNAMIC),
            file_end: header
                .e_shoff
                .saturating_add(u64::from(header.e_shentsize) * u64::from(header.e_shnum)),
        })
    }

    /// Reads the segments into guest memory, which must be zero: what a segment has beyond its bytes in the file is not
    /// written. Returns the memory from the first segment to the end of the last.
    pub(crate) fn load(
        &self,
        input: &InputFile,
        mem: &GuestMemory,
    ) -> Result<Range<u64>, BootError> {
        let range = self.range();
        check_fits(input.path(), mem, range.end)?;
        for segment in &self.segments {
            input.read_into(
                mem,
                segment.gpa,
                segment.offset,
                segment.file_size,
                "a segment of the kernel",
            )?;
        }
        Ok(range)
    }

    /// The same kernel at another place, `gpa`.
    pub(crate) fn moved_to(&self, gpa: u64) -> Self {
        // Modulo 2^64, so that it may go down as well.
        let distance = gpa.wrapping_sub(self.range().start);
        let mut moved = self.clone();
        moved.entry = moved.entry.wrapping_add(distance);
        for segment in &mut moved.segments {
            segment.gpa = segment.gpa.wrapping_add(distance);
            segment.end_gpa = segment.end_gpa.wrapping_add(distance);
        }
        moved
    }

    /// From the first segment to the end of the last.
    pub(crate) fn range(&self) -> Range<u64> {
        let start = self.segments.first().map_or(0, |segment| segment.gpa);
        start
            ..self
                .segments
                .last()
                .map_or(start, |segment| segment.end_gpa)
    }

    /// Bytes that are read from the file.
    pub(crate) fn file_bytes(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.file_size)
            .fold(0, u64::saturating_add)
    }

    /// The entry of the 64-bit Linux boot protocol.
    pub(crate) fn entry_64(&self, input: &InputFile) -> Result<u64, BootError> {
        if self.format != KernelFormat::Elf64 {
            return Err(input.is_32_bit("ELF class 32, without a PVH note"));
        }
        if !contains(&self.segments, self.entry) {
            return Err(input.malformed(format!(
                "its entry {:#x} lies in none of its segments",
                self.entry
            )));
        }
        Ok(self.entry)
    }
}

fn contains(segments: &[Segment], gpa: u64) -> bool {
    segments
        .iter()
        .any(|segment| (segment.gpa..segment.end_gpa).contains(&gpa))
}

/// Reads the file's header, and checks byte order, machine and type.
fn read_header(input: &InputFile, head: &[u8]) -> Result<FileHeader<AnyEndian>, BootError> {
    input.check_range(0, MIN_HEADER_LEN, "the ELF header")?;
    let header = head
        .split_at_checked(abi::EI_NIDENT)
        .map(|(ident, rest)| FileHeader::parse_tail(parse_ident(ident)?, rest));
    let header = match header {
        Some(Ok(header)) => header,
        Some(Err(why)) => {
            return Err(input.malformed(format!("its ELF header cannot be read: {why}")));
        }
        None => return Err(input.malformed("its ELF header cannot be read")),
    };
    const AMD64: &str = "this VM is x86-64: give a kernel built for x86_64 (amd64)";
    let order = match header.endianness {
        AnyEndian::Little => "an",
        AnyEndian::Big => "a big-endian",
    };
    match (header.class, header.e_machine, header.endianness) {
        (Class::ELF64, abi::EM_X86_64, AnyEndian::Little)
        | (Class::ELF32, abi::EM_386, AnyEndian::Little) => {}
        (_, machine, _) => {
            let what = format!("{order} ELF file for {}", machine_name(machine));
            return Err(input.wrong_kind(&what, AMD64));
        }
    }
    match header.e_type {
        abi::ET_EXEC => Ok(header),
        abi::ET_DYN => {
            Err(input.wrong_kind("a position-independent ELF program or library", KERNEL))
        }
        kind => {
            let what = format!("an ELF file of type {kind} (an object or a core file)");
            Err(input.wrong_kind(&what, KERNEL))
        }
    }
}

fn machine_name(machine: u16) -> String {
    match machine {
        abi::EM_386 => "32-bit x86".to_owned(),
        abi::EM_X86_64 => "x86-64 in the 32-bit class (x32)".to_owned(),
        abi::EM_ARM => "ARM (32-bit)".to_owned(),
        abi::EM_AARCH64 => "ARM64 (AArch64)".to_owned(),
        abi::EM_RISCV => "RISC-V".to_owned(),
        other => format!("machine {other}"),
    }
}

fn read_program_headers(
    input: &InputFile,
    header: &FileHeader<AnyEndian>,
) -> Result<Vec<ProgramHeader>, BootError> {
    let (count, size) = (header.e_phnum, usize::from(header.e_phentsize));
    let expected = ProgramHeader::size_for(header.class);
    if count == 0 || count > MAX_PROGRAM_HEADERS || size != expected {
        return Err(input.malformed(format!(
            "it has {count} program headers of {size} bytes; 1 to {MAX_PROGRAM_HEADERS} of {expected} are expected"
        )));
    }
    let mut bytes = vec![0; usize::from(count) * size];
    input.read_exact(header.e_phoff, &mut bytes, "its program header table")?;
    let table = SegmentTable::new(header.endianness, header.class, &bytes);
    Ok(table.iter().collect())
}

/// The loaded segments, checked, ascending.
fn segments(input: &InputFile, headers: &[ProgramHeader]) -> Result<Vec<Segment>, BootError> {
    if headers.iter().any(|header| header.p_type == abi::PT_INTERP) {
        return Err(input.wrong_kind("an ELF program for an operating system", KERNEL));
    }
    let mut segments = Vec::new();
    for header in headers
        .iter()
        .filter(|header| header.p_type == abi::PT_LOAD && header.p_memsz != 0)
    {
        let (offset, gpa) = (header.p_offset, header.p_paddr);
        let (file_size, mem_size) = (header.p_filesz, header.p_memsz);
        if file_size > mem_size {
            return Err(input.malformed(format!(
                "the segment at {gpa:#x} has {file_size:#x} bytes in the file and {mem_size:#x} in memory"
            )));
        }
        if gpa < layout::HIGH_RAM_START {
            return Err(input.malformed(format!(
                "a segment wants to be loaded at {gpa:#x}, below 1 MiB, where the boot data is"
            )));
        }
        let end_gpa = gpa.checked_add(mem_size).filter(|end| *end <= layout::MMIO_GAP_START).ok_or_else(|| {
            input.malformed(format!(
                "a segment of {mem_size:#x} bytes wants to be loaded at {gpa:#x}, beyond the MMIO gap at {:#x}",
                layout::MMIO_GAP_START
            ))
        })?;
        input.check_range(offset, file_size, &format!("its segment for {gpa:#x}"))?;
        segments.push(Segment {
            offset,
            file_size,
            gpa,
            end_gpa,
        });
    }
    if segments.is_empty() {
        return Err(input.malformed("it has no segment to load"));
    }
    segments.sort_by_key(|segment| segment.gpa);
    for (first, second) in segments.iter().zip(segments.iter().skip(1)) {
        if first.end_gpa > second.gpa {
            return Err(input.malformed(format!(
                "its segments {:#x}-{:#x} and {:#x}-{:#x} overlap",
                first.gpa, first.end_gpa, second.gpa, second.end_gpa
            )));
        }
    }
    Ok(segments)
}

/// The 32-bit entry that the Xen note names, if there is one.
fn find_pvh_entry(
    input: &InputFile,
    file: &FileHeader<AnyEndian>,
    headers: &[ProgramHeader],
) -> Result<Option<u32>, BootError> {
    for header in headers
        .iter()
        .filter(|header| header.p_type == abi::PT_NOTE)
    {
        let len = header.p_filesz;
        if len > MAX_NOTES_LEN {
            return Err(input.malformed(format!("it has {len} bytes of notes")));
        }
        let mut notes = vec![0; usize::try_from(len).unwrap_or(0)];
        input.read_exact(header.p_offset, &mut notes, "its note segment")?;
        let align = if header.p_align == 8 { 8 } else { 4 };
        // Notes that do not end in the segment end the search.
        let mut notes = NoteIterator::new(file.endianness, file.class, align, &notes);
        let desc = notes.find_map(|note| match note {
            Note::Unknown(note)
                if note.name == b"Xen\0" && note.n_type == XEN_ELFNOTE_PHYS32_ENTRY =>
            {
                Some(note.desc)
            }
            _ => None,
        });
        if let Some(desc) = desc {
            let entry = match desc.len() {
                4 => u32_at(desc, 0),
                8 => array(desc, 0).and_then(|entry| u64::from_le_bytes(entry).try_into().ok()),
                _ => None,
            };
            return entry.map(Some).ok_or_else(|| {
                input.malformed(format!(
                    "its PVH note has {} bytes and no 32-bit address in them",
                    desc.len()
                ))
            });
        }
    }
    Ok(None)
}
