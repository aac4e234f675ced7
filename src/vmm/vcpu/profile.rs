//! Exits from the guest, counted by kind and by the device that they went to.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use kvm_ioctls::VcpuExit;

/// The kinds of exits. A HLT is none: KVM, which has the local APIC, handles it. `other` are the ends: triple faults,
/// system events, failures.
pub const KINDS: [&str; 6] = [
    "io_in",
    "io_out",
    "mmio_read",
    "mmio_write",
    "ioapic_eoi",
    "other",
];

/// An exit's place in [`KINDS`].
fn kind(exit: &VcpuExit<'_>) -> usize {
    match exit {
        VcpuExit::IoIn(..) => 0,
        VcpuExit::IoOut(..) => 1,
        VcpuExit::MmioRead(..) => 2,
        VcpuExit::MmioWrite(..) => 3,
        VcpuExit::IoapicEoi(_) => 4,
        _ => 5,
    }
}

/// A device's place, as the bus has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BusRegion {
    /// An I/O port, and else an address.
    pub is_port: bool,
    /// The first of the device's range; none where no device is.
    pub base: Option<u64>,
}

/// What a place has cost.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cost {
    /// How many.
    pub exits: u64,
    /// From KVM_RUN's return to its device being done.
    pub handling: Duration,
}

/// What a vCPU's thread has seen of its exits. It grows with the devices, not with what the guest does.
#[derive(Debug, Clone, Default)]
pub struct ExitProfile {
    /// When the vCPU first entered the guest.
    pub first_run: Option<Instant>,
    /// When KVM_RUN last returned by an exit.
    pub last_exit: Option<Instant>,
    /// When KVM_RUN was called after an access.
    resumed: Option<Instant>,
    /// The least time from there to the next exit: the exit latency, and little more, when the guest waits for its
    /// console.
    pub round_trip: Option<Duration>,
    /// In the order of [`KINDS`].
    pub kinds: [u64; KINDS.len()],
    /// By device.
    pub places: BTreeMap<BusRegion, Cost>,
}

impl ExitProfile {
    /// The vCPU enters the guest for the first time, now.
    pub fn first_run(&mut self) {
        self.first_run = Some(Instant::now());
    }

    /// KVM_RUN has returned, now.
    pub fn exit(&mut self, exit: &VcpuExit<'_>) {
        let now = Instant::now();
        if let Some(resumed) = self.resumed.take() {
            self.round_trip = least(self.round_trip, Some(now - resumed));
        }
        self.last_exit = Some(now);
        if let Some(count) = self.kinds.get_mut(kind(exit)) {
            *count += 1;
        }
    }

    /// The access that the exit was for is done, now.
    pub fn handled(&mut self, place: BusRegion) {
        let now = Instant::now();
        let cost = self.places.entry(place).or_default();
        cost.exits += 1;
        cost.handling += self.last_exit.map_or(Duration::ZERO, |exit| now - exit);
        self.resumed = Some(now);
    }

    /// Adds what another vCPU has seen. The first run is that of the first to be added.
    pub fn add(&mut self, other: &Self) {
        let Self {
            first_run,
            last_exit,
            resumed: _,
            round_trip,
            kinds,
            places,
        } = other;
        self.first_run = self.first_run.or(*first_run);
        self.last_exit = self.last_exit.max(*last_exit);
        self.round_trip = least(self.round_trip, *round_trip);
        for (sum, count) in self.kinds.iter_mut().zip(kinds) {
            *sum += count;
        }
        for (place, cost) in places {
            let sum = self.places.entry(*place).or_default();
            sum.exits += cost.exits;
            sum.handling += cost.handling;
        }
    }
}

fn least(one: Option<Duration>, other: Option<Duration>) -> Option<Duration> {
    one.into_iter().chain(other).min()
}

#[cfg(test)]
mod tests {
    use super::*;

    const COM1: BusRegion = BusRegion {
        is_port: true,
        base: Some(0x3f8),
    };

    #[test]
    fn exits_of_all_vcpus_add_up() {
        let (mut boot, mut second) = (ExitProfile::default(), ExitProfile::default());
        boot.first_run();
        for profile in [&mut boot, &mut second] {
            profile.exit(&VcpuExit::IoOut(0x3f8, b"a"));
            profile.handled(COM1);
        }
        second.first_run();
        second.exit(&VcpuExit::MmioWrite(0xd000_0050, &[0; 4]));
        second.exit(&VcpuExit::Shutdown);
        let mut sum = ExitProfile::default();
        sum.add(&boot);
        sum.add(&second);
        assert_eq!(sum.first_run, boot.first_run);
        assert_eq!(sum.last_exit, second.last_exit);
        assert_eq!(sum.kinds, [0, 2, 0, 1, 0, 1]);
        // Only the second vCPU has gone back into the guest after an access.
        assert_eq!(boot.round_trip, None);
        assert!(sum.round_trip.is_some() && sum.round_trip == second.round_trip);
        let (one, other) = (boot.places[&COM1], second.places[&COM1]);
        assert_eq!(sum.places[&COM1].exits, 2);
        assert_eq!(sum.places[&COM1].handling, one.handling + other.handling);
    }
}
