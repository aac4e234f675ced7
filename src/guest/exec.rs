//! Programs that the host runs beside the image's own: each has a connection of the socket device, for what it is and its streams.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use nix::sys::socket::{self, AddressFamily, Backlog, SockFlag, SockType, VsockAddr, bind, socket};
use rustix::net::{SocketFlags, accept_with};
use rustix::process::Pid;

use super::children::{Children, send_signal};
use super::failure::{Failure, cannot};
use super::frames::STATUS;
use super::modules;
use super::orders::{EXEC_PORT, Exec, MAX_EXEC, Orders};
use super::process;
use super::streams::Channel;

/// Connections that may wait to be accepted.
const BACKLOG: i32 = 16;
/// What is waited for descriptors or memory before one is accepted again.
const PAUSE: Duration = Duration::from_millis(10);

/// Serves the host from now on, if the kernel can, on a thread: the image's program, which has this process ID unless it is process 1, does
/// not wait for the drivers.
pub(super) fn serve(
    drivers: Vec<File>,
    orders: Arc<Orders>,
    program: Option<Pid>,
    children: Children,
) {
    thread::spawn(move || {
        for module in &drivers {
            // What is missing shows at the socket.
            let _ = modules::load(module);
        }
        let Ok(listener) = listen() else { return };
        loop {
            let Ok(connection) = accept_with(&listener, SocketFlags::CLOEXEC) else {
                thread::sleep(PAUSE);
                continue;
            };
            let (orders, children) = (Arc::clone(&orders), children.clone());
            let serve = move || run(connection.into(), &orders, program, &children);
            // Without a thread for it, the connection is closed.
            let _ = thread::Builder::new().spawn(serve);
        }
    });
}

/// Runs one program to its end, or sends the image's a signal.
fn run(mut connection: File, orders: &Orders, program: Option<Pid>, children: &Children) {
    let Ok(request) = receive(&mut connection) else {
        return;
    };
    if let Some(number) = request.signal {
        if let Some(program) = program {
            send_signal(program, number);
        }
        return;
    }
    let Ok(channel) = Channel::stream(connection) else {
        return;
    };
    let orders = orders.with(request);
    let result = process::start(&orders, &channel, children);
    let status = match result.map(|program| program.wait(|| ())) {
        Ok(status) => status,
        Err(Failure { status, text }) => {
            channel.error(format!("minivmm: error: in the guest: {text}\n").as_bytes());
            status
        }
    };
    // Its reader may be gone.
    let _ = channel.send(STATUS, &[status]);
}

/// What the host sends first: its length in four bytes, least significant first, and JSON.
fn receive(connection: &mut File) -> Result<Exec, Failure> {
    let what = "read what is to be run";
    let mut length = [0; 4];
    connection.read_exact(&mut length).map_err(cannot(what))?;
    let length = u32::from_le_bytes(length);
    if length > MAX_EXEC {
        return Err(cannot(what)("it is too long"));
    }
    let mut json = vec![0; length as usize];
    connection.read_exact(&mut json).map_err(cannot(what))?;
    serde_json::from_slice(&json).map_err(cannot(what))
}

fn listen() -> nix::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC;
    let listener = socket(AddressFamily::Vsock, SockType::Stream, flags, None)?;
    let address = VsockAddr::new(libc::VMADDR_CID_ANY, EXEC_PORT);
    bind(listener.as_raw_fd(), &address)?;
    socket::listen(&listener, Backlog::new(BACKLOG)?)?;
    Ok(listener)
}
