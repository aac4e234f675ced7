//! What runs the command: minivmm and the container runtimes, each by its own command line.

use std::ffi::OsString;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::image::{ENVIRONMENT, Image, MARK, PROBE_FILE, RUN, SNAPSHOT_MARK, VmImage};
use crate::config::Span;
use crate::tools::measure::{call, find_program, first_line};

/// Something that runs a command on a root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Runtime {
    /// A virtual machine that boots.
    Minivmm,
    /// A virtual machine that goes on from a snapshot, taken right before its command.
    Restored,
    /// A virtual machine that has the root as a container image.
    Run {
        /// Whether it boots, in place of going on from a template.
        cold: bool,
    },
    /// An OCI runtime, called directly.
    Crun,
    /// The reference OCI runtime, called directly.
    Runc,
    /// Without a daemon, with a supervising process (conmon) for each container.
    Podman,
    /// By way of a daemon.
    Docker,
}

/// What is run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Job {
    /// The command that is compared.
    Command,
    /// guestctl: prints the kernel's release and ends with [`super::image::PROBE_STATUS`].
    Probe,
}

impl Job {
    fn words(self, image: &Image) -> &[String] {
        match self {
            Self::Command => &image.command,
            Self::Probe => &image.probe,
        }
    }
}

impl Runtime {
    /// All there are, the containers first.
    pub(super) const ALL: [Self; 8] = [
        Self::Crun,
        Self::Runc,
        Self::Podman,
        Self::Docker,
        Self::Minivmm,
        Self::Restored,
        Self::Run { cold: false },
        Self::Run { cold: true },
    ];

    pub(super) fn is_vm(self) -> bool {
        matches!(self, Self::Minivmm | Self::Restored | Self::Run { .. })
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Minivmm => "minivmm",
            Self::Restored => "minivmm restore",
            Self::Run { cold: false } => "minivmm run",
            Self::Run { cold: true } => "minivmm run --cold",
            Self::Crun => "crun",
            Self::Runc => "runc",
            Self::Podman => "podman",
            Self::Docker => "docker",
        }
    }

    /// All programs that are needed to run something; the first is the one that is called.
    fn programs(self) -> &'static [&'static str] {
        match self {
            Self::Minivmm | Self::Restored | Self::Run { .. } => &[],
            Self::Crun => &["crun"],
            Self::Runc => &["runc"],
            // Debian's podman prefers crun, others runc: it is asked for below.
            Self::Podman => &["podman", "conmon"],
            Self::Docker => &[
                "docker",
                "dockerd",
                "containerd",
                "containerd-shim-runc-v2",
                "runc",
            ],
        }
    }

    /// Names of processes that serve all runs.
    pub(super) fn daemons(self) -> &'static [&'static str] {
        match self {
            Self::Docker => &["dockerd", "containerd"],
            _ => &[],
        }
    }

    /// The program, if it is installed.
    pub(super) fn find(self) -> Option<PathBuf> {
        match self {
            Self::Minivmm | Self::Restored | Self::Run { .. } => std::env::current_exe().ok(),
            _ => find_program(self.programs().first()?),
        }
    }

    /// The programs that this host must have for it and their bytes together, shared libraries aside.
    pub(super) fn shipped(self) -> (Vec<String>, u64) {
        let mut files: Vec<PathBuf> = match self {
            Self::Minivmm | Self::Restored | Self::Run { .. } => self.find().into_iter().collect(),
            _ => self
                .programs()
                .iter()
                .filter_map(|name| find_program(name))
                .collect(),
        };
        if self == Self::Podman {
            let query = ["info", "--format", "{{.Host.OCIRuntime.Path}}"];
            files.extend(first_line(Path::new("podman"), &query).map(PathBuf::from));
        }
        let size = |file: &PathBuf| file.metadata().map_or(0, |meta| meta.len());
        let names = files.iter().filter_map(|file| file.file_name());
        (
            names
                .map(|name| name.to_string_lossy().into_owned())
                .collect(),
            files.iter().map(size).sum(),
        )
    }

    /// The first line of what it says of its version.
    pub(super) fn version(self, program: &Path) -> String {
        first_line(program, &["--version"]).unwrap_or("unknown".into())
    }

    /// What the command shares with the host, except namespaces, which are measured.
    pub(super) fn shares(self) -> &'static str {
        match self {
            Self::Minivmm | Self::Restored => {
                "no kernel: the command has its own, behind KVM and minivmm's devices; root file system in memory of its own"
            }
            Self::Run { .. } => {
                "no kernel: the command has its own, behind KVM and minivmm's devices; the image's file in the host's page cache"
            }
            Self::Crun | Self::Runc => {
                "the host's kernel; all system calls (no seccomp filter in the runtime's default configuration)"
            }
            Self::Podman | Self::Docker => {
                "the host's kernel; the system calls that its default seccomp filter lets through"
            }
        }
    }

    /// Prepares what every run needs: an image, a configuration. An error says what failed.
    pub(super) fn prepare(self, image: &Image, vm: &VmImage, timeout: Span) -> Result<(), String> {
        match self {
            Self::Minivmm | Self::Run { .. } | Self::Podman => Ok(()),
            Self::Restored => {
                let program = self.find().ok_or("no program")?;
                let mut words = vm.boot(&format!("{MARK}={SNAPSHOT_MARK}"));
                let at = format!("{SNAPSHOT_MARK}={},exit", vm.snapshot.display());
                words.extend(["--snapshot-at".into(), at.into()]);
                words.extend(["--deadline".into(), timeout.to_string().into()]);
                call(&program.to_string_lossy(), &words)?;
                match vm.snapshot.exists() {
                    true => Ok(()),
                    false => Err("the guest ended before it could be saved".to_owned()),
                }
            }
            Self::Crun | Self::Runc => {
                for job in [Job::Command, Job::Probe] {
                    self.make_bundle(image, job)?;
                }
                Ok(())
            }
            Self::Docker => {
                let archive = image.scratch.join("image.tar");
                let (root, id) = (image.root.as_path(), Path::new(&image.id));
                let tar = ["-C".as_ref(), root, "-cf".as_ref(), &archive, ".".as_ref()];
                call::<&Path>("tar", &tar)?;
                call("docker", &["import".as_ref(), archive.as_path(), id])?;
                fs::remove_file(archive).map_err(|e| e.to_string())
            }
        }
    }

    /// A bundle with the runtime's own default configuration, but for what runs where.
    fn make_bundle(self, image: &Image, job: Job) -> Result<(), String> {
        let bundle = self.bundle(image, job);
        fs::create_dir_all(&bundle).map_err(|e| e.to_string())?;
        let mut words: Vec<&Path> = vec!["spec".as_ref(), "--bundle".as_ref(), &bundle];
        if !rustix::process::geteuid().is_root() {
            words.push("--rootless".as_ref());
        }
        call(self.name(), &words)?;
        let file = bundle.join("config.json");
        let text = fs::read_to_string(&file).map_err(|e| e.to_string())?;
        let wrong = |e: &dyn fmt::Display| format!("{}: {e}", file.display());
        let mut spec: Map<String, Value> = serde_json::from_str(&text).map_err(|e| wrong(&e))?;
        let process = spec.entry("process").or_insert(json!({})).as_object_mut();
        let process = process.ok_or_else(|| wrong(&"its process is not an object"))?;
        process.insert("terminal".into(), json!(false));
        process.insert("args".into(), json!(job.words(image)));
        process.insert("env".into(), json!(ENVIRONMENT));
        spec.insert(
            "root".into(),
            json!({"path": image.root, "readonly": false}),
        );
        fs::write(&file, json!(spec).to_string()).map_err(|e| e.to_string())
    }

    fn bundle(self, image: &Image, job: Job) -> PathBuf {
        image.scratch.join(format!("{}-{job:?}", self.name()))
    }

    /// The command that does a job.
    pub(super) fn command(
        self,
        program: &Path,
        image: &Image,
        vm: &VmImage,
        job: Job,
    ) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec![program.into()];
        match self {
            Self::Minivmm => {
                all.extend(match job {
                    Job::Command => vm.boot(""),
                    Job::Probe => vm.boot(&format!("{RUN}=/{PROBE_FILE}")),
                });
            }
            Self::Restored => {
                all.extend(["restore".into(), vm.snapshot.clone().into()]);
                if job == Job::Probe {
                    all.extend(["--argument".into(), format!("/{PROBE_FILE}").into()]);
                }
            }
            Self::Run { cold } => {
                all.extend(vm.run());
                all.extend(cold.then(|| "--cold".into()));
                all.push(vm.digest());
                all.extend(job.words(image).iter().map(OsString::from));
            }
            Self::Crun | Self::Runc => {
                let bundle = self.bundle(image, job).into();
                all.extend(["run".into(), "--bundle".into(), bundle]);
                all.push(image.id.clone().into());
            }
            Self::Podman | Self::Docker => {
                let is_podman = self == Self::Podman;
                // Without systemd there are no control groups made for podman, and no journal.
                if is_podman && !Path::new("/run/systemd/system").exists() {
                    let options = ["--cgroup-manager=cgroupfs", "--events-backend=file"];
                    all.extend(options.map(OsString::from));
                }
                let options = ["run", "--rm", "--network=none", "--name", &image.id];
                all.extend(options.map(OsString::from));
                all.extend(ENVIRONMENT.map(|variable| format!("--env={variable}").into()));
                all.extend(match is_podman {
                    true => vec!["--rootfs".into(), image.root.clone().into()],
                    false => vec![image.id.clone().into()],
                });
                all.extend(job.words(image).iter().map(OsString::from));
            }
        }
        all
    }

    /// Removes what a killed run may have left.
    pub(super) fn clean_up(self, image: &Image) {
        let command = match self {
            Self::Minivmm | Self::Restored | Self::Run { .. } => return,
            Self::Crun | Self::Runc => "delete",
            Self::Podman | Self::Docker => "rm",
        };
        // Usually there is nothing.
        let _ = call(self.name(), &[command, "--force", &image.id]);
    }

    /// Removes what [`Self::prepare`] made outside of the scratch directory.
    pub(super) fn forget(self, image: &Image) {
        if self == Self::Docker {
            let _ = call("docker", &["rmi", "--force", &image.id]);
        }
    }
}
