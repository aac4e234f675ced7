//! The MP table (Intel MultiProcessor Specification 1.4), for kernels built or booted without ACPI.

use minivmm_devices::platform::ioapic;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::{IOAPIC_START, LAPIC_START, MPTABLE_START};

/// Version that local and I/O APIC report: an integrated APIC.
const APIC_VERSION: u8 = 0x14;
const FLOATING_POINTER_SIZE: u64 = 16;
const HEADER_SIZE: u16 = 44;
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
    let table_address = MPTABLE_START + FLOATING_POINTER_SIZE;
    // § 4.1: a length of one unit of 16 bytes, specification 1.4, checksum, five feature bytes.
    let mut pointer = [
        b"_MP_".as_slice(),
        &(table_address as u32).to_le_bytes(),
        &[1, 4, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    set_checksum(&mut pointer, 10);
    mem.write_slice(&pointer, GuestAddress(MPTABLE_START))?;
    mem.write_slice(&config_table(cpus), GuestAddress(table_address))
}

fn config_table(cpus: u8) -> Vec<u8> {
    let mut entries = Vec::new();
    for cpu in 0..cpus {
        // Enabled; the first is the boot processor.
        let flags = if cpu == 0 { 1 | 2 } else { 1 };
        entries.push(
            [
                [PROCESSOR, cpu, APIC_VERSION, flags],
                // Family 6, as the kernel reads it from CPUID anyway; FPU and APIC on the chip.
                0x600u32.to_le_bytes(),
                0x201u32.to_le_bytes(),
                [0; 4],
                [0; 4],
            ]
            .concat(),
        );
    }
    entries.push([&[BUS, ISA_BUS], b"ISA   ".as_slice()].concat());
    let ioapic = [IO_APIC, cpus, APIC_VERSION, 1];
    entries.push([ioapic, (IOAPIC_START as u32).to_le_bytes()].concat());
    for pin in 0..ioapic::PINS as u8 {
        // Type INT, polarity and trigger as the bus has them.
        entries.push(vec![IO_INTERRUPT, 0, 0, 0, ISA_BUS, pin, cpus, pin]);
    }
    // No 8259 is wired to LINT0, but a kernel expects the entry; NMI is on LINT1.
    entries.push(vec![LOCAL_INTERRUPT, 3, 0, 0, ISA_BUS, 0, 0xff, 0]);
    entries.push(vec![LOCAL_INTERRUPT, 1, 0, 0, ISA_BUS, 0, 0xff, 1]);

    let count = entries.len() as u16;
    let entries = entries.concat();
    let mut table = [
        b"PCMP".as_slice(),
        &(HEADER_SIZE + entries.len() as u16).to_le_bytes(),
        // Specification 1.4, checksum.
        &[4, 0],
        b"MINIVMM minivmm     ",
        // No OEM table.
        &[0; 6],
        &count.to_le_bytes(),
        &(LAPIC_START as u32).to_le_bytes(),
        // No extended table.
        &[0; 4],
        &entries,
    ]
    .concat();
    set_checksum(&mut table, 7);
    table
}

/// Sets the byte at `offset` so that all bytes add up to zero.
fn set_checksum(bytes: &mut [u8], offset: usize) {
    let sum = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
    if let Some(byte) = bytes.get_mut(offset) {
        *byte = sum;
    }
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
