//! What is known of one runtime while the comparison runs.

use std::path::PathBuf;
use std::time::Duration;

use super::image::{Image, VmImage};
use super::report::RowReport;
use super::runtime::{Job, Runtime};
use crate::tools::measure::{self, Summary};

/// A runtime, the times of its runs, and what else was found.
pub(super) struct Row {
    pub(super) runtime: Runtime,
    pub(super) program: PathBuf,
    /// To the first output and to the end, with all in the page cache.
    pub(super) warm: [Vec<Duration>; 2],
    /// The same after the page cache was dropped.
    pub(super) cold: [Vec<Duration>; 2],
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
            warm: Default::default(),
            cold: Default::default(),
            report: RowReport {
                name: runtime.name().into(),
                is_vm,
                version: runtime.version(&program),
                command: measure::shown(&command),
                image_bytes: match runtime {
                    Runtime::Minivmm => vm.initramfs_bytes,
                    // Not there yet.
                    Runtime::Restored => 0,
                    _ => vm.content_bytes,
                },
                kernel_bytes: match runtime {
                    Runtime::Minivmm => vm.kernel.metadata().map_or(0, |file| file.len()),
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

    /// With what was measured.
    pub(super) fn report(self) -> RowReport {
        let [warm_first_output, warm_end] = self.warm.map(|times| Summary::new(&times));
        let [cold_first_output, cold_end] = self.cold.map(|times| Summary::new(&times));
        RowReport {
            warm_first_output,
            warm_end,
            cold_first_output,
            cold_end,
            ..self.report
        }
    }
}
