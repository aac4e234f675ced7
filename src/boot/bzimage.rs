//! bzImage: the setup header, and the protected-mode part at the place it asks for.

use linux_loader::bootparam::setup_header;
use vm_memory::ByteValued;

use super::bytes::{array, has_magic, u16_at};
use super::error::BootError;
use super::input::InputFile;
use super::loaded::PlacedKernel;
use super::ram::{GuestMemory, MIB, check_fits};
use crate::arch::boot_params::{BOOT_FLAG, LOADED_HIGH, SETUP_HEADER_OFFSET};
use crate::arch::layout;
use crate::printable;

/// End of the room for the setup header in boot_params (arch/x86/include/uapi/asm/bootparam.h: `edd_mbr_sig_buffer`).
pub(crate) const SETUP_HEADER_MAX_END: usize = 0x290;

/// First protocol with `xloadflags` and so with a declared 64-bit entry.
const MIN_VERSION: u16 = 0x20c;
/// `xloadflags`: there is a 64-bit entry 0x200 bytes into the protected-mode part.
const XLF_KERNEL_64: u16 = 1 << 0;
/// `xloadflags`: kernel, boot_params, command line and initrd may be anywhere.
const XLF_CAN_BE_LOADED_ABOVE_4G: u16 = 1 << 1;
/// Offset of the 64-bit entry in the protected-mode part (boot.rst, "64-bit Boot Protocol").
const ENTRY_64_OFFSET: u64 = 0x200;
/// End of the last field of protocol 2.12, `handover_offset`.
const MIN_HEADER_END: usize = 0x268;
/// A sector of the setup part.
const SECTOR: u64 = 512;
/// What `syssize` counts.
const SYSSIZE_UNIT: u64 = 16;
/// Longest version string that is looked at.
const VERSION_MAX: usize = 256;

/// A bzImage whose setup header has been read and checked.
#[derive(Debug, Clone)]
pub(crate) struct BzImage {
    /// The setup header.
    pub(crate) header: setup_header,
    /// The setup header's bytes, as long as the kernel says it is: newer kernels have fields that we do not know.
    pub(crate) header_bytes: Vec<u8>,
    /// Offset of the protected-mode part in the file.
    pub(crate) code_offset: u64,
    /// Length of the protected-mode part in bytes.
    pub(crate) code_len: u64,
    /// Where it is loaded.
    pub(crate) load_gpa: u64,
    /// End of the memory that it uses before it reads the memory map.
    pub(crate) end_gpa: u64,
    /// "6.1.0-56-cloud-amd64 (...) #1 SMP ...".
    pub(crate) version: Option<String>,
}

impl BzImage {
    /// Reads and checks the setup header; `head` is the file's beginning.
    pub(crate) fn parse(input: &InputFile, head: &[u8]) -> Result<Self, BootError> {
        if !has_magic(head, 0x1fe, &BOOT_FLAG.to_le_bytes()) {
            return Err(input.malformed(format!(
                "the setup header has HdrS at 0x202, and {:#06x} for the boot flag 0xaa55 at 0x1fe",
                u16_at(head, 0x1fe).unwrap_or(0)
            )));
        }
        // Checked first: older versions lack other fields.
        if let Some(version) = u16_at(head, 0x206).filter(|version| *version < MIN_VERSION) {
            return Err(BootError::Refused(format!(
                "{} speaks boot protocol {}.{:02}; 2.12 (Linux 3.8) is the oldest with a 64-bit entry, give a newer kernel",
                input.path().display(),
                version >> 8,
                version & 0xff
            )));
        }
        input.check_range(0, MIN_HEADER_END as u64, "the setup header")?;
        let header =
            parse_header(head).ok_or_else(|| input.malformed("its setup header cannot be read"))?;
        // boot.rst, "32-bit Boot Protocol": the header ends at 0x202 + the byte at 0x201.
        let end = 0x202 + array::<1>(head, 0x201).map_or(0, |[byte]| usize::from(byte));
        if end < MIN_HEADER_END {
            return Err(input.malformed(format!(
                "its setup header ends at {end:#x}, boot protocol 2.12 has fields up to {MIN_HEADER_END:#x}"
            )));
        }
        let end = end.min(SETUP_HEADER_MAX_END);
        input.check_range(0, end as u64, "the setup header")?;
        let header_bytes = head
            .get(SETUP_HEADER_OFFSET..end)
            .unwrap_or_default()
            .to_vec();

        if header.xloadflags & XLF_KERNEL_64 == 0 {
            return Err(input.is_32_bit("a bzImage without the 64-bit entry, XLF_KERNEL_64"));
        }
        if header.loadflags & LOADED_HIGH == 0 {
            return Err(input
                .malformed("it is a zImage, to be loaded below 1 MiB, and claims a 64-bit entry"));
        }

        let (code_offset, code_len) = protected_mode_part(input, &header)?;
        let (load_gpa, end_gpa) = placement(input, &header, code_len)?;
        let version = read_version(input, &header, code_offset)?;
        Ok(Self {
            header,
            header_bytes,
            code_offset,
            code_len,
            load_gpa,
            end_gpa,
            version,
        })
    }

    /// Reads the protected-mode part, which decompresses the kernel, into guest memory.
    pub(crate) fn load(
        &self,
        input: &InputFile,
        mem: &GuestMemory,
    ) -> Result<PlacedKernel, BootError> {
        check_fits(input.path(), mem, self.end_gpa)?;
        input.read_into(
            mem,
            self.load_gpa,
            self.code_offset,
            self.code_len,
            "the protected-mode part of the kernel",
        )?;
        Ok(PlacedKernel {
            entry: self.entry_64(),
            range: self.load_gpa..self.end_gpa,
            file_bytes: self.code_len,
            // It decides for itself.
            kaslr: false,
        })
    }

    /// Offset of the compressed kernel in the file.
    pub(crate) fn payload_offset(&self) -> u64 {
        self.code_offset + u64::from(self.header.payload_offset)
    }

    /// Bytes of the compressed kernel. They lie in the protected-mode part.
    pub(crate) fn payload_len(&self) -> u64 {
        self.header.payload_length.into()
    }

    /// GPA of the 64-bit entry.
    pub(crate) fn entry_64(&self) -> u64 {
        self.load_gpa + ENTRY_64_OFFSET
    }

    /// End of the memory where the initrd may be, as far as the kernel has a say.
    pub(crate) fn initrd_ceiling(&self) -> u64 {
        if self.header.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G != 0 {
            u64::MAX
        } else {
            u64::from(self.header.initrd_addr_max) + 1
        }
    }

    /// Longest command line, without the NUL.
    pub(crate) fn cmdline_max(&self) -> usize {
        usize::try_from(self.header.cmdline_size).unwrap_or(usize::MAX)
    }
}

/// The setup header as a structure. What a short file does not have is zero.
fn parse_header(head: &[u8]) -> Option<setup_header> {
    let mut header = setup_header::default();
    let bytes = head.get(SETUP_HEADER_OFFSET..)?;
    let target = header.as_mut_slice();
    let count = bytes.len().min(target.len());
    target
        .get_mut(..count)?
        .copy_from_slice(bytes.get(..count)?);
    Some(header)
}

/// Offset and length of the protected-mode part in the file, checked, with the payload in it.
fn protected_mode_part(input: &InputFile, header: &setup_header) -> Result<(u64, u64), BootError> {
    let setup_sects = if header.setup_sects == 0 {
        4
    } else {
        u64::from(header.setup_sects)
    };
    let code_offset = (setup_sects + 1) * SECTOR;
    // syssize counts units of 16 bytes, and the file may end within the last.
    let file_len = input.len().saturating_sub(code_offset);
    let code_len = match u64::from(header.syssize) * SYSSIZE_UNIT {
        len if len > file_len && len - file_len < SYSSIZE_UNIT => file_len,
        len => len,
    };
    if code_len <= ENTRY_64_OFFSET {
        return Err(input.malformed(format!(
            "its protected-mode part has {code_len} bytes (syssize)"
        )));
    }
    input.check_range(
        code_offset,
        code_len,
        "its protected-mode part (setup_sects, syssize)",
    )?;
    let (payload_offset, payload_length) = (header.payload_offset, header.payload_length);
    if u64::from(payload_offset) + u64::from(payload_length) > code_len {
        return Err(input.malformed(format!(
            "its payload ({payload_length} bytes at {payload_offset:#x}) ends after its protected-mode part \
             ({code_len} bytes)"
        )));
    }
    Ok((code_offset, code_len))
}

/// Where the kernel goes and what it needs there (boot.rst, "init_size" and "pref_address").
///
/// Loaded at its preferred address a kernel need not move itself. Below that address the 64-bit entry would move it up
/// there anyway (arch/x86/boot/compressed/head_64.S, LOAD_PHYSICAL_ADDR), so there is no second choice.
fn placement(
    input: &InputFile,
    header: &setup_header,
    code_len: u64,
) -> Result<(u64, u64), BootError> {
    let (pref_address, alignment) = (header.pref_address, header.kernel_alignment);
    let load_gpa = if pref_address == 0 {
        layout::HIGH_RAM_START
    } else {
        pref_address
    };
    if load_gpa < layout::HIGH_RAM_START {
        return Err(input.malformed(format!(
            "it wants to be loaded at {load_gpa:#x} (pref_address), below 1 MiB, where the boot data is"
        )));
    }
    if header.relocatable_kernel != 0
        && !(alignment.is_power_of_two() && load_gpa.is_multiple_of(alignment.into()))
    {
        return Err(input.malformed(format!(
            "its preferred address {load_gpa:#x} is not a multiple of its alignment {alignment:#x}"
        )));
    }
    load_gpa
        .checked_add(code_len.max(header.init_size.into()))
        .filter(|end| *end <= layout::MMIO_GAP_START)
        .map(|end| (load_gpa, end))
        .ok_or_else(|| {
            let init_size = header.init_size;
            input.malformed(format!(
                "it wants {init_size:#x} bytes (init_size) at {load_gpa:#x}, beyond the {} MiB below the MMIO gap",
                layout::MMIO_GAP_START / MIB
            ))
        })
}

/// The version string, whose pointer is relative to 0x200 (boot.rst, "kernel_version"). A bad pointer is not an error.
fn read_version(
    input: &InputFile,
    header: &setup_header,
    code_offset: u64,
) -> Result<Option<String>, BootError> {
    if header.kernel_version == 0 {
        return Ok(None);
    }
    let offset = u64::from(header.kernel_version) + 0x200;
    let mut bytes = [0; VERSION_MAX];
    let len = usize::try_from(code_offset.saturating_sub(offset))
        .unwrap_or(0)
        .min(VERSION_MAX);
    let count = input.read_some(offset, bytes.get_mut(..len).unwrap_or_default())?;
    Ok(printable(bytes.get(..count).unwrap_or_default()))
}
