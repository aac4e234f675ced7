//! The MP table (Intel MultiProcessor Specification 1.4), for kernels built or booted without ACPI.

use minivmm_devices::platform::ioapic;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{IOAPIC_START, LAPIC_START, MPTABLE_START};

/// Version that local and I/O APIC report: an integrated APIC.
const APIC_VERSION: u8 = 0x14;
const FLOATING_POINTER_SIZE: u64 = 16;
const HEADER_SIZE: usize = 44;
/// Bus 0 is ISA: its interrupts are edge-triggered and active high, as every wire of this machine is.
const ISA_BUS: u8 = 0;

/// Entry types (§ 4.3).
const PROCESSOR: u8 = 0;
const BUS: u8 = 1;
const IO_APIC: u8 = 2;
const IO_INTERRUPT: u8 = 3;
const LOCAL_INTERRUPT: u8 = 4;

/// Writes the table that names `cpus` processors, the I/O APIC and its pins. Pin N is ISA interrupt N.
pub fn write(mem: &GuestMemoryMmap, cpus: u8) -> Result<(), GuestMemoryError> {
    let config = config_table(cpus);
    let table_address = MPTABLE_START + FLOATING_POINTER_SIZE;

    let mut pointer = [0u8; FLOATING_POINTER_SIZE as usize];
    pointer[0..4].copy_from_slice(b"_MP_");
    pointer[4..8].copy_from_slice(&(table_address as u32).to_le_bytes());
    pointer[8] = 1; // length in units of 16 bytes
    pointer[9] = 4; // specification 1.4
    pointer[10] = checksum(&pointer);
    mem.write_slice(&pointer, GuestAddress(MPTABLE_START))?;
    mem.write_slice(&config, GuestAddress(table_address))
}

fn config_table(cpus: u8) -> Vec<u8> {
    let mut table = vec![0u8; HEADER_SIZE];
    let mut entries = 0u16;
    let mut add = |entry: &[u8]| {
        table.extend_from_slice(entry);
        entries += 1;
    };

    for cpu in 0..cpus {
        let flags = 1 | if cpu == 0 { 2 } else { 0 }; // enabled; the first is the boot processor
        let mut entry = [0u8; 20];
        entry[..4].copy_from_slice(&[PROCESSOR, cpu, APIC_VERSION, flags]);
        entry[4..8].copy_from_slice(&0x600u32.to_le_bytes()); // family 6, as the kernel reads it from CPUID anyway
        entry[8..12].copy_from_slice(&0x201u32.to_le_bytes()); // FPU and APIC on the chip
        add(&entry);
    }
    add(&[BUS, ISA_BUS, b'I', b'S', b'A', b' ', b' ', b' ']);

    let mut ioapic = [IO_APIC, cpus, APIC_VERSION, 1, 0, 0, 0, 0];
    ioapic[4..].copy_from_slice(&(IOAPIC_START as u32).to_le_bytes());
    add(&ioapic);

    for pin in 0..ioapic::PINS as u8 {
        // Type INT, polarity and trigger as the bus has them.
        add(&[IO_INTERRUPT, 0, 0, 0, ISA_BUS, pin, cpus, pin]);
    }
    // No 8259 is wired to LINT0, but a kernel expects the entry; NMI is on LINT1.
    add(&[LOCAL_INTERRUPT, 3, 0, 0, ISA_BUS, 0, 0xff, 0]);
    add(&[LOCAL_INTERRUPT, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let length = table.len() as u16;
    table[0..4].copy_from_slice(b"PCMP");
    table[4..6].copy_from_slice(&length.to_le_bytes());
    table[6] = 4;
    table[8..16].copy_from_slice(b"MINIVMM ");
    table[16..28].copy_from_slice(b"minivmm     ");
    table[34..36].copy_from_slice(&entries.to_le_bytes());
    table[36..40].copy_from_slice(&(LAPIC_START as u32).to_le_bytes());
    table[7] = checksum(&table);
    table
}

/// The byte that makes all bytes of a structure add up to zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0u8, |sum, b| sum.wrapping_sub(*b))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::layout::MPTABLE_MAX_SIZE;

    #[test]
    fn checksums_and_counts_hold_for_every_number_of_cpus() {
        for cpus in [1, 2, 64] {
            let mem = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
            write(&mem, cpus).unwrap();
            let mut pointer = [0u8; 16];
            mem.read_slice(&mut pointer, GuestAddress(MPTABLE_START))
                .unwrap();
            assert_eq!(pointer.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            let table = config_table(cpus);
            assert_eq!(table.iter().fold(0u8, |s, b| s.wrapping_add(*b)), 0);
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            assert_eq!(
                u16::from_le_bytes([table[34], table[35]]),
                u16::from(cpus) + 2 + 24 + 2
            );
            assert!(table.len() as u64 + 16 <= MPTABLE_MAX_SIZE);
        }
    }
}
