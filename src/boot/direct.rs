//! Direct boot of the ELF kernel inside a bzImage. minivmm does the work of the kernel's decompressor, faster than the guest
//! would, and once for many boots.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::bzimage::BzImage;
use super::cache::KernelCache;
use super::elf::ElfKernel;
use super::error::{DirectBootError, Role};
use super::input::{InputFile, data_in};
use super::kaslr::{self, KaslrSlot};
use super::loaded::{Loading, PlacedKernel};
use super::payload;
use super::ram::GuestMemory;
use super::relocs::Relocations;

/// Maximum length of the relocation table in bytes; Debian's kernels have 0.9 MB.
const MAX_TABLE: u64 = 16 << 20;

/// The ELF kernel from a bzImage, and its relocations.
pub(crate) struct DirectKernel {
    input: InputFile,
    elf: ElfKernel,
    /// Bytes to whose multiples it may be moved.
    align: u64,
    /// A kernel without KASLR has none, and stays where it was linked for.
    relocs: Option<Relocations>,
}

impl DirectKernel {
    /// Gets the kernel in `image` from the cache in directory `cache`, or decompresses it, and caches it if `may_cache` says so. A
    /// cache that cannot be used is not an error.
    pub(crate) fn open(
        input: &InputFile,
        image: &BzImage,
        cache: Option<&Path>,
        may_cache: bool,
    ) -> Result<(Self, Loading), DirectBootError> {
        let without = |why: io::Error| {
            let dir = cache.unwrap_or(Path::new("")).display();
            log::info!("the kernel cache {dir} is not used: {why}");
        };
        let cache = cache.and_then(|dir| KernelCache::open(dir).map_err(without).ok());
        let cached = cache
            .as_ref()
            .and_then(|cache| cache.get(input.identity()))
            .and_then(|file| InputFile::from_file(Role::Kernel, input.path(), file).ok())
            .and_then(|file| Self::parse(file, image).ok());
        if let Some(kernel) = cached {
            return Ok((kernel, Loading::Cached));
        }
        let unpacked = Arc::new(payload::unpack(input, image)?);
        let kernel = Self::parse(input.unpacked(Arc::clone(&unpacked)), image)?;
        // A file that changed while it was read may be a mixture of both versions.
        if let Some(cache) = cache.filter(|_| may_cache && input.is_unchanged()) {
            cache
                .put(input.identity(), |file| write_sparse(file, &unpacked))
                .unwrap_or_else(without);
        }
        Ok((kernel, Loading::Decompressed))
    }

    /// The unpacked payload.
    pub(crate) fn into_file(self) -> InputFile {
        self.input
    }

    /// Reads the headers of the unpacked payload of `image`, and its relocation table.
    fn parse(input: InputFile, image: &BzImage) -> Result<Self, DirectBootError> {
        let head = input.head()?;
        let elf = ElfKernel::parse(&input, &head)?;
        elf.entry_64(&input)?;
        let (linked, preferred) = (elf.range().start, image.load_gpa);
        if linked != preferred {
            return Err(DirectBootError::Refused(format!(
                "its kernel is linked for {linked:#x}, its setup header says {preferred:#x}"
            )));
        }
        let align = image.header.kernel_alignment;
        if !(align.is_power_of_two() && u64::from(align) >= kaslr::MIN_ALIGN) {
            let why = format!("its alignment is {align:#x}");
            return Err(DirectBootError::Refused(why));
        }
        let table_at = elf.file_end.min(input.len());
        let table_len = input.len() - table_at;
        let relocs = if table_len == 0 {
            None
        } else {
            let no_table = || {
                DirectBootError::Refused(format!(
                    "the {table_len} bytes after its kernel are not a relocation table"
                ))
            };
            if table_len > MAX_TABLE || image.header.relocatable_kernel == 0 {
                return Err(no_table());
            }
            let mut table = vec![0; usize::try_from(table_len).map_err(|_| no_table())?];
            input.read_exact(table_at, &mut table, "its relocation table")?;
            Some(Relocations::parse(&table).ok_or_else(no_table)?)
        };
        Ok(Self {
            input,
            elf,
            align: align.into(),
            relocs,
        })
    }

    /// Puts the kernel into guest memory, which is free up to `ram_end`.
    pub(crate) fn load(
        &self,
        mem: &GuestMemory,
        ram_end: u64,
        cmdline: &str,
    ) -> Result<PlacedKernel, DirectBootError> {
        let link = self.elf.range();
        let relocs = self.relocs.as_ref().filter(|_| !kaslr::is_off(cmdline));
        let place = match (relocs, kaslr::limit(cmdline)) {
            (None, _) => KaslrSlot {
                phys: link.start,
                virt: link.start,
            },
            (Some(_), Some(limit)) => {
                return Err(DirectBootError::Refused(format!(
                    "{limit} is on the command line, and limits where it may go"
                )));
            }
            (Some(_), None) => {
                let random = random().map_err(host("get random numbers"))?;
                kaslr::choose(&link, self.align, ram_end, random)
            }
        };
        let kernel = self.elf.moved_to(place.phys);
        let range = kernel.range();
        let len = usize::try_from(range.end - range.start).unwrap_or(usize::MAX);
        let image = mem.get_slice(GuestAddress(range.start), len)?;
        let delta = place.virt.wrapping_sub(link.start);
        let result = kernel
            .load(&self.input, mem)
            .map_err(DirectBootError::from)
            .and_then(|_| match relocs {
                Some(relocs) => Ok(relocs.apply(&image, link.start, delta)?),
                None => Ok(()),
            });
        if let Err(why) = result {
            // The fallback loader needs zeroed memory.
            image.copy_from(&vec![0u8; len]);
            return Err(why);
        }
        Ok(PlacedKernel {
            entry: kernel.entry,
            range,
            file_bytes: kernel.file_bytes(),
            kaslr: relocs.is_some(),
        })
    }
}

fn random() -> io::Result<[u64; 2]> {
    let mut bytes = [0; 16];
    // Reads of up to 256 bytes are never short (getrandom(2)).
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    let both = u128::from_le_bytes(bytes);
    Ok([both as u64, (both >> 64) as u64])
}

/// Writes `content` to an empty file, with holes where it is zero.
fn write_sparse(file: &File, content: &[u8]) -> io::Result<()> {
    file.set_len(content.len() as u64)?;
    data_in(content).try_for_each(|(at, data)| file.write_all_at(data, at))
}

fn host(what: &'static str) -> impl FnOnce(io::Error) -> DirectBootError {
    move |source| DirectBootError::Host(what, source)
}
