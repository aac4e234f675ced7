//! What a thread of a running VM can still ask of the host: the little that it needs.
//!
//! Each thread confines itself before it does anything for a guest, and the main thread just before the guest's first instruction,
//! when everything is open. A guest that takes over a thread finds there: no new privileges, no capabilities, no files to
//! open (Landlock), and no system calls but those in the table of rules.rs. A call that is not there raises SIGSYS; what that does
//! is the program's business, and [`Call`] puts it in words.

mod capabilities;
mod filesystem;
mod filter;
mod refusal;
mod rules;
mod seccomp;
mod supervisor;

use std::io;
use std::sync::Once;

use minivmm_devices::thread::ThreadKind;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{CapabilitySet, set_no_new_privs};

pub use filesystem::{Paths, landlock_version};
pub use refusal::Call;
pub use rules::Role;

use crate::config::SandboxMode;
use filesystem::Filesystem;
use seccomp::Refusal;
use supervisor::Supervisor;

/// Why there is no sandbox.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The host's kernel lacks a part of it, which was demanded.
    #[error("the host's kernel lacks {0}, and the sandbox is required")]
    Missing(&'static str),
    /// Landlock refused a rule.
    #[error("cannot set up the sandbox: Landlock")]
    Landlock(#[from] landlock::RulesetError),
    /// The kernel refused a step.
    #[error("cannot set up the sandbox: {0}")]
    Refused(&'static str, #[source] io::Error),
}

fn refused<E: Into<io::Error>>(step: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |source| SandboxError::Refused(step, source.into())
}

/// Whether the host's kernel can filter a thread's system calls.
pub fn has_seccomp() -> bool {
    seccomp::is_available(Refusal::Signal)
}

/// The sandbox of a VM.
pub struct Sandbox {
    mode: SandboxMode,
    main: Role,
    /// What the main thread needs to open files again as a privileged user could.
    kept: CapabilitySet,
    has_seccomp: bool,
    /// No file at all: for the main thread only if it needs none.
    no_files: Option<Filesystem>,
    supervisor: Option<Supervisor>,
    main_confined: Once,
}

impl Sandbox {
    /// Gets ready to confine the threads of a VM. `main` is what the main thread does.
    pub fn new(mode: SandboxMode, main: Role) -> Result<Self, SandboxError> {
        let mut kept = CapabilitySet::empty();
        if main == Role::Restart {
            kept |= CapabilitySet::DAC_OVERRIDE | CapabilitySet::DAC_READ_SEARCH;
        }
        let mut sandbox = Self {
            mode,
            main,
            kept,
            has_seccomp: false,
            no_files: None,
            supervisor: None,
            main_confined: Once::new(),
        };
        match mode {
            SandboxMode::Off => {}
            SandboxMode::Strict => {
                sandbox.has_seccomp = has_seccomp();
                sandbox.no_files = Filesystem::new(&Paths::default())?;
            }
            SandboxMode::Log => {
                sandbox.has_seccomp = seccomp::is_available(Refusal::Notify);
                sandbox.supervisor = Some(Supervisor::start().map_err(refused("a thread"))?);
            }
        }
        Ok(sandbox)
    }

    /// What the host's kernel lacks of it.
    pub fn missing(&self) -> impl Iterator<Item = &'static str> {
        let seccomp = self.mode != SandboxMode::Off && !self.has_seccomp;
        let landlock = self.mode == SandboxMode::Strict && self.no_files.is_none();
        let missing = [seccomp.then_some("seccomp"), landlock.then_some("Landlock")];
        missing.into_iter().flatten()
    }

    /// Confines the calling thread, one of the VM.
    pub fn confine(&self, kind: ThreadKind) -> Result<(), SandboxError> {
        self.confine_as(
            Role::Of(kind),
            self.no_files.as_ref(),
            CapabilitySet::empty(),
        )
    }

    /// Confines the main thread, and with it the process, the first time that it is called. The thread keeps its access to `paths`.
    pub fn confine_main(&self, paths: impl FnOnce() -> Paths) -> Result<(), SandboxError> {
        let mut result = Ok(());
        self.main_confined
            .call_once(|| result = self.confine_process(paths));
        result
    }

    fn confine_process(&self, paths: impl FnOnce() -> Paths) -> Result<(), SandboxError> {
        let mut filesystem = None;
        if self.mode == SandboxMode::Strict {
            let paths = paths();
            if !paths.is_empty() {
                filesystem = Filesystem::new(&paths)?;
            }
            // No process of the same user can trace this one or read its memory, and it leaves no core dump.
            set_dumpable_behavior(DumpableBehavior::NotDumpable)
                .map_err(refused("PR_SET_DUMPABLE"))?;
        }
        let filesystem = filesystem.as_ref().or(self.no_files.as_ref());
        self.confine_as(self.main, filesystem, self.kept)
    }

    fn confine_as(
        &self,
        role: Role,
        filesystem: Option<&Filesystem>,
        keep: CapabilitySet,
    ) -> Result<(), SandboxError> {
        if self.mode == SandboxMode::Off {
            return Ok(());
        }
        // No program that this process executes gets more rights, as one with the set-user-ID bit would. Filters demand it.
        set_no_new_privs(true).map_err(refused("PR_SET_NO_NEW_PRIVS"))?;
        if let Some(filesystem) = filesystem {
            filesystem
                .restrict()
                .map_err(refused("landlock_restrict_self"))?;
        }
        let refusal = match self.mode {
            SandboxMode::Log => Refusal::Notify,
            _ => {
                capabilities::drop_all_but(keep).map_err(refused("capset"))?;
                Refusal::Signal
            }
        };
        if self.has_seccomp {
            let listener = seccomp::install(role, refusal).map_err(refused("seccomp"))?;
            if let (Some(listener), Some(supervisor)) = (listener, &self.supervisor) {
                supervisor.watch(listener);
            }
        }
        Ok(())
    }
}
