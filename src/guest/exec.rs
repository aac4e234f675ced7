//! Programs that the host runs beside the image's own: each has a connection of the socket device, for what it is and its streams.
#![allow(
    unsafe_code,
    reason = "there is no safe interface for addresses of vsock(7)"
)]

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;
use std::thread;

use super::children::Children;
use super::failure::{Failure, cannot};
use super::frames::STATUS;
use super::modules;
use super::orders::{EXEC_PORT, Exec, MAX_EXEC, Orders};
use super::process;
use super::streams::Channel;

/// Connections that may wait to be accepted.
const BACKLOG: libc::c_int = 16;

/// Serves the host from now on, if the kernel can, on a thread: the image's program does not wait for the drivers.
pub(super) fn serve(drivers: Vec<File>, orders: Arc<Orders>, children: Children) {
    thread::spawn(move || {
        for module in &drivers {
            // What is missing shows at the socket.
            let _ = modules::load(module);
        }
        let Ok(listener) = listen() else { return };
        while let Ok(connection) = accept(&listener) {
            let (orders, children) = (Arc::clone(&orders), children.clone());
            thread::spawn(move || run(connection, &orders, &children));
        }
    });
}

/// Runs one program to its end.
fn run(mut connection: File, orders: &Orders, children: &Children) {
    let Ok(request) = receive(&mut connection) else {
        return;
    };
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

fn listen() -> io::Result<OwnedFd> {
    // SAFETY: it takes no pointers.
    let socket = unsafe {
        let kind = libc::SOCK_STREAM | libc::SOCK_CLOEXEC;
        libc::socket(libc::AF_VSOCK, kind, 0)
    };
    let socket = owned(socket)?;
    // SAFETY: an all-zero sockaddr_vm is a valid value.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = libc::VMADDR_CID_ANY;
    address.svm_port = EXEC_PORT;
    let length = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the kernel reads an address of this length, which lives until the call returns.
    let bound = unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), length) };
    // SAFETY: it takes no pointers.
    if bound != 0 || unsafe { libc::listen(socket.as_raw_fd(), BACKLOG) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(socket)
}

fn accept(listener: &OwnedFd) -> io::Result<File> {
    let none = std::ptr::null_mut();
    // SAFETY: without an address, it takes no pointers.
    let fd = unsafe {
        let fd = listener.as_raw_fd();
        libc::accept4(fd, none, std::ptr::null_mut(), libc::SOCK_CLOEXEC)
    };
    owned(fd).map(File::from)
}

fn owned(fd: libc::c_int) -> io::Result<OwnedFd> {
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nothing else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
