//! What the host tells the first process.

use serde::{Deserialize, Serialize};

/// The program's path in the initramfs, by which it knows that it is the first process there.
pub const INIT: &str = "/.minivmm/init";
/// [`Orders`] as JSON.
pub const ORDERS: &str = "/.minivmm/orders";
/// Directory of the modules that [`Orders`] name.
pub const MODULES: &str = "/.minivmm/modules";

/// What the first process is to do.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// Files below [`MODULES`], in the order in which they are loaded.
    pub modules: Vec<String>,
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
    /// Whether its root is read-only.
    pub read_only: bool,
}
