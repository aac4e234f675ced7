//! A VM's ways to its networks. They outlive its boots: a guest that resets the machine finds the same network again.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::sync::{Arc, Mutex};

use minivmm_devices::thread::ThreadStarter;
use minivmm_devices::virtio::net::{Link, LinkStatus, Net, NetOptions, SharedLink};

use super::error::{VmError, host};
use crate::config::{NetConfig, VmConfig};
use crate::host::passt::{self, Passt};
use crate::host::tap::Tap;

/// Where a host's own ID is (machine-id(5)).
const MACHINE_ID: &str = "/etc/machine-id";

/// See the module.
#[derive(Default)]
pub struct Networks(Vec<Network>);

struct Network {
    link: SharedLink,
    status: Arc<LinkStatus>,
    options: NetOptions,
    passt: Option<Passt>,
}

impl Networks {
    /// Opens what the network devices of a VM need of the host. `threads` starts a thread for each passt.
    pub fn open(config: &VmConfig, threads: &ThreadStarter) -> Result<Self, VmError> {
        if config.nets.is_empty() {
            return Ok(Self::default());
        }
        config.validate()?;
        // The same for as long as the VM has its place, its kernel and its disks.
        let mut vm = fs::read(MACHINE_ID).unwrap_or_default();
        let disks = config.disks.iter().map(|disk| &disk.path);
        for path in [&config.kernel].into_iter().chain(disks) {
            vm.extend(path.as_os_str().as_bytes());
        }
        let open = |(index, net): (usize, &NetConfig)| {
            let mut interface = None;
            let mut packets = |tap: Tap| {
                interface = Some(tap.name);
                let link = Link::packets(tap.queues, tap.set_offloads);
                (link, tap.mtu, None)
            };
            let (link, mtu, passt) = match (&net.tap, net.fd) {
                _ if net.passt => {
                    let (socket, passt) = Passt::start(net, threads)?;
                    (Link::stream(socket), Some(passt::MTU), Some(passt))
                }
                (Some(name), _) => packets(Tap::open(name, net.pairs())?),
                (None, Some(fd)) => packets(Tap::from_inherited(fd)?),
                // A template, which goes on with passt.
                (None, None) if net.fixed_address => {
                    (Link::unplugged(false), Some(passt::MTU), None)
                }
                // Whatever its driver has agreed on.
                (None, None) => (Link::unplugged(true), Some(u16::MAX), None),
            };
            let link = link.map_err(host("a network device"))?;
            Ok(Network {
                status: Arc::clone(link.status()),
                link: Arc::new(Mutex::new(link)),
                options: NetOptions {
                    mac: net.mac_address(&vm, index, interface.as_deref()),
                    mtu,
                    pairs: net.pairs(),
                },
                passt,
            })
        };
        let networks: Result<_, VmError> = config.nets.iter().enumerate().map(open).collect();
        networks.map(Self)
    }

    /// What is known of each link.
    pub fn status(&self) -> impl Iterator<Item = &LinkStatus> {
        self.0.iter().map(|network| &*network.status)
    }

    /// The devices of the next boot. Fails for a passt that could not be started.
    pub(super) fn devices(
        &self,
        config: &VmConfig,
        threads: &ThreadStarter,
    ) -> Result<Vec<Net>, VmError> {
        let (configured, open) = (config.nets.len(), self.0.len());
        if configured != open {
            return Err(VmError::Networks(configured, open));
        }
        let device = |network: &Network| {
            if let Some(passt) = &network.passt {
                passt.check_start()?;
            }
            Net::new(Arc::clone(&network.link), network.options, threads)
                .map_err(host("a network device"))
        };
        self.0.iter().map(device).collect()
    }
}
