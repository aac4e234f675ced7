//! Debian as an image: what its packages do in a VM.

use std::process::{Command, Stdio};

use crate::cloud;
use crate::common::image::Image;
use crate::common::limit::until;
use crate::common::linux::{Debian, debian_disk, rounds};
use crate::common::network::{own_network, sh};
use crate::common::{self, Ended, expect, run, signal, wait};
use crate::printed;

/// Where its root is, for the test alone.
const ROOT: &str = "/mnt/debian";

#[test]
fn debian_compiles_serves_and_boots_to_its_login() {
    own_network(1500);
    let disk = debian_disk();
    let disk = disk.display();
    sh(&format!(
        "mkdir {ROOT}; mount -o loop,ro,noload {disk} {ROOT}"
    ));
    let image = Image::new();
    compile_and_serve(&image);
    boot_to_login(&image);
}

/// minivmm that runs it with these options.
fn debian(image: &Image, options: &[&str]) -> Command {
    let mut command = image.minivmm(&["run", "--cold", "--kernel", &cloud()]);
    command.args(options).args(["--rootfs", ROOT]);
    command
}

fn compile_and_serve(image: &Image) {
    let ports = ["-p", "8080:80", "-p", "[::1]:8081:80"];
    let script = r#"echo '#include <stdio.h>
        int main() { return puts("compiled") < 0; }' >/tmp/main.c
        gcc -o /tmp/main /tmp/main.c && /tmp/main && mkdir /var/log/nginx && exec nginx -g 'daemon off;'"#;
    let mut command = debian(image, &ports);
    let mut child = command.args(["sh", "-c", script]).spawn().unwrap();
    expect(&mut child, "compiled\n");
    for url in ["http://127.0.0.1:8080/", "http://[::1]:8081/"] {
        // Until nginx listens, and the VM has its address for IPv6.
        assert!(until(|| failures(&ask(1, url)) == 0), "{url}");
        for _ in 0..rounds(1, 50) {
            let ended = ask(200, url);
            println!("{}", ended.out());
            ended.assert_code(0);
            ended.assert_printed(&[
                "Complete requests:      200\n",
                "Server Software:        nginx",
            ]);
            assert!(!ended.out().contains("Non-2xx"));
            // Twice in some 38,000, in labs short of CPU time, one of the first connections was reset; why is not known. passt of 2023 does
            // that when the guest has not answered for 10 s, but with a TAP interface in place of a VM it reset none of 57,400. Each counts
            // up to four times.
            assert!(failures(&ended) <= 8, "{}", ended.out());
        }
    }
    signal(&child, "TERM");
    let output = wait(child, common::PATIENCE);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
}

fn failures(ended: &Ended) -> usize {
    let out = ended.out();
    let (_, rest) = out.split_once("Failed requests:").unwrap();
    rest.split_whitespace().next().unwrap().parse().unwrap()
}

/// ApacheBench, with some connections at a time; what fails is counted, and pages of any length are no failures.
fn ask(requests: usize, url: &str) -> Ended {
    let concurrency = requests.min(8).to_string();
    let mut ab = Command::new("ab");
    ab.args([
        "-n",
        &requests.to_string(),
        "-c",
        &concurrency,
        "-s",
        "300",
        "-r",
        "-l",
        url,
    ]);
    ab.stdout(Stdio::piped()).stderr(Stdio::piped());
    run(&mut ab)
}

/// systemd is process 1.
fn boot_to_login(image: &Image) {
    let init = ["--init", "image", "--stop-timeout", "300"];
    let options = ["-it", "-h", "debian", "--name", "debian"];
    let debian = Debian::on_terminal(&debian(image, &[&init[..], &options].concat()));
    debian.log_in();
    debian.run("systemctl is-system-running --wait", "running\r\n");
    debian.run("cat /proc/1/comm; hostname", "systemd\r\ndebian\r\n");
    debian.run("findmnt --noheadings /", "image  overlay rw");
    let exec = ["exec", "debian", "systemctl", "is-active", "systemd-logind"];
    printed(&run(&mut image.minivmm(&exec)), "active\n");
    debian.terminate();
}
