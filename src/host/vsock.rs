//! The host's side of a socket device: Unix sockets, as Firecracker has them. Programs connect to one and write `CONNECT PORT` and
//! a newline; what the guest connects to at a port is the socket of the same name with `_PORT` behind it.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use minivmm_devices::virtio::vsock::{Connect, HostSide};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

use crate::config::VsockConfig;

/// Programs that may wait to be accepted, until a connect blocks.
const BACKLOG: i32 = 128;

/// Why a vsock device's socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// A process listens there.
    #[error("the socket {} is in use by another process", .0.display())]
    InUse(PathBuf),
    /// It is not overwritten.
    #[error("{} exists and is not a socket", .0.display())]
    NotSocket(PathBuf),
    /// The host refused it.
    #[error("cannot make the socket {}", .0.display())]
    Bind(PathBuf, #[source] io::Error),
}

/// The host's end of a device's socket.
#[derive(Debug)]
pub struct Socket {
    /// Its name, which is removed at its end.
    path: PathBuf,
    /// A connection to it for this process, which may not make one later: by read(2) and write(2) alone. Only if the configuration asks
    /// for it.
    pub reserved: Option<File>,
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Err(e) = fs::remove_file(&self.path) {
            log::debug!("cannot remove {}: {e}", self.path.display());
        }
    }
}

/// Listens at `path`, for this user only, and unless the guest only accepts, leads it to sockets beside that. A socket that a process has
/// left there is replaced.
pub fn open(path: &Path, config: &VsockConfig) -> Result<(HostSide, Socket), VsockError> {
    let failed = |source: io::Error| VsockError::Bind(path.to_owned(), source);
    let listener = match listen_at(path) {
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            remove_stale(path)?;
            listen_at(path)
        }
        result => result,
    };
    let listener = listener.map_err(failed)?;
    let pair = || {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        Ok((File::from(OwnedFd::from(ours)), theirs))
    };
    let pair = config.reserve.then(pair).transpose().map_err(failed)?;
    let (reserved, theirs) = pair.unzip();
    let socket = Socket {
        path: path.to_owned(),
        reserved,
    };
    let base = path.as_os_str().to_owned();
    let connect = move |port: u32| {
        let mut path: OsString = base.clone();
        path.push(format!("_{port}"));
        connect_to(Path::new(&path))
    };
    let host = HostSide {
        listener: listener.into(),
        connect: (!config.accept_only).then(|| Box::new(connect) as Connect),
        reserved: theirs,
    };
    Ok((host, socket))
}

fn new_socket() -> io::Result<OwnedFd> {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    Ok(socket_with(
        AddressFamily::UNIX,
        SocketType::STREAM,
        flags,
        None,
    )?)
}

fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let socket = new_socket()?;
    // The name gets the socket's mode, and so at no time another one.
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &SocketAddrUnix::new(path)?)?;
    if let Err(e) = listen(&socket, BACKLOG) {
        let _ = fs::remove_file(path);
        return Err(e.into());
    }
    Ok(socket)
}

/// Removes a socket at which nothing listens.
fn remove_stale(path: &Path) -> Result<(), VsockError> {
    let failed = |source: io::Error| VsockError::Bind(path.to_owned(), source);
    let metadata = fs::symlink_metadata(path).map_err(failed)?;
    if !metadata.file_type().is_socket() {
        return Err(VsockError::NotSocket(path.to_owned()));
    }
    match connect_to(path) {
        Err(e) if e.raw_os_error() == Some(Errno::CONNREFUSED.raw_os_error()) => {
            fs::remove_file(path).map_err(failed)
        }
        // Also where its backlog is full, or it is another kind of socket.
        _ => Err(VsockError::InUse(path.to_owned())),
    }
}

fn connect_to(path: &Path) -> io::Result<UnixStream> {
    let socket = new_socket()?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn the_socket_is_the_users_and_goes_with_its_vm() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let (host, file) = open(&path, &VsockConfig::default()).unwrap();
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        UnixStream::connect(&path).unwrap();
        let error = open(&path, &VsockConfig::default())
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("in use by another process"), "{error}");
        drop(file);
        assert!(!path.exists());
        drop(host);
    }

    #[test]
    fn a_socket_that_was_left_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        drop(UnixListener::bind(&path).unwrap());
        drop(open(&path, &VsockConfig::default()).unwrap());
        fs::write(&path, "text").unwrap();
        let error = open(&path, &VsockConfig::default())
            .err()
            .unwrap()
            .to_string();
        assert!(error.ends_with("exists and is not a socket"), "{error}");
        assert_eq!(fs::read(&path).unwrap(), b"text");
        for bad in [
            dir.path().join("none/v.sock"),
            dir.path().join("x".repeat(108)),
        ] {
            let error = open(&bad, &VsockConfig::default()).err().unwrap();
            assert!(matches!(error, VsockError::Bind(..)), "{error}");
        }
    }

    #[test]
    fn a_connection_is_reserved_where_it_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        for reserve in [false, true] {
            let config = VsockConfig {
                reserve,
                ..VsockConfig::default()
            };
            let (host, file) = open(&dir.path().join("v.sock"), &config).unwrap();
            assert_eq!(file.reserved.is_some(), reserve);
            let Some(mut theirs) = host.reserved else {
                assert!(!reserve);
                continue;
            };
            let error = theirs.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
            file.reserved.as_ref().unwrap().write_all(b"x").unwrap();
            assert_eq!(theirs.read(&mut [0; 2]).unwrap(), 1);
        }
    }

    #[test]
    fn the_guest_reaches_sockets_by_their_ports() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let (host, _file) = open(&path, &VsockConfig::default()).unwrap();
        let mut connect = host.connect.unwrap();
        let listener = UnixListener::bind(dir.path().join("v.sock_4294967294")).unwrap();
        drop(connect(u32::MAX - 1).unwrap());
        listener.accept().unwrap();
        assert!(connect(1).is_err());
        // A listener that accepts nothing is not waited for.
        let full = std::iter::repeat_with(|| connect(u32::MAX - 1)).take(5000);
        let kept: Vec<_> = full.map_while(Result::ok).collect();
        assert!(kept.len() < 5000, "the backlog has an end");
    }
}
