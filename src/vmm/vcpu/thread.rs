//! A thread for the boot vCPUs of VMs that run one after the other.

use std::sync::mpsc::{SyncSender, sync_channel};

use minivmm_devices::thread::{ThreadKind, ThreadStarter};

use super::{Job, TakeJob, Vcpu, VcpuError};

/// A thread that is confined once, which takes longer than to make it, and then does one job after the other. It ends when this is
/// dropped.
pub struct VcpuThread(SyncSender<(Job, SyncSender<Vcpu>)>);

impl VcpuThread {
    /// Starts it.
    pub fn start(threads: &ThreadStarter) -> Result<Self, VcpuError> {
        let (jobs, taken) = sync_channel::<(Job, SyncSender<Vcpu>)>(1);
        let work = move || {
            for (job, done) in taken {
                // The giver of the job waits for its end, but for a panic.
                let _ = done.send(job());
            }
        };
        threads
            .spawn(ThreadKind::Vcpu, "vcpu0".to_owned(), work)
            .map_err(|source| VcpuError::Thread(0, source))?;
        Ok(Self(jobs))
    }

    /// What gives it its next job. The VM before must have ended.
    pub fn take_job(&self) -> TakeJob {
        let jobs = self.0.clone();
        Box::new(move |job| {
            let (done, result) = sync_channel(1);
            // It takes jobs as long as one can be given.
            let _ = jobs.send((job, done));
            Box::new(move || result.recv().ok())
        })
    }
}
