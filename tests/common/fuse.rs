//! A file system whose server can stop answering, as that of a network can: FUSE (Linux, include/uapi/linux/fuse.h), with one
//! file. Needs root.

use std::ffi::CString;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::skip::skip;

/// Length of its file.
pub(crate) const LEN: u64 = 8 << 30;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const FSYNC: u32 = 20;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;

/// Nodes: the directory, and the file in it.
const ROOT: u64 = 1;
const DISK: u64 = 2;

const IN_HEADER: usize = 40;

/// What the server does about reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Mode {
    /// It answers them: the file has zeroes.
    Answers,
    /// It takes them, and never answers: a server that waits for its network. Other requests are answered.
    Holds,
    /// It is stuck in the first one, and takes no request any more, whatever it is.
    Deaf,
    /// It fails them, those that it has taken as well.
    Fails,
    /// It answers them, and fails to make the file durable.
    NotDurable,
}

pub(crate) struct Fuse {
    dir: tempfile::TempDir,
    mode: Arc<AtomicU8>,
    /// Reads that it has not answered.
    asked: Arc<AtomicUsize>,
    server: Option<JoinHandle<()>>,
}

const END: u8 = u8::MAX;

impl Fuse {
    /// `None`, and the test is skipped, where FUSE cannot be mounted.
    pub(crate) fn mount() -> Option<Self> {
        let fuse = File::options().read(true).write(true).open("/dev/fuse");
        let dir = tempfile::tempdir().unwrap();
        let mounted = fuse.and_then(|fuse| {
            let fd = fuse.as_raw_fd();
            let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
            let options = CString::new(options)?;
            let flags = MountFlags::empty();
            mount("minivmm-test", dir.path(), "fuse", flags, &*options)?;
            Ok(fuse)
        });
        let fuse = match mounted {
            Ok(fuse) => fuse,
            Err(e) => {
                skip(&format!("cannot mount FUSE here: {e}"));
                return None;
            }
        };
        let mode = Arc::new(AtomicU8::new(Mode::Answers as u8));
        let asked = Arc::new(AtomicUsize::new(0));
        let shared = (Arc::clone(&mode), Arc::clone(&asked));
        let server = thread::spawn(move || serve(&fuse, &shared.0, &shared.1));
        Some(Self {
            dir,
            mode,
            asked,
            server: Some(server),
        })
    }

    pub(crate) fn disk(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    pub(crate) fn is_hung(&self) -> bool {
        self.asked.load(Ordering::SeqCst) > 0
    }

    pub(crate) fn set(&self, mode: Mode) {
        self.mode.store(mode as u8, Ordering::SeqCst);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        self.mode.store(END, Ordering::SeqCst);
        // With the server's file closed, every request has failed, so that no process hangs on it.
        if let Some(server) = self.server.take() {
            _ = server.join();
        }
        _ = unmount(self.dir.path(), UnmountFlags::DETACH);
    }
}

fn serve(mut fuse: &File, mode: &AtomicU8, asked: &AtomicUsize) {
    let mut request = vec![0; 2 << 20];
    let mut held = Vec::new();
    loop {
        let now = mode.load(Ordering::SeqCst);
        if now == END {
            return;
        }
        if now == Mode::Deaf as u8 && asked.load(Ordering::SeqCst) > 0 {
            thread::sleep(Duration::from_millis(5));
            continue;
        }
        if now == Mode::Fails as u8 {
            for unique in held.drain(..) {
                answer(fuse, unique, Err(rustix::io::Errno::IO));
            }
        }
        let limit = Timespec {
            tv_sec: 0,
            tv_nsec: 5_000_000,
        };
        match poll(&mut [PollFd::new(fuse, PollFlags::IN)], Some(&limit)) {
            Ok(0) => continue,
            _ if fuse.read(&mut request).is_ok_and(|len| len >= IN_HEADER) => {}
            _ => continue,
        }
        // It may have changed while there was no request.
        let now = mode.load(Ordering::SeqCst);
        let word = |at: usize| u32::from_le_bytes(request[at..at + 4].try_into().unwrap());
        let long = |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().unwrap());
        let (opcode, unique, node) = (word(4), long(8), long(16));
        match opcode {
            FORGET | BATCH_FORGET | INTERRUPT => {}
            READ if now == Mode::Holds as u8 || now == Mode::Deaf as u8 => {
                held.push(unique);
                asked.fetch_add(1, Ordering::SeqCst);
            }
            // Version 7.31, reads that do not wait for one another, up to 1 MiB at once.
            INIT => answer(
                fuse,
                unique,
                Ok(words(&[7, 31, 1 << 20, 1, 0, 1 << 20, 1, 256])),
            ),
            LOOKUP => {
                let entry = [&DISK.to_le_bytes()[..], &[0; 32], &attributes(DISK)].concat();
                answer(fuse, unique, Ok(padded(entry, 128)));
            }
            GETATTR => answer(fuse, unique, Ok([vec![0; 16], attributes(node)].concat())),
            OPEN => answer(fuse, unique, Ok(vec![0; 16])),
            FSYNC if now == Mode::NotDurable as u8 => {
                answer(fuse, unique, Err(rustix::io::Errno::IO));
            }
            READ if now == Mode::Answers as u8 || now == Mode::NotDurable as u8 => {
                let len = word(IN_HEADER + 16) as usize;
                answer(fuse, unique, Ok(vec![0; len]));
            }
            READ => answer(fuse, unique, Err(rustix::io::Errno::IO)),
            _ => answer(fuse, unique, Err(rustix::io::Errno::NOSYS)),
        }
    }
}

fn words(words: &[u32]) -> Vec<u8> {
    padded(
        words.iter().flat_map(|word| word.to_le_bytes()).collect(),
        64,
    )
}

fn padded(mut bytes: Vec<u8>, len: usize) -> Vec<u8> {
    bytes.resize(len, 0);
    bytes
}

/// `struct fuse_attr`.
fn attributes(node: u64) -> Vec<u8> {
    let (mode, len): (u32, u64) = if node == ROOT {
        (0o40755, 0)
    } else {
        (0o100_644, LEN)
    };
    let mut bytes = [node, len, 0, 0, 0, 0].map(u64::to_le_bytes).concat();
    bytes.extend([0, 0, 0, mode, 1].map(u32::to_le_bytes).concat());
    padded(bytes, 88)
}

fn answer(mut fuse: &File, unique: u64, result: Result<Vec<u8>, rustix::io::Errno>) {
    let (error, body) = match result {
        Ok(body) => (0, body),
        Err(errno) => (-errno.raw_os_error(), Vec::new()),
    };
    let mut reply = (16 + body.len() as u32).to_le_bytes().to_vec();
    reply.extend(error.to_le_bytes());
    reply.extend(unique.to_le_bytes());
    reply.extend(body);
    // A request that was broken off meanwhile has no answer.
    _ = fuse.write(&reply);
}
