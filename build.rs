//! Builds guestctl, which `minivmm compare` puts into its guests.

use std::env;
use std::path::PathBuf;
use std::process::Command;

fn main() {
    let script = "guest-kernels/initramfs/build-guestctl";
    println!("cargo::rerun-if-changed={script}");
    println!("cargo::rerun-if-changed=guest-kernels/initramfs/guestctl.c");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("guestctl");
    let status = Command::new(script).arg(&out).status();
    assert!(
        status.is_ok_and(|status| status.success()),
        "{script} failed; it needs a C compiler (cc) and the headers of the C library"
    );
}
