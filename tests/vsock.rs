//! Ring 3: Linux guests with streams between their programs and the host's. Like tests/linux.rs, it is run by `make test`.

mod common;

use std::io::{self, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Instant;

use common::limit::within;
use common::linux::{boot_command, has_kernel, kernel, rounds};
use common::{PATIENCE, minivmm, project, run};
use tempfile::TempDir;

/// A guest's socket, in a directory of its own.
struct Sockets(TempDir);

impl Sockets {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("v.sock")
    }

    fn option(&self) -> String {
        format!("path={}", self.path().display())
    }

    /// What the guest reaches at this port.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(format!("{}_{port}", self.path().display())).unwrap()
    }

    /// minivmm, whose guest runs a case of tests/guest/vsock.
    fn guest(&self, kernel: &str, case: &str) -> Command {
        let initramfs = project("build/vsock.cpio");
        let option = self.option();
        let args = ["--vsock", &option, "--initrd", initramfs.to_str().unwrap()];
        boot_command(kernel, &args, &format!("vsock {case}"))
    }
}

/// An unchanged client of Firecracker's protocol has so many bytes echoed on each of so many connections at once, and then fewer by a server
/// that waits for the end of each: the host has closed its direction before the guest sends.
#[track_caller]
fn expect_echoes(kernel: &str, connections: usize, size: usize) {
    let sockets = Sockets::new();
    let child = sockets.guest(kernel, "serve").spawn().unwrap();
    let path = sockets.path();
    assert!(within(PATIENCE, || path.exists().then_some(())).is_some());
    let clients = [("5000", connections, size), ("5002", 4, 256 << 10)].map(|client| {
        let (port, connections, size) = client;
        let start = Instant::now();
        let output = Command::new("python3")
            .arg(project("tests/vsock.py"))
            .arg(&path)
            .args([port, &connections.to_string(), &size.to_string()])
            .output()
            .expect("python3");
        println!("{connections} x {size} bytes: {:?}", start.elapsed());
        (client, output)
    });
    let asked = end(&path);
    let output = common::wait(child, PATIENCE);
    for ((_, connections, size), client) in clients {
        let wanted = format!("{connections} of {connections} echoed {size} bytes\n");
        let out = String::from_utf8_lossy(&client.stdout);
        assert_eq!(out, wanted, "{client:?}\n{output:?}");
    }
    assert!(asked.is_ok(), "{asked:?}\n{output:?}");
    assert_eq!(output.status.code(), Some(7), "{output:?}");
    assert!(!path.exists());
}

/// A connection to this port ends the guest with status 7.
fn end(path: &Path) -> io::Result<()> {
    let mut stream = UnixStream::connect(path)?;
    stream.write_all(b"CONNECT 5001\n")?;
    _ = stream.read(&mut [0; 32]);
    Ok(())
}

#[test]
fn a_client_of_firecrackers_has_much_echoed_on_many_connections() {
    expect_echoes(&kernel("cloud", "bzImage"), 64, rounds(256 << 10, 8 << 20));
}

#[test]
fn small_kernel_echoes() {
    if has_kernel("small") {
        expect_echoes(&kernel("small", "bzImage"), 64, 32 << 10);
    }
}

/// The guest sends all and closes its direction, before the host begins; then the other way round.
#[test]
fn the_guest_reaches_a_socket_of_the_host() {
    let sockets = Sockets::new();
    let listener = sockets.listen(52);
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut data = Vec::new();
        stream.read_to_end(&mut data).unwrap();
        stream.write_all(&data).unwrap();
        data.len()
    });
    let ended = run(&mut sockets.guest(&kernel("cloud", "bzImage"), "connect"));
    ended.assert_code(0);
    ended.assert_printed(&["echoed", "nothing listens there", "refused"]);
    assert_eq!(host.join().unwrap(), 2 << 20);
}

/// Saved in the middle of a stream, the guest sees it reset, and can connect again.
#[test]
fn a_restored_guest_has_new_connections() {
    let (sockets, again) = (Sockets::new(), Sockets::new());
    let snapshot = sockets.0.path().join("snapshot");
    let listener = sockets.listen(52);
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(b"go on").unwrap();
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap_or(0)
    });
    let at = format!("7={},exit", snapshot.display());
    let mut command = sockets.guest(&kernel("cloud", "bzImage"), "restore");
    run(command.args(["--snapshot-at", &at])).assert_code(0);
    host.join().unwrap();
    let listener = again.listen(52);
    let host = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).unwrap();
        stream.write_all(b"welcome back\n").unwrap();
        text
    });
    let option = again.option();
    let ended = run(minivmm(&["restore"])
        .arg(&snapshot)
        .args(["--vsock", &option]));
    ended.assert_code(0);
    ended.assert_printed(&["the connection was reset", "ended 1", "welcome back"]);
    assert_eq!(host.join().unwrap(), "again\n");
}
