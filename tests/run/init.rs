//! Images whose own init is process 1.

use std::process::Stdio;

use crate::common::image::Image;
use crate::common::{self, expect, run, run_with_input, signal, wait};
use crate::{cloud, printed};

const INIT: [&str; 2] = ["--init", "image"];

#[test]
fn the_images_own_init_is_process_1() {
    let image = Image::shared(true);
    for (option, read, line) in [("-q", "read -t 2", "none"), ("-i", "read", "typed")] {
        let options = [&INIT[..], &["-e", "B=c", option]].concat();
        let script = format!(
            "echo pid $$ $FROM_IMAGE $B; busybox pwd; {read} line; echo line ${{line:-none}}; busybox poweroff -f"
        );
        let mut command = image.command(&cloud(), &options, &["sh", "-c", &script]);
        let ended = run_with_input(&mut command, b"typed\n");
        ended.assert_code(0);
        ended.assert_printed(&["pid 1 1 c\r\n/\r\n", &format!("line {line}\r\n")]);
    }
    let none = image.run(&cloud(), &INIT, &[]);
    none.assert_code(127);
    none.assert_printed(&["in the guest: cannot run '/sbin/init': No such file"]);
    let user = image.run(&cloud(), &["--init", "image", "-u", "ann"], &[]);
    user.assert_code(2);
    user.assert_said("cannot be used with");
}

#[test]
fn stop_has_the_image_power_off_and_exec_works_beside_its_init() {
    let image = Image::new();
    let options = [&INIT[..], &["--name", "own", "--keep", "own"]].concat();
    // The init says when it runs, and what it was told to end.
    let script = "busybox ln -sf busybox /bin/poweroff
        echo '::sysinit:/bin/sh -c \"echo ready\"
::shutdown:/bin/sh -c \"echo written >/etc/note; echo shut down\"' >/etc/inittab
        exec busybox init";
    let mut command = image.command(&cloud(), &options, &["sh", "-c", script]);
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    expect(&mut child, "ready\r\n");
    let mut exec = image.minivmm(&["exec", "own", "sh", "-c", "cat /proc/1/comm; exit 3"]);
    let ended = run(&mut exec);
    assert_eq!((ended.code(), ended.out().as_str()), (3, "busybox\n"));
    printed(
        &run(&mut image.minivmm(&["stop", "-t", "100", "own"])),
        "own\n",
    );
    let output = wait(child, common::PATIENCE);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.contains("shut down"), "{text}");
    printed(
        &image.sh(&cloud(), &["--keep", "own"], "cat /etc/note"),
        "written\n",
    );
}

#[test]
fn a_vm_that_does_not_power_off_is_stopped() {
    let image = Image::shared(true);
    let options = ["--name", "own", "--stop-timeout", "1"];
    let options = [&INIT[..], &options].concat();
    for by_signal in [false, true] {
        let script = "echo ready; exec sleep 1000";
        let mut command = image.command(&cloud(), &options, &["sh", "-c", script]);
        let mut child = command.spawn().unwrap();
        expect(&mut child, "ready\r\n");
        if by_signal {
            signal(&child, "TERM");
        } else {
            run(&mut image.minivmm(&["stop", "-t", "1", "own"])).assert_code(0);
        }
        assert_eq!(wait(child, common::PATIENCE).status.code(), Some(143));
    }
}
