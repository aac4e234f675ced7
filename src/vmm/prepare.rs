//! What comes first of a VM: its files opened, its memory made, its kernel loaded, KVM asked.

use std::sync::Arc;
use std::thread;
use std::time::Instant;

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Kvm, VmFd};
use minivmm_devices::THREAD_STACK;
use minivmm_devices::block::{Disk, DiskMode, DiskOptions};
use minivmm_devices::platform::control::Restored;
use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::blk::Block;
use minivmm_devices::virtio::net::Net;
use minivmm_devices::virtio::vsock::Vsock;
use vm_memory::GuestMemoryMmap;

use super::error::{VmError, host, refused};
use super::networks::Networks;
use super::snapshot::load::Snapshot;
use super::{machine, memory};
use crate::arch::layout;
use crate::boot::{self, BootSource, KernelFormat, LoadedKernel};
use crate::config::{DiskConfig, MemorySize, VmConfig};
use crate::host::kvm;
use crate::host::vsock::{self, Socket};

/// When a VM's steps were done, as far as they were.
#[derive(Debug, Clone, Copy, Default)]
pub struct BuildTimes {
    /// Guest RAM has its addresses in the process.
    pub memory_mapped: Option<Instant>,
    /// Kernel, initrd and command line are in guest RAM.
    pub kernel_loaded: Option<Instant>,
    /// KVM has made the VM.
    pub vm_created: Option<Instant>,
    /// vCPUs, devices and tables are made.
    pub vm_ready: Option<Instant>,
}

/// A VM with its memory and kernel in place.
pub struct Prepared {
    // Dropped in this order: KVM's view of the memory goes before the memory.
    pub(super) fd: Arc<VmFd>,
    pub(super) kvm: Arc<Kvm>,
    pub(super) origin: Origin,
    pub(super) mem: GuestMemoryMmap,
    pub(super) kernel: LoadedKernel,
    pub(super) cmdline: String,
    pub(super) config: VmConfig,
    /// In the order of the configuration.
    pub(super) disks: Vec<Block>,
    /// Likewise.
    pub(super) nets: Vec<Net>,
    pub(super) vsock: Option<Vsock>,
    /// The host's end of that.
    pub(super) socket: Option<Socket>,
    pub(super) threads: ThreadStarter,
}

/// Where a VM's state comes from.
pub(super) enum Origin {
    /// It boots, with a CPUID made from this, which this host's KVM can give a guest.
    Boot(CpuId),
    /// It goes on.
    /// What its guest reads of itself is there until it is handed over.
    Snapshot(Arc<Snapshot>, Option<Restored>),
}

/// What a restored guest can read of itself.
#[derive(Debug, Clone, Default)]
pub struct Identity {
    /// Its number among the VMs that were started together from one snapshot.
    pub index: u32,
    /// The user's words to it.
    pub argument: Vec<u8>,
}

impl Prepared {
    /// Guest RAM.
    pub fn mem(&self) -> &GuestMemoryMmap {
        &self.mem
    }

    /// Makes a VM of a snapshot, with its memory. `config` is the snapshot's, but for what was changed in it; `networks` are open.
    /// The VM's threads are started by `threads`.
    pub fn restore(
        snapshot: &Arc<Snapshot>,
        config: &VmConfig,
        networks: &Networks,
        identity: Identity,
        threads: &ThreadStarter,
        times: &mut BuildTimes,
    ) -> Result<Self, VmError> {
        machine::check_capacity(config)?;
        let kvm = Arc::new(kvm::open()?);
        let disks = config.disks.iter().zip(&snapshot.disks);
        let disks = disks.map(|(disk, saved)| {
            let open = |options| Ok(saved.open(options)?);
            open_disk(disk, open, config.cpus, threads)
        });
        let disks = disks.collect::<Result<_, _>>()?;
        let (vsock, socket) = open_vsock(config, threads)?;
        let mem = memory::map_file(config.memory.bytes, &snapshot.file, snapshot.ram.offset)?;
        if config.mergeable {
            memory::enable_ksm(&mem)?;
        }
        times.memory_mapped = Some(Instant::now());
        // To ask KVM takes longer than all the rest: 0.36 ms where the host is a virtual machine itself.
        if !snapshot.is_from_this_host {
            let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
            snapshot.check_host(&supported.map_err(refused("KVM_GET_SUPPORTED_CPUID"))?)?;
        }
        let mut seed = [0; 32];
        rustix::rand::getrandom(&mut seed, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| host("random numbers")(e.into()))?;
        let restored = Restored {
            generation: snapshot.meta.generation,
            seed,
            index: identity.index,
            argument: identity.argument,
        };
        let fd = create_vm(&kvm)?;
        map_slots(&fd, &mem)?;
        times.vm_created = Some(Instant::now());
        let meta = &snapshot.meta;
        Ok(Self {
            fd: Arc::new(fd),
            kvm,
            origin: Origin::Snapshot(Arc::clone(snapshot), Some(restored)),
            mem,
            kernel: meta.kernel.clone(),
            cmdline: meta.cmdline.clone(),
            config: config.clone(),
            disks,
            nets: networks.devices(config, threads)?,
            vsock,
            socket,
            threads: threads.clone(),
        })
    }

    /// Opens all files, makes the VM and its RAM, and loads the kernel; `networks` are open. The VM's threads are started by
    /// `threads`. `times` has what was reached when it fails.
    pub fn new(
        config: &VmConfig,
        networks: &Networks,
        threads: &ThreadStarter,
        times: &mut BuildTimes,
    ) -> Result<Self, VmError> {
        Self::boot(config, networks, threads, true, times)
    }

    /// The same, but unless it `may_cache` what it unpacks, it adds nothing to the kernel cache: after the guest's reset, the calling
    /// thread is confined.
    pub fn boot(
        config: &VmConfig,
        networks: &Networks,
        threads: &ThreadStarter,
        may_cache: bool,
        times: &mut BuildTimes,
    ) -> Result<Self, VmError> {
        config.validate()?;
        machine::check_capacity(config)?;
        let kvm = Arc::new(kvm::open()?);
        let supported = ask_for_cpuid(&kvm);
        let cmdline = boot::suit_cmdline(&machine::cmdline_with_devices(config));
        let disks = config.disks.iter();
        let disks = disks.map(|disk| {
            let open = |options| Ok(Disk::open(&disk.path, options)?);
            open_disk(disk, open, config.cpus, threads)
        });
        let disks = disks.collect::<Result<_, _>>()?;
        let (vsock, socket) = open_vsock(config, threads)?;
        let mem = memory::create(config.memory.bytes)?;
        if config.mergeable {
            memory::warn_without_ksm();
            memory::enable_ksm(&mem)?;
        }
        if config.nets.iter().any(|net| net.passt) {
            // Its process is being made just now.
            memory::keep_from_children(&mem);
        }
        times.memory_mapped = Some(Instant::now());
        let cache = config.kernel_cache.then(boot::default_cache_dir).flatten();
        let kernel = boot::load(
            &mem,
            &BootSource {
                kernel: &config.kernel,
                initrd: config.initrd.as_deref(),
                cmdline: &cmdline,
                protocol: config.boot_protocol,
                cache: cache.as_deref(),
                may_cache,
            },
        )?;
        times.kernel_loaded = Some(Instant::now());
        if is_stock_linux(&kernel) && kvm::is_pvm() {
            return Err(VmError::SoftwareKvm(config.kernel.clone()));
        }
        let max = kvm.get_max_vcpus();
        if usize::from(config.cpus) > max {
            return Err(VmError::TooManyCpus(max, config.cpus));
        }
        let fd = create_vm(&kvm)?;
        let supported = supported()?;
        // Before the memslots, where KVM would refuse the address with an error number only.
        check_address_bits(config.memory, &supported)?;
        map_slots(&fd, &mem)?;
        times.vm_created = Some(Instant::now());
        Ok(Self {
            fd: Arc::new(fd),
            kvm,
            origin: Origin::Boot(supported),
            mem,
            kernel,
            cmdline,
            config: config.clone(),
            disks,
            nets: networks.devices(config, threads)?,
            vsock,
            socket,
            threads: threads.clone(),
        })
    }
}

/// Memslots come before the interrupt controller: afterwards each waits for an SRCU grace period.
fn map_slots(fd: &VmFd, mem: &GuestMemoryMmap) -> Result<(), VmError> {
    memory::register(fd, mem)?;
    fd.set_tss_address(layout::KVM_TSS_START as usize)
        .map_err(refused("KVM_SET_TSS_ADDR"))
}

/// Opens what a disk needs of the host.
fn open_disk(
    disk: &DiskConfig,
    open: impl FnOnce(DiskOptions) -> Result<Disk, VmError>,
    cpus: u8,
    threads: &ThreadStarter,
) -> Result<Block, VmError> {
    let mode = match (disk.read_only, disk.ephemeral) {
        (true, _) => DiskMode::ReadOnly,
        (false, true) => DiskMode::Ephemeral,
        (false, false) => DiskMode::ReadWrite,
    };
    let options = DiskOptions {
        mode,
        force_raw: disk.format.is_some(),
        block_size: disk.sector,
    };
    let opened = open(options)?;
    let id = disk.id.as_deref().unwrap_or_default();
    let queues = disk.queues.unwrap_or(cpus.into());
    let engine = disk.engine.unwrap_or_default();
    Block::new(opened, id, queues, engine, threads).map_err(host("a device's thread"))
}

/// Opens what a socket device needs of the host, and gives it with the host's end of it.
fn open_vsock(
    config: &VmConfig,
    threads: &ThreadStarter,
) -> Result<(Option<Vsock>, Option<Socket>), VmError> {
    let Some(vsock) = &config.vsock else {
        return Ok((None, None));
    };
    let open = |path| vsock::open(path, vsock);
    let opened = vsock.path.as_deref().map(open).transpose()?;
    let (side, file) = opened.unzip();
    let device = Vsock::new(side, vsock.cid, threads).map_err(host("a socket device"))?;
    Ok((Some(device), file))
}

/// Asks KVM which CPUID it can give a guest, on a thread of its own; what is returned waits for the answer. KVM executes some 30
/// CPUID instructions for it. Where the host is a virtual machine itself, each is an exit: 0.3 ms in all, while a kernel can be
/// loaded and a VM made.
fn ask_for_cpuid(kvm: &Arc<Kvm>) -> impl FnOnce() -> Result<CpuId, VmError> {
    let kvm = Arc::clone(kvm);
    let ask = move || kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
    let thread = thread::Builder::new()
        .name("cpuid".to_owned())
        .stack_size(THREAD_STACK)
        .spawn(ask.clone());
    move || {
        let answer = thread.ok().and_then(|thread| thread.join().ok());
        answer
            .unwrap_or_else(ask)
            .map_err(refused("KVM_GET_SUPPORTED_CPUID"))
    }
}

/// KVM_CREATE_VM is interrupted by any signal that arrives in it.
fn create_vm(kvm: &Kvm) -> Result<VmFd, VmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) if e.errno() == libc::EBUSY => return Err(VmError::Busy),
            result => return result.map_err(refused("KVM_CREATE_VM")),
        }
    }
}

/// CPUID leaf 0x80000008 EAX, bits 0-7: physical address bits.
fn check_address_bits(asked: MemorySize, supported: &CpuId) -> Result<(), VmError> {
    let bits = crate::arch::cpuid::physical_address_bits(supported);
    let end = memory::end_of_ram(asked.bytes);
    if bits < 64 && end > 1 << bits {
        return Err(VmError::TooMuchMemory(asked, end, bits));
    }
    Ok(())
}

/// Whether this is a kernel of a distribution's size and not a guest made for the purpose.
fn is_stock_linux(kernel: &LoadedKernel) -> bool {
    kernel.format == KernelFormat::BzImage || kernel.kernel_bytes > 4 << 20
}
