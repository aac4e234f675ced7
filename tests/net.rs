//! Ring 3: Linux guests on a network, through TAP devices of the machine that runs them. Like tests/linux.rs, it is run by
//! `make test`; it makes interfaces, and so needs root, which the lab has.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use common::limit::{watch, within};
use common::linux::{boot_command, kernel};
use common::tap::Tap;
use common::{PATIENCE, project, run};

/// minivmm with this network, whose guest runs a case of tests/guest/net.
fn guest(net: &str, case: &str) -> Command {
    let initramfs = project("build/net.cpio");
    let args = ["--net", net, "--initrd", initramfs.to_str().unwrap()];
    boot_command(&kernel("cloud", "bzImage"), &args, &format!("net {case}"))
}

#[test]
fn tcp_goes_both_ways_through_a_tap() {
    let _tap = Tap::new("mvtap0", 1500);
    let listener = TcpListener::bind("10.9.0.1:5000").unwrap();
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        stream.write_all(&data).unwrap();
        drop(stream);
        let connect = || {
            TcpStream::connect("10.9.0.2:6000").ok().or_else(|| {
                thread::sleep(Duration::from_millis(100));
                None
            })
        };
        let mut stream = within(PATIENCE, connect).expect("the guest listens");
        let mut again = Vec::new();
        stream.read_to_end(&mut again).unwrap();
        (data, again)
    });
    let ended = run(&mut guest("tap=mvtap0,mac=02:00:00:00:00:09", "tcp"));
    ended.assert_code(0).assert_printed(&[
        "mac 02:00:00:00:00:09 mtu 1500",
        "3 packets received",
        "echoed",
    ]);
    let (data, again) = host.join().unwrap();
    assert_eq!(data.len(), 2 << 20);
    assert!(data == again);
    // Checksums, and segments longer than the MTU, in both directions (§ 5.1.3): agreed between driver, device and TAP.
    let out = ended.out();
    let line = out.lines().find_map(|line| line.strip_prefix("features "));
    let features = line.expect("the features").as_bytes();
    for bit in [0, 1, 7, 8, 11, 12] {
        assert_eq!(features[bit], b'1', "bit {bit}: {out}");
    }
}

#[test]
fn the_guest_sees_the_mtu_and_that_the_interface_is_gone() {
    let tap = Tap::new("mvtap1", 9000);
    let mut command = guest("tap=mvtap1", "link");
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut text = String::new();
    let _watch = watch(&child);
    while !text.contains("carrier 1") {
        assert_ne!(out.read_line(&mut text).unwrap(), 0, "{text}");
    }
    drop(tap);
    stdin.write_all(b"gone\n").unwrap();
    out.read_to_string(&mut text).unwrap();
    let output = common::wait(child, PATIENCE);
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{text}{err}");
    for word in ["mtu 9000", "carrier-lost", "unreachable"] {
        assert!(text.contains(word), "no {word}: {text}{err}");
    }
    let warning = "warning: a network device has lost its link";
    assert!(err.contains(warning), "{err}");
}
