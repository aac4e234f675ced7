//! What is known of one runtime while the comparison runs.

use std::path::PathBuf;

use super::image::{Image, VmImage};
use super::report::RowReport;
use super::runtime::{Job, Runtime};
use crate::tools::measure;

/// A runtime, and what was found.
pub(super) struct Row {
    pub(super) runtime: Runtime,
    pub(super) program: PathBuf,
    pub(super) report: RowReport,
}

impl Row {
    /// Without runs.
    pub(super) fn new(runtime: Runtime, program: PathBuf, image: &Image, vm: &VmImage) -> Self {
        let is_vm = runtime.is_vm();
        let (programs, programs_bytes) = runtime.shipped();
        let command = runtime.command(&program, image, vm, Job::Command);
        Self {
            runtime,
            report: RowReport {
                name: runtime.name().into(),
                is_vm,
                version: runtime.version(&program),
                command: measure::shown(&command),
                image_bytes: match runtime {
                    Runtime::Minivmm => vm.initramfs_bytes,
                    // Not there yet.
                    Runtime::Restored => 0,
                    Runtime::Run { .. } => vm.stored.bytes,
                    _ => vm.content_bytes,
                },
                kernel_bytes: match runtime {
                    Runtime::Minivmm | Runtime::Run { .. } => {
                        vm.config.kernel.metadata().map_or(0, |file| file.len())
                    }
                    // A snapshot has it in its memory.
                    _ => 0,
                },
                programs_bytes,
                programs,
                shares: runtime.shares().into(),
                ..RowReport::default()
            },
            program,
        }
    }
}
