//! The VMs of images that run now: a directory for each, in the user's runtime directory, with a file that is locked as long as its VM
//! runs, and the socket by which its guest is reached. What a VM leaves there, the next one removes.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use crate::about;
use crate::guest::{EXEC_PORT, Exec};
use crate::host::ownership::{is_at, open_own_dir};

/// Longest name in bytes.
const MAX_NAME: usize = 32;
const INFO: &str = "vm.json";
const SOCKET: &str = "vsock";
/// How long a guest may take to read or to answer, and when it is asked again where it does not listen.
const PATIENCE: Duration = Duration::from_secs(10);
const RETRY: Duration = Duration::from_millis(20);
/// Longest answer in bytes.
const MAX_ANSWER: usize = 32;

/// What is known of a VM that runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Info {
    /// Its image.
    pub image: String,
    /// Its program, for people.
    pub command: String,
    /// Whether that is process 1, to which signals do not go.
    pub is_init: bool,
    /// The signal that asks it to end, if that is not SIGTERM.
    pub stop_signal: Option<u8>,
    /// The process that is its VMM.
    pub pid: i32,
}

/// A VM that runs, or that did when it was looked for.
#[derive(Debug)]
pub struct Vm {
    /// Its name.
    pub name: String,
    /// What is known of it.
    pub info: Info,
    /// When it was started.
    pub started: SystemTime,
    dir: PathBuf,
}

/// A name that is this process's as long as this lives.
#[derive(Debug)]
pub struct Claim {
    dir: PathBuf,
    _lock: File,
}

/// All of the user's VMs.
#[derive(Debug)]
pub struct Running(PathBuf);

impl Running {
    /// Opens the directory, and makes it if it is not there: in $XDG_RUNTIME_DIR or else below `cache`,
    /// if there is one.
    pub fn open(cache: Option<&Path>) -> io::Result<Self> {
        let runtime = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
        let runtime = runtime.filter(|dir| dir.is_absolute());
        let dir = match (runtime, cache) {
            (Some(runtime), _) => runtime.join("minivmm"),
            (None, Some(cache)) => cache.join("run"),
            (None, None) => {
                return Err(io::Error::other(
                    "there is no place for it: set XDG_RUNTIME_DIR or HOME",
                ));
            }
        };
        open_own_dir(&dir).map_err(about(dir.display()))?;
        Ok(Self(dir))
    }

    /// Takes a name for a VM of this process.
    pub fn claim(&self, name: &str, info: &Info) -> io::Result<Claim> {
        check_name(name)?;
        let _guard = lock(&self.0)?;
        let dir = self.0.join(name);
        match DirBuilder::new().mode(0o700).create(&dir) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        options.custom_flags(libc::O_NOFOLLOW);
        let path = dir.join(INFO);
        let mut file = loop {
            let file = options.open(&path)?;
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Err(Errno::WOULDBLOCK) => {
                    let why = format!("a VM with the name '{name}' is running");
                    return Err(io::Error::other(why));
                }
                locked => locked?,
            }
            // A VM that ends removes its file: a lock on that would keep nobody out.
            if is_at(&file, &path) {
                break file;
            }
        };
        file.set_len(0)?;
        file.write_all(&serde_json::to_vec(info)?)?;
        // What VMs have left that have ended: their sandbox does not let them remove it.
        for entry in fs::read_dir(&self.0)? {
            let other = entry?.file_name();
            if other.to_str().is_some_and(|o| is_name(o) && o != name) {
                remove_if_over(&self.0.join(other))?;
            }
        }
        Ok(Claim { dir, _lock: file })
    }

    /// Those that run, by name. What others have left is removed.
    pub fn list(&self) -> io::Result<Vec<Vm>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.0)? {
            let name = entry?.file_name();
            if let Some(name) = name.to_str().filter(|name| is_name(name)) {
                found.extend(self.find(name)?);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The one with this name, if it runs.
    pub fn find(&self, name: &str) -> io::Result<Option<Vm>> {
        let dir = self.0.join(name);
        if !is_name(name) || is_over(&dir)? {
            return Ok(None);
        }
        let mut file = match File::open(dir.join(INFO)) {
            // It has just ended.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file?,
        };
        let mut json = Vec::new();
        file.read_to_end(&mut json)?;
        // A VM that has just taken its name has not written it yet.
        let Ok(info) = serde_json::from_slice(&json) else {
            return Ok(None);
        };
        Ok(Some(Vm {
            name: name.to_owned(),
            info,
            started: file.metadata()?.modified()?,
            dir,
        }))
    }
}

impl Claim {
    /// Where the socket device listens.
    pub fn socket(&self) -> PathBuf {
        self.dir.join(SOCKET)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        // The sandbox does not let the directory be removed: the next VM does it.
        let _ = fs::remove_file(self.dir.join(INFO));
    }
}

impl Vm {
    /// Has its guest start a program, whose streams are the connection's, and waits no longer than `limit` until the guest listens.
    pub fn start(&self, exec: &Exec, limit: Duration) -> io::Result<UnixStream> {
        let message = exec.message()?;
        let mut guest = self.connect(limit)?;
        guest.write_all(&message)?;
        Ok(guest)
    }

    /// Connects to the program that serves in the guest (Firecracker's protocol for vsock).
    fn connect(&self, limit: Duration) -> io::Result<UnixStream> {
        let patience = limit.clamp(RETRY, PATIENCE);
        let limit = Instant::now() + limit;
        loop {
            use io::ErrorKind::{ConnectionRefused, NotFound};
            let mut guest = match UnixStream::connect(self.dir.join(SOCKET)) {
                // It has its name before it is made, and longer than its sockets.
                Err(e) if [NotFound, ConnectionRefused].contains(&e.kind()) => {
                    if self.has_ended()? {
                        return Err(io::Error::other("the VM has ended"));
                    }
                    if Instant::now() > limit {
                        return Err(io::Error::other("it is still being started"));
                    }
                    thread::sleep(RETRY);
                    continue;
                }
                connected => connected?,
            };
            guest.set_write_timeout(Some(patience))?;
            guest.set_read_timeout(Some(patience))?;
            guest.write_all(format!("CONNECT {EXEC_PORT}\n").as_bytes())?;
            // A line, or the end, where nothing listens.
            let mut byte = [0];
            for _ in 0..MAX_ANSWER {
                if guest.read_exact(&mut byte).is_err() {
                    break;
                }
                if byte == *b"\n" {
                    guest.set_read_timeout(None)?;
                    return Ok(guest);
                }
            }
            if Instant::now() > limit {
                let why = "its guest does not listen: its kernel may have no driver for vsock";
                return Err(io::Error::other(why));
            }
            thread::sleep(RETRY);
        }
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> io::Result<bool> {
        is_over(&self.dir)
    }

    /// Sends its VMM a signal, if it has not ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let pid = Pid::from_raw(self.info.pid);
        let pid = pid.ok_or_else(|| io::Error::other("there is no such process ID"))?;
        let process = match pidfd_open(pid, PidfdFlags::empty()) {
            Err(Errno::SRCH) => return Ok(()),
            process => process?,
        };
        // As long as the lock is held, the process ID is that of its holder.
        if !self.has_ended()? {
            pidfd_send_signal(process, signal)?;
        }
        Ok(())
    }
}

/// Keeps other processes from taking names in this directory, and from removing what has been left, as long as it lives.
pub(super) fn lock(runtime: &Path) -> io::Result<File> {
    let file = File::open(runtime)?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Whether no process has the lock of this directory, which is removed then.
fn is_over(dir: &Path) -> io::Result<bool> {
    let _guard = dir.parent().map(lock).transpose()?;
    remove_if_over(dir)
}

/// The same, for a caller that has [`lock`]ed the directory of all.
fn remove_if_over(dir: &Path) -> io::Result<bool> {
    let file = match File::open(dir.join(INFO)) {
        Ok(file) => file,
        // Also what was not finished.
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            let _ = fs::remove_dir(dir);
            return Ok(true);
        }
        Err(e) => return Err(e),
    };
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Ok(false),
        Err(e) => Err(e.into()),
        Ok(()) => {
            let _ = fs::remove_dir_all(dir);
            Ok(true)
        }
    }
}

/// Refuses what is no name, as invalid input.
pub(super) fn check_name(name: &str) -> io::Result<()> {
    if is_name(name) {
        return Ok(());
    }
    let why = format!("'{name}' is no name: write up to {MAX_NAME} letters, digits, '.', '_', '-'");
    Err(io::Error::new(io::ErrorKind::InvalidInput, why))
}

/// Whether a VM may be called so: it is the name of a directory, too.
fn is_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.len() <= MAX_NAME
        && name.chars().all(good)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_taken_as_long_as_its_claim_lives() {
        let dir = tempfile::tempdir().unwrap();
        let running = Running(dir.path().to_owned());
        let info = Info {
            image: "busybox".into(),
            command: "sh".into(),
            is_init: false,
            stop_signal: None,
            pid: 1,
        };
        // What a process has left that was killed.
        fs::create_dir(dir.path().join("d")).unwrap();
        fs::write(dir.path().join("d").join(INFO), "{}").unwrap();
        fs::create_dir(dir.path().join("e")).unwrap();
        let claim = running.claim("a", &info).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        let error = running.claim("a", &info).unwrap_err().to_string();
        assert!(error.contains("name 'a' is running"), "{error}");
        let vm = running.find("a").unwrap().unwrap();
        assert_eq!((vm.info.pid, vm.dir.join(SOCKET)), (1, claim.socket()));
        fs::create_dir(dir.path().join("b")).unwrap();
        fs::write(dir.path().join("b").join(INFO), "{}").unwrap();
        fs::create_dir(dir.path().join("c")).unwrap();
        let names: Vec<_> = running
            .list()
            .unwrap()
            .into_iter()
            .map(|vm| vm.name)
            .collect();
        assert_eq!(names, ["a"]);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        drop(claim);
        assert!(vm.has_ended().unwrap() && running.find("a").unwrap().is_none());
        // One that ends while another takes its name removes its file, and not the new one's lock.
        let file = File::create(dir.path().join("old")).unwrap();
        assert!(is_at(&file, &dir.path().join("old")));
        fs::remove_file(dir.path().join("old")).unwrap();
        assert!(!is_at(&file, &dir.path().join("old")));
        for bad in ["", "../x", ".x", "a/b", &"x".repeat(33)] {
            assert!(running.claim(bad, &info).is_err(), "{bad}");
            assert!(running.find(bad).unwrap().is_none());
        }
    }
}
