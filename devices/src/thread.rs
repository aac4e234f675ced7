//! Threads of a VM: the one way to start them, and the hook that contains each of them.

use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

/// Stack of a thread in bytes: 256 KiB. Of std's 2 MiB, a host that gives huge pages to everybody
/// (transparent_hugepage=always) makes one, and clears it, for each thread.
pub const STACK_SIZE: usize = 256 << 10;

/// What a thread does, and so what it may ask the host for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Runs a vCPU.
    Vcpu,
    /// Writes the console's output.
    Console,
    /// Serves queues of a disk.
    Block,
    /// Serves the entropy device's queue.
    Rng,
    /// Serves a network device's queues.
    Net,
    /// Serves a socket device's queues.
    Vsock,
    /// Does so, and connects the guest to sockets of the host.
    VsockConnect,
}

/// Starts threads. Each one runs the hook before anything else, on itself: that is where a sandbox confines it.
#[derive(Clone, Default)]
pub struct ThreadStarter(Option<Hook>);

type Hook = Arc<dyn Fn(ThreadKind) + Send + Sync>;

impl ThreadStarter {
    /// Threads that run `hook` first.
    pub fn new(hook: impl Fn(ThreadKind) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    /// Runs the hook on the calling thread, which becomes one of this kind.
    pub fn adopt(&self, kind: ThreadKind) {
        if let Some(hook) = &self.0 {
            hook(kind);
        }
    }

    /// Starts a thread named `name` (15 bytes of it show in /proc).
    pub fn spawn<T: Send + 'static>(
        &self,
        kind: ThreadKind,
        name: String,
        run: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        let starter = self.clone();
        Builder::new()
            .name(name)
            .stack_size(STACK_SIZE)
            .spawn(move || {
                starter.adopt(kind);
                run()
            })
    }
}
