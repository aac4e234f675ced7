//! TAP interfaces, which only root can make.

use std::process::Command;

/// A TAP interface, gone with the test.
pub(crate) struct Tap(&'static str);

impl Tap {
    /// With the address 10.9.0.1.
    pub(crate) fn new(name: &'static str, mtu: u32) -> Self {
        let script = format!(
            "ip tuntap add {name} mode tap && ip link set {name} mtu {mtu} up && ip addr add 10.9.0.1/24 dev {name}"
        );
        let made = Command::new("sh").args(["-c", &script]).status().unwrap();
        assert!(made.success(), "{script}");
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // One that a test has removed is gone.
        let delete = ["link", "delete", self.0];
        _ = Command::new("ip").args(delete).output();
    }
}
