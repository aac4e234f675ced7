//! What guests' networks need of this host.

use std::fs::OpenOptions;
use std::io::{self, ErrorKind};
use std::process::{Command, Output, Stdio};

use super::check::Check;
use crate::host::{passt, tap};
use crate::printable;

/// Checks what networks take. No guest needs them to boot.
pub(super) fn check_networks() -> [Check; 2] {
    let opened = OpenOptions::new().read(true).write(true).open(tap::DEVICE);
    let version = Command::new(passt::PROGRAM)
        .arg("--version")
        .stdin(Stdio::null())
        .output();
    [check_tap(opened.map(drop)), check_passt(version)]
}

fn check_passt(version: io::Result<Output>) -> Check {
    match version {
        // In some versions it says this on stderr.
        Ok(output) => {
            let text = [output.stdout, output.stderr].concat();
            let version = printable(&text).unwrap_or_else(|| "is there".into());
            let use_it = "a guest can have a network without any rights";
            Check::ok(passt::PROGRAM, format!("{version}: {use_it}"))
        }
        Err(e) => {
            let found = format!("no networks without rights: {e}");
            Check::info(passt::PROGRAM, found).hint(passt::INSTALL)
        }
    }
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
    fn passt_is_named_with_its_version_or_its_package() {
        let output = |stdout: &[u8]| Output {
            status: std::process::ExitStatus::default(),
            stdout: stdout.into(),
            stderr: Vec::new(),
        };
        let check = check_passt(Ok(output(b"passt 0.0~git20230309\nCopyright\n")));
        assert!(
            check.found.starts_with("passt 0.0~git20230309: "),
            "{}",
            check.found
        );
        assert!(
            check_passt(Ok(output(b"\x1b]")))
                .found
                .starts_with("is there: ")
        );
        let check = check_passt(Err(ErrorKind::NotFound.into()));
        assert!(check.hint.unwrap().contains("apt-get install passt"));
    }

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
