//! Landlock: which files threads may still open, and that they may not connect anywhere. It holds where a list of system calls has
//! to let a path pass.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError, Scope,
};

/// The newest version whose rights are refused, as far as the host's kernel knows them.
const NEWEST: ABI = ABI::V6;

/// Paths that are needed while a guest runs, with all that is below them.
#[derive(Debug, Default)]
pub struct Paths {
    /// To be read.
    pub read: Vec<PathBuf>,
    /// To be read and written; regular files are made and removed in directories.
    pub write: Vec<PathBuf>,
    /// Directories that sockets are made in, and removed from.
    pub sockets: Vec<PathBuf>,
}

impl Paths {
    pub(super) fn is_empty(&self) -> bool {
        self.read.is_empty() && self.write.is_empty() && self.sockets.is_empty()
    }
}

/// What a thread restricts itself with.
pub(super) struct Filesystem(OwnedFd);

impl Filesystem {
    /// Paths that do not exist get no rule; `None` where the host's kernel has no Landlock.
    pub(super) fn new(paths: &Paths) -> Result<Option<Self>, RulesetError> {
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(NEWEST))?
            .handle_access(AccessNet::from_all(NEWEST))?
            // Not signals: before Linux 6.15 those between threads of one process would go, too.
            .scope(Scope::AbstractUnixSocket)?
            .create()?;
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        let new = AccessFs::MakeReg | AccessFs::RemoveFile | AccessFs::Refer;
        let file = AccessFs::from_file(NEWEST) & !AccessFs::Execute;
        for (paths, rights) in [
            (&paths.read, read),
            (&paths.write, read | new | file),
            (&paths.sockets, AccessFs::MakeSock | AccessFs::RemoveFile),
        ] {
            for path in paths {
                let Ok(fd) = PathFd::new(path) else { continue };
                let rights: BitFlags<AccessFs> = if path.is_dir() {
                    rights
                } else {
                    rights & AccessFs::from_file(NEWEST)
                };
                ruleset = ruleset.add_rule(PathBeneath::new(fd, rights))?;
            }
        }
        Ok(Option::<OwnedFd>::from(ruleset).map(Self))
    }

    /// Restricts the calling thread, which cannot gain privileges any more, and threads that it starts.
    #[allow(unsafe_code, reason = "the crate would duplicate the descriptor")]
    pub(super) fn restrict(&self) -> io::Result<()> {
        // SAFETY: it takes two numbers.
        match unsafe { libc::syscall(libc::SYS_landlock_restrict_self, self.0.as_raw_fd(), 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The version of the kernel's Landlock, `None` where it has none or it is off.
#[allow(unsafe_code, reason = "the crate does not tell it")]
pub fn landlock_version() -> Option<u32> {
    const LANDLOCK_CREATE_RULESET_VERSION: u32 = 1;
    let none = std::ptr::null::<libc::c_void>();
    // SAFETY: with this flag, the kernel is given no attributes.
    let version = unsafe {
        libc::syscall(
            libc::SYS_landlock_create_ruleset,
            none,
            0,
            LANDLOCK_CREATE_RULESET_VERSION,
        )
    };
    u32::try_from(version).ok()
}
