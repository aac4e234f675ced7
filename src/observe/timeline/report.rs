//! The timeline as a table and as JSON.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::process_start::{ProcessStart, Source};
use super::record::{MemoryBound, Point};
use crate::boot::{KernelFormat, LoadedKernel, Loading};
use crate::observe::memory::GuestShare;
use crate::size;
use crate::vmm::machine::COM1;
use crate::vmm::vcpu::profile::{BusRegion, Cost, ExitProfile, KINDS};

/// Version of the JSON. It counts up when a field goes or changes its meaning; new ones may come at any time.
const VERSION: u32 = 1;

/// All that a timeline has to say. As JSON it is stable: times are integers in ns, sizes in bytes. Nothing in it is text
/// from the guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    version: u32,
    /// The process's exit status.
    pub(super) status: u8,
    /// How often the guest was booted. All but `process_end` is about the first time.
    pub(super) boots: u32,
    /// What the times count from.
    process_start: ProcessStart,
    /// In the order in which they happened; what did not happen is not there.
    pub(super) events: Vec<Event>,
    /// Boot marks that were too many to be among the events.
    pub(super) boot_marks_lost: u64,
    kernel: Option<Kernel>,
    initrd: Option<Initrd>,
    exits: Exits,
    console: ConsoleCost,
    /// Of the process when the guest has ended; null if there was none, or no /proc.
    pub(super) memory: Option<GuestShare>,
    /// What the guest can make minivmm take beside its RAM, by device.
    pub(super) memory_bounds: Vec<MemoryBound>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct Event {
    name: Point,
    /// Since the start of the process.
    pub(super) at_ns: u64,
    /// A boot mark's byte, a network's number.
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Kernel {
    format: KernelFormat,
    bytes: u64,
    loading: Loading,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Initrd {
    bytes: u64,
}

/// What took the vCPUs out of the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
struct Exits {
    total: u64,
    /// The least time from an access being done to the next exit: about what the way into the guest and out of it takes on
    /// this host. Null if there were no two in a row.
    round_trip_ns: Option<u64>,
    kinds: BTreeMap<&'static str, u64>,
    /// The busiest first.
    devices: Vec<DeviceExits>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct DeviceExits {
    name: String,
    exits: u64,
    /// From KVM_RUN's return to the device being done, over all vCPUs.
    handling_ns: u64,
}

/// What the guest has said on its consoles, and what COM1 has cost. hvc0 is among the devices: it takes many bytes with one
/// exit, and its own thread handles them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
struct ConsoleCost {
    bytes: u64,
    com1_exits: u64,
    /// At least so long has the guest waited for COM1: the handling, and a round trip for each exit.
    com1_cost_ns: u64,
}

impl Report {
    pub(super) fn new(process_start: ProcessStart) -> Self {
        Self {
            version: VERSION,
            status: 0,
            boots: 0,
            process_start,
            events: Vec::new(),
            boot_marks_lost: 0,
            kernel: None,
            initrd: None,
            exits: Exits::default(),
            console: ConsoleCost::default(),
            memory: None,
            memory_bounds: Vec::new(),
        }
    }

    /// Adds what happened then.
    pub(super) fn add(&mut self, name: Point, at: Instant, value: Option<u8>) {
        let at_ns = nanoseconds(at.saturating_duration_since(self.process_start.at));
        self.events.push(Event { name, at_ns, value });
    }

    /// The same for points that come once, as far as they have come. The first time counts.
    pub(super) fn note(&mut self, points: impl IntoIterator<Item = (Point, Option<Instant>)>) {
        for (point, at) in points {
            let is_new = self.events.iter().all(|event| event.name != point);
            if let Some(at) = at.filter(|_| is_new) {
                self.add(point, at, None);
            }
        }
    }

    pub(super) fn set_kernel(&mut self, kernel: &LoadedKernel) {
        self.kernel = Some(Kernel {
            format: kernel.format,
            bytes: kernel.kernel_bytes,
            loading: kernel.kernel_loading,
        });
        self.initrd = kernel.initrd_range.as_ref().map(|range| Initrd {
            bytes: range.end - range.start,
        });
    }

    /// Takes over the exits of all vCPUs; `name_of` says what the devices are called that they went to.
    pub(super) fn set_exits(
        &mut self,
        exits: &ExitProfile,
        name_of: impl Fn(BusRegion) -> String,
        console_bytes: u64,
    ) {
        let device = |(place, cost): (&BusRegion, &Cost)| DeviceExits {
            name: name_of(*place),
            exits: cost.exits,
            handling_ns: nanoseconds(cost.handling),
        };
        let mut devices: Vec<_> = exits.places.iter().map(device).collect();
        devices.sort_by_key(|device| Reverse(device.exits));
        let round_trip_ns = exits.round_trip.map(nanoseconds);
        let com1 = devices.iter().find(|device| device.name == COM1);
        let (com1_exits, handling_ns) = com1.map_or((0, 0), |com1| (com1.exits, com1.handling_ns));
        self.console = ConsoleCost {
            bytes: console_bytes,
            com1_exits,
            com1_cost_ns: handling_ns + round_trip_ns.unwrap_or(0).saturating_mul(com1_exits),
        };
        self.exits = Exits {
            total: exits.kinds.iter().sum(),
            round_trip_ns,
            kinds: KINDS.into_iter().zip(exits.kinds).collect(),
            devices,
        };
    }
}

/// 2^64 ns are 584 years.
fn nanoseconds(time: Duration) -> u64 {
    time.as_nanos() as u64
}

fn milliseconds(ns: u64) -> f64 {
    ns as f64 / 1e6
}

impl Report {
    /// What an event is called in the table.
    fn label(&self, event: &Event) -> String {
        let value = event.value.unwrap_or_default();
        let label = match event.name {
            Point::ProcessStart => {
                match (self.process_start.source, self.process_start.within_ns) {
                    (Source::Main, _) | (_, None) => "process start (not known; taken for main)",
                    (_, Some(within)) => {
                        return format!(
                            "process start (known to within {:.3} ms)",
                            milliseconds(within)
                        );
                    }
                }
            }
            Point::Main => "main",
            Point::ConfigRead => "configuration read",
            Point::MemoryMapped => "guest memory mapped",
            Point::KernelLoaded => return format!("loaded: {}", self.loaded()),
            Point::VmCreated => "VM created",
            Point::VmReady => "vCPUs, devices and tables made",
            Point::FirstRun => "first KVM_RUN",
            Point::FirstConsoleByte => "first byte on the console",
            Point::InitRun => "kernel: Run ... as init process",
            Point::FirstUserOutput => "first output of userspace",
            Point::LoginPrompt => "login prompt",
            Point::BootMark => return format!("boot mark {value}"),
            Point::LinkUp => return format!("link of net {value} up"),
            Point::FirstPacketSent => return format!("first packet from the guest to net {value}"),
            Point::FirstPacketReceived => {
                return format!("first packet to the guest from net {value}");
            }
            Point::LastExit => "last exit",
            Point::VcpusStopped => "vCPUs stopped",
            Point::MemoryMeasured => "memory measured, for this table",
            Point::ProcessEnd => return format!("process end, status {}", self.status),
        };
        label.to_owned()
    }

    fn loaded(&self) -> String {
        let kernel = self.kernel.map(|k| {
            let format = match k.format {
                KernelFormat::BzImage => "bzImage",
                KernelFormat::Elf64 | KernelFormat::Elf32 => "ELF",
            };
            format!("kernel ({format}, {}, {})", size(k.bytes), k.loading)
        });
        let initrd = self.initrd.map(|i| format!("initrd ({})", size(i.bytes)));
        let files: Vec<String> = kernel.into_iter().chain(initrd).collect();
        files.join(", ")
    }
}

/// The table, some lines that end with a newline each.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:>12} {:>10}", "ms", "step")?;
        let mut before = 0;
        for event in &self.events {
            let (at, step) = (
                milliseconds(event.at_ns),
                milliseconds(event.at_ns - before),
            );
            writeln!(f, "{at:>12.3} {step:>10.3}  {}", self.label(event))?;
            before = event.at_ns;
        }
        if self.boot_marks_lost > 0 {
            writeln!(f, "{} more boot marks", self.boot_marks_lost)?;
        }
        if self.boots > 1 {
            writeln!(f, "the first of {} boots", self.boots)?;
        }
        if self.boots == 0 {
            // No guest ran: there is nothing to count.
            return Ok(());
        }
        let kinds: Vec<String> = (self.exits.kinds.iter())
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        writeln!(f, "exits: {} ({})", self.exits.total, kinds.join(", "))?;
        writeln!(f, "{:>12} {:>10}  handled by", "exits", "ms")?;
        for device in &self.exits.devices {
            let ms = milliseconds(device.handling_ns);
            writeln!(f, "{:>12} {ms:>10.3}  {}", device.exits, device.name)?;
        }
        let ConsoleCost {
            bytes,
            com1_exits,
            com1_cost_ns,
        } = self.console;
        let ms = milliseconds(com1_cost_ns);
        writeln!(
            f,
            "console: {bytes} bytes; COM1 took {com1_exits} exits, {ms:.3} ms at the least"
        )?;
        if let Some(memory) = self.memory {
            let (own, guest) = (size(memory.own_bytes), size(memory.guest_bytes));
            writeln!(f, "memory: minivmm's own {own}, the guest's {guest}")?;
        }
        let bounds: Vec<String> = (self.memory_bounds.iter())
            .map(|bound| format!("{} {}", bound.name, size(bound.bytes)))
            .collect();
        writeln!(f, "at most, whatever the guest does: {}", bounds.join(", "))?;
        Ok(())
    }
}
