//! What the host tells the first process.

use std::io;
use std::net::{IpAddr, Ipv4Addr};

use serde::{Deserialize, Serialize};

/// The program's path in the initramfs, by which it knows that it is the first process there.
pub const INIT: &str = "/.minivmm/init";
/// [`Setup`] as JSON.
pub const SETUP: &str = "/.minivmm/setup";
/// Directory of the modules that [`Setup`] names.
pub const MODULES: &str = "/.minivmm/modules";

/// What the first process finds in the initramfs.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Setup {
    /// Files below [`MODULES`], in the order in which they are loaded.
    pub modules: Vec<String>,
    /// Likewise, but loaded when the program has been started.
    pub later_modules: Vec<String>,
    /// What it is to do. A template is told when a VM goes on from it.
    pub orders: Option<Orders>,
}

/// What the first process is to do.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Its environment, NAME=VALUE.
    pub environment: Vec<String>,
    /// User, or user and group, by name or number; empty for root.
    pub user: String,
    /// Where it starts; made if it is not there.
    pub directory: String,
    /// The name of the machine.
    pub hostname: String,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// Whether it is to be process 1, with the kernel's console.
    pub is_init: bool,
    /// Whether its root is read-only.
    pub read_only: bool,
    /// How the second disk is mounted, to which goes what is written. Without it, that goes to memory.
    pub disk: Option<String>,
    /// Its network, if it has one.
    pub network: Option<Network>,
}

/// The network on the first interface. An address for IPv6 comes from the router.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Network {
    /// The guest's address.
    pub address: Ipv4Addr,
    /// Bits of the network's address.
    pub bits: u8,
    /// The router.
    pub gateway: Ipv4Addr,
    /// Name servers.
    pub resolvers: Vec<IpAddr>,
}

/// Port of the socket device at which the first process takes [`Exec`]s, as JSON with its length before it.
pub const EXEC_PORT: u32 = 1024;
/// Longest of them in bytes.
pub(super) const MAX_EXEC: u32 = 4 << 20;

/// Another program that the first process is to run. What it leaves open is as the image's program has it.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Exec {
    /// The program and its arguments.
    pub command: Vec<String>,
    /// More of its environment.
    pub environment: Vec<String>,
    /// Its user.
    pub user: Option<String>,
    /// Where it starts.
    pub directory: Option<String>,
    /// Whether it has a terminal.
    pub terminal: bool,
    /// In place of a program: a signal for the image's.
    pub signal: Option<u8>,
}

impl Exec {
    /// Sends the image's program this signal.
    pub fn signal(number: u8) -> Self {
        Self {
            signal: Some(number),
            ..Self::default()
        }
    }

    /// Powers the machine off, in an image with an init of its own.
    pub fn poweroff() -> Self {
        let command = vec!["poweroff".to_owned()];
        Self {
            command,
            ..Self::default()
        }
    }

    /// What is sent to [`EXEC_PORT`]. It is an error if that is too long.
    pub fn message(&self) -> io::Result<Vec<u8>> {
        let json = serde_json::to_vec(self)?;
        if json.len() > MAX_EXEC as usize {
            let kind = io::ErrorKind::ArgumentListTooLong;
            return Err(io::Error::new(kind, "the command is too long"));
        }
        Ok([&(json.len() as u32).to_le_bytes()[..], &json].concat())
    }
}

impl Orders {
    /// What is to be done for `exec`.
    pub(super) fn with(&self, exec: Exec) -> Self {
        let mut orders = self.clone();
        orders.command = exec.command;
        orders.environment.extend(exec.environment);
        orders.user = exec.user.unwrap_or(orders.user);
        orders.directory = exec.directory.unwrap_or(orders.directory);
        orders.terminal = exec.terminal;
        orders
    }
}
