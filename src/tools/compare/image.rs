//! The root file system that all runtimes use: a copy for the containers, an initramfs of the same for the virtual machine.

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File, Permissions};
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use minivmm_devices::thread::ThreadStarter;

use super::options::CompareOptions;
use crate::config::{DEFAULT_CMDLINE, MemorySize, VmConfig, join_words};
use crate::image::{How, Source, Store, Stored};
use crate::tools::cpio;
use crate::tools::measure::call;
use crate::vmm::networks::Networks;
use crate::vmm::prepare::{BuildTimes, Prepared};
use crate::{boot, error_chain};

/// guestctl (guest-kernels/initramfs): first process of the virtual machine, and probe everywhere.
const GUESTCTL: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guestctl"));

/// Where in the root it is, with what it reads.
const DIR: &str = ".minivmm";
/// The words of the probe, for guestctl.
pub(super) const PROBE_FILE: &str = ".minivmm/probe";
/// The kernel hands this to its first process, which runs the words of the file that it names.
pub(super) const RUN: &str = "MINIVMM_RUN";

/// The kernel hands this to its first process, which writes this boot mark right before it runs the words.
pub(super) const MARK: &str = "MINIVMM_MARK";
/// The boot mark at which the virtual machine is saved.
pub(super) const SNAPSHOT_MARK: u8 = 7;

/// The status that the probe ends with.
pub(super) const PROBE_STATUS: i32 = 42;

/// The command's environment, everywhere.
pub(super) const ENVIRONMENT: [&str; 2] = [
    "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME=/root",
];

/// Added to the virtual machine's kernel command line: nothing but the command's output on the console.
const APPEND: &str = "loglevel=1 rdinit=/.minivmm/init";

/// What every runtime runs.
pub(super) struct Image {
    /// The name of containers and images.
    pub(super) id: String,
    /// For all files of this comparison.
    pub(super) scratch: PathBuf,
    /// The copy of the root file system.
    pub(super) root: PathBuf,
    /// The command and its arguments.
    pub(super) command: Vec<String>,
    /// The same for the probe.
    pub(super) probe: Vec<String>,
}

/// What the virtual machine boots.
pub(super) struct VmImage {
    /// The VM, but for what comes behind its command line.
    pub(super) config: VmConfig,
    pub(super) initramfs_bytes: u64,
    /// The same root as an image of its own.
    pub(super) stored: Stored,
    store: Store,
    /// Where its snapshot will be.
    pub(super) snapshot: PathBuf,
    /// Bytes of all files in it.
    pub(super) content_bytes: u64,
}

impl Image {
    /// Copies the root file system: runs may write to it, and the original stays as it is.
    pub(super) fn new(
        options: &CompareOptions,
        store: &Store,
        scratch: &Path,
    ) -> Result<Self, String> {
        let root = scratch.join("root");
        fs::create_dir(&root).map_err(|e| format!("cannot make {}: {e}", root.display()))?;
        if let Some(image) = &options.image {
            let stored = Source::parse(image).load(store, &How::default());
            let stored = stored.map_err(|e| error_chain(&e))?;
            let extract = PathBuf::from(format!("--extract={}", root.display()));
            call("fsck.erofs", &[extract, stored.root])
                .map_err(|e| format!("{e} (package erofs-utils)"))?;
        } else if let Some(rootfs) = &options.rootfs {
            let content = rootfs.join(".");
            call("cp", &["-ax".as_ref(), content.as_path(), &root])?;
        }
        let image = Self {
            id: format!("minivmm-compare-{}", std::process::id()),
            scratch: scratch.to_owned(),
            command: options.command.clone(),
            probe: vec![
                format!("/{DIR}/guestctl"),
                "probe".into(),
                PROBE_STATUS.to_string(),
            ],
            root,
        };
        image
            .add_guestctl()
            .map_err(|e| format!("cannot write to {}: {e}", image.root.display()))?;
        Ok(image)
    }

    fn add_guestctl(&self) -> io::Result<()> {
        let dir = self.root.join(DIR);
        fs::create_dir_all(&dir)?;
        let program = dir.join("guestctl");
        fs::write(&program, GUESTCTL)?;
        fs::set_permissions(&program, Permissions::from_mode(0o755))
    }
}

impl VmImage {
    /// Packs the copy of the root, with what a container runtime would be told by its configuration.
    pub(super) fn new(
        options: &CompareOptions,
        kernel: PathBuf,
        image: &Image,
        store: Store,
    ) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let files = image.scratch.join("vm");
        let initramfs = image.scratch.join("initramfs.cpio");
        fs::create_dir_all(files.join(DIR))?;
        for (name, words) in [
            ("run", &image.command[..]),
            ("probe", &image.probe[..]),
            ("environment", &ENVIRONMENT.map(str::to_owned)[..]),
        ] {
            let text: String = words.iter().map(|word| format!("{word}\0")).collect();
            fs::write(files.join(DIR).join(name), text)?;
        }
        symlink("guestctl", files.join(DIR).join("init"))?;
        // Archives one after another are one initramfs.
        let mut out = BufWriter::new(File::create(&initramfs)?);
        let content_bytes = cpio::pack(&image.root, &mut out)?;
        cpio::pack(&files, &mut out)?;
        out.flush()?;
        let initramfs_bytes = initramfs.metadata()?.len();
        let append = options.append.join(" ");
        Ok(Self {
            config: VmConfig {
                kernel,
                initrd: Some(initramfs),
                cmdline: Some(join_words([DEFAULT_CMDLINE, APPEND, &append])),
                memory: options.memory.unwrap_or(memory_for(initramfs_bytes)),
                cpus: options.cpus,
                ..VmConfig::default()
            },
            initramfs_bytes,
            stored: Source::Root(image.root.clone()).load(&store, &How::default())?,
            store,
            snapshot: image.scratch.join("snapshot"),
            content_bytes,
        })
    }

    /// minivmm's arguments for a boot, with this behind the kernel command line.
    pub(super) fn boot(&self, append: &str) -> Vec<OsString> {
        let config = &self.config;
        let cmdline = config.cmdline.as_deref().unwrap_or_default();
        let mut words = self.kernel_and_size();
        words.extend([
            "--initrd".into(),
            config.initrd.clone().unwrap_or_default().into(),
        ]);
        words.extend(["--cmdline".into(), join_words([cmdline, append]).into()]);
        words
    }

    fn kernel_and_size(&self) -> Vec<OsString> {
        let VmConfig {
            kernel,
            memory,
            cpus,
            ..
        } = &self.config;
        let size = [format!("--memory={memory}"), format!("--cpus={cpus}")];
        let mut words: Vec<OsString> = vec!["--kernel".into(), kernel.into()];
        words.extend(size.map(OsString::from));
        words
    }

    /// minivmm's arguments to run the image, without its digest and the words.
    pub(super) fn run(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = vec!["run".into(), "--network=none".into()];
        words.extend(ENVIRONMENT.map(|variable| format!("--env={variable}").into()));
        words.extend(self.kernel_and_size());
        words
    }

    /// What the image is called.
    pub(super) fn digest(&self) -> OsString {
        self.stored.meta.digest.to_string().into()
    }

    /// Loads it into a VM that does not run, so that the first run finds the kernel unpacked, as the others do.
    pub(super) fn warm_up(&self) {
        // If it fails, so does the first run, which is reported.
        let _ = Prepared::new(
            &self.config,
            &Networks::default(),
            &ThreadStarter::default(),
            &mut BuildTimes::default(),
        );
    }
}

impl Drop for VmImage {
    fn drop(&mut self) {
        let _ = self.store.remove(&self.stored);
    }
}

/// The user's images.
pub(super) fn store() -> io::Result<Store> {
    let cache = boot::cache_dir().ok_or_else(|| io::Error::other("set HOME"))?;
    Store::open(&cache.join("images"))
}

/// The archive and what is unpacked from it are in memory together for a while; and Linux needs some.
fn memory_for(initramfs_bytes: u64) -> MemorySize {
    let wanted = 2 * initramfs_bytes + (128 << 20);
    MemorySize {
        bytes: wanted.next_multiple_of(64 << 20).max(256 << 20),
    }
}
