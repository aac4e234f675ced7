//! What guests' networks need of this host.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};

use super::check::Check;
use crate::host::tap;

/// Checks what a network takes. No guest needs it to boot.
pub(super) fn check_network() -> Check {
    let opened = OpenOptions::new().read(true).write(true).open(tap::DEVICE);
    check_tap(opened.map(drop))
}

fn check_tap(opened: io::Result<()>) -> Check {
    let subject = tap::DEVICE;
    let Err(error) = opened else {
        return Check::ok(
            subject,
            "opens: a guest can have a network on a TAP interface",
        );
    };
    let hint = match error.kind() {
        ErrorKind::NotFound => {
            "modprobe tun; in a container, pass it in (docker run --device /dev/net/tun)"
        }
        _ => "let this user read and write it (chmod 666 /dev/net/tun is the usual mode)",
    };
    Check::info(subject, format!("no networks on TAP interfaces: {error}")).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_without_tap_devices_is_told_how_to_have_them() {
        assert_eq!(check_tap(Ok(())).hint, None);
        for (error, word) in [
            (ErrorKind::NotFound, "modprobe tun"),
            (ErrorKind::PermissionDenied, "chmod"),
        ] {
            let check = check_tap(Err(error.into()));
            assert!(check.hint.unwrap().contains(word));
        }
    }
}
