//! The network of an image's VM: passt, with an address that the guest need not ask for.

use crate::config::{NetConfig, PublishedPort};
use crate::guest::Network;
use crate::host::passt::{ADDRESS, fixed_resolvers};

/// The device, and what its guest is to know. Ports in `publish` lead to the guest.
pub fn passt_network(publish: Vec<PublishedPort>) -> (NetConfig, Network) {
    let (address, bits, gateway) = ADDRESS;
    let device = NetConfig {
        passt: true,
        publish,
        fixed_address: true,
        ..NetConfig::default()
    };
    let network = Network {
        address,
        bits,
        gateway,
        resolvers: fixed_resolvers(),
    };
    (device, network)
}
