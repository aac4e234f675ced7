//! ELF kernels: segments, entry point and the PVH note. Both classes are read, because a 32-bit kernel may have a PVH
//! entry.

use std::ops::Range;

use super::bytes::{array, u16_at, u32_at, u64_at};
use super::error::BootError;
use super::foreign;
use super::input::InputFile;
use super::ram::{GuestMemory, check_fits};
use crate::arch::layout;

/// Maximum number of program headers; Linux has five.
const MAX_PROGRAM_HEADERS: u16 = 128;
/// Maximum length of a note segment in bytes; Linux has about 500.
const MAX_NOTES_LEN: u64 = 64 << 10;
/// Type of the note with the 32-bit entry (xen/include/public/elfnote.h).
const XEN_ELFNOTE_PHYS32_ENTRY: u32 = 18;

/// What to do about an ELF file that is no kernel.
const KERNEL: &str = "give a bzImage (vmlinuz) or a vmlinux";

const ET_EXEC: u16 = 2;
const ET_DYN: u16 = 3;
const EM_386: u16 = 3;
const EM_X86_64: u16 = 62;
const PT_LOAD: u32 = 1;
const PT_DYNAMIC: u32 = 2;
const PT_INTERP: u32 = 3;
const PT_NOTE: u32 = 4;

/// Word size of an ELF file (`EI_CLASS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Class {
    Bits32,
    Bits64,
}

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
    pub(crate) class: Class,
    /// `e_entry`. Linux has the physical address here.
    pub(crate) entry: u64,
    /// Ascending, not overlapping, above 1 MiB and below the MMIO gap.
    pub(crate) segments: Vec<Segment>,
    /// Where the PVH protocol enters.
    pub(crate) pvh_entry: Option<u32>,
    /// It has a dynamic section, to be relocated by; Linux has none.
    dynamic: bool,
}

/// One program header.
struct ProgramHeader {
    kind: u32,
    offset: u64,
    gpa: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
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
        let class = check_ident(input, head)?;
        let (entry, table) = match class {
            Class::Bits64 => (u64_at(head, 24), u64_at(head, 32)),
            Class::Bits32 => (
                u32_at(head, 24).map(u64::from),
                u32_at(head, 28).map(u64::from),
            ),
        };
        let sizes_at = if class == Class::Bits64 { 54 } else { 42 };
        let (Some(entry), Some(table), Some(entry_size), Some(count)) = (
            entry,
            table,
            u16_at(head, sizes_at),
            u16_at(head, sizes_at + 2),
        ) else {
            let need = if class == Class::Bits64 { 64 } else { 52 };
            return Err(input.check_range(0, need, "the ELF header").map_or_else(
                |error| error,
                |_| input.malformed("its ELF header cannot be read"),
            ));
        };
        let headers = read_program_headers(input, class, table, entry_size, count)?;

        let segments = segments(input, &headers)?;
        let pvh_entry = match find_pvh_entry(input, &headers)? {
            Some(gpa) if contains(&segments, gpa.into()) => Some(gpa),
            Some(gpa) => {
                return Err(input.malformed(format!(
                    "its PVH entry {gpa:#x} lies in none of its segments"
                )));
            }
            None => None,
        };
        Ok(Self {
            class,
            entry,
            segments,
            pvh_entry,
            dynamic: headers.iter().any(|header| header.kind == PT_DYNAMIC),
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
        if self.class != Class::Bits64 {
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

/// Where a 64-bit ELF file ends by its headers. Linkers write the section headers last; what follows is no part of it.
pub(crate) fn end_of_file(head: &[u8]) -> Option<u64> {
    let size = u64::from(u16_at(head, 58)?) * u64::from(u16_at(head, 60)?);
    u64_at(head, 40)?.checked_add(size)
}

fn contains(segments: &[Segment], gpa: u64) -> bool {
    segments
        .iter()
        .any(|segment| (segment.gpa..segment.end_gpa).contains(&gpa))
}

/// Checks class, byte order, type and machine.
fn check_ident(input: &InputFile, head: &[u8]) -> Result<Class, BootError> {
    let [class, order] = array(head, 4).unwrap_or_default();
    const AMD64: &str = "this VM is x86-64: give a kernel built for x86_64 (amd64)";
    if order == 2 {
        let machine = array(head, 18).map(u16::from_be_bytes).unwrap_or(0);
        let what = format!("a big-endian ELF file for {}", machine_name(machine));
        return Err(input.wrong_kind(&what, AMD64));
    }
    let class = match (class, order) {
        (1, 1) => Class::Bits32,
        (2, 1) => Class::Bits64,
        _ => return Err(input.malformed(format!("ELF class {class}, byte order {order}"))),
    };
    let (Some(kind), Some(machine)) = (u16_at(head, 16), u16_at(head, 18)) else {
        input.check_range(0, 64, "the ELF header")?;
        return Err(input.malformed("its ELF header cannot be read"));
    };
    match (class, machine) {
        (Class::Bits64, EM_X86_64) | (Class::Bits32, EM_386) => {}
        _ => {
            let what = format!("an ELF file for {}", machine_name(machine));
            return Err(input.wrong_kind(&what, AMD64));
        }
    }
    match kind {
        ET_EXEC => Ok(class),
        ET_DYN => Err(input.wrong_kind("a position-independent ELF program or library", KERNEL)),
        _ => {
            let what = format!("an ELF file of type {kind} (an object or a core file)");
            Err(input.wrong_kind(&what, KERNEL))
        }
    }
}

fn machine_name(machine: u16) -> String {
    match machine {
        EM_386 => "32-bit x86".to_owned(),
        EM_X86_64 => "x86-64 in the 32-bit class (x32)".to_owned(),
        40 => "ARM (32-bit)".to_owned(),
        183 => "ARM64 (AArch64)".to_owned(),
        243 => "RISC-V".to_owned(),
        other => format!("machine {other}"),
    }
}

fn read_program_headers(
    input: &InputFile,
    class: Class,
    table: u64,
    entry_size: u16,
    count: u16,
) -> Result<Vec<ProgramHeader>, BootError> {
    let expected = if class == Class::Bits64 { 56 } else { 32 };
    if count == 0 || count > MAX_PROGRAM_HEADERS || entry_size != expected {
        return Err(input.malformed(format!(
            "it has {count} program headers of {entry_size} bytes; 1 to {MAX_PROGRAM_HEADERS} of {expected} are expected"
        )));
    }
    let mut bytes = vec![0; usize::from(count) * usize::from(entry_size)];
    input.read_exact(table, &mut bytes, "its program header table")?;
    let header = |bytes: &[u8]| {
        let (u32_at, u64_at) = (|at| u32_at(bytes, at), |at| u64_at(bytes, at));
        let word = |at: usize| u32_at(at).map(u64::from);
        Some(match class {
            Class::Bits64 => ProgramHeader {
                kind: u32_at(0)?,
                offset: u64_at(8)?,
                gpa: u64_at(24)?,
                file_size: u64_at(32)?,
                mem_size: u64_at(40)?,
                align: u64_at(48)?,
            },
            Class::Bits32 => ProgramHeader {
                kind: u32_at(0)?,
                offset: word(4)?,
                gpa: word(12)?,
                file_size: word(16)?,
                mem_size: word(20)?,
                align: word(28)?,
            },
        })
    };
    Ok(bytes
        .chunks_exact(usize::from(entry_size))
        .filter_map(header)
        .collect())
}

/// The loaded segments, checked, ascending.
fn segments(input: &InputFile, headers: &[ProgramHeader]) -> Result<Vec<Segment>, BootError> {
    if headers.iter().any(|header| header.kind == PT_INTERP) {
        return Err(input.wrong_kind("an ELF program for an operating system", KERNEL));
    }
    let mut segments = Vec::new();
    for header in headers
        .iter()
        .filter(|header| header.kind == PT_LOAD && header.mem_size != 0)
    {
        let ProgramHeader {
            offset,
            gpa,
            file_size,
            mem_size,
            ..
        } = *header;
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
fn find_pvh_entry(input: &InputFile, headers: &[ProgramHeader]) -> Result<Option<u32>, BootError> {
    for header in headers.iter().filter(|header| header.kind == PT_NOTE) {
        if header.file_size > MAX_NOTES_LEN {
            return Err(input.malformed(format!("it has {} bytes of notes", header.file_size)));
        }
        let mut notes = vec![0; usize::try_from(header.file_size).unwrap_or(0)];
        input.read_exact(header.offset, &mut notes, "its note segment")?;
        let align = if header.align == 8 { 8 } else { 4 };
        if let Some(desc) = find_note(&notes, align, b"Xen\0", XEN_ELFNOTE_PHYS32_ENTRY) {
            let entry = match desc.len() {
                4 => u32_at(desc, 0),
                8 => u64_at(desc, 0).and_then(|entry| u32::try_from(entry).ok()),
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

/// The descriptor of the first note with this name and type. Notes that do not end in the segment end the search.
fn find_note<'a>(notes: &'a [u8], align: usize, name: &[u8], kind: u32) -> Option<&'a [u8]> {
    let mut at: usize = 0;
    loop {
        let name_len = usize::try_from(u32_at(notes, at)?).ok()?;
        let desc_len = usize::try_from(u32_at(notes, at.checked_add(4)?)?).ok()?;
        let note_kind = u32_at(notes, at.checked_add(8)?)?;
        let name_at = at.checked_add(12)?;
        let name_end = name_at.checked_add(name_len)?;
        let desc_at = name_end.checked_next_multiple_of(align)?;
        let desc_end = desc_at.checked_add(desc_len)?;
        let desc = notes.get(desc_at..desc_end)?;
        if note_kind == kind && notes.get(name_at..name_end)? == name {
            return Some(desc);
        }
        at = desc_end.checked_next_multiple_of(align)?;
    }
}
