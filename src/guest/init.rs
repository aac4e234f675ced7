//! The first process: modules, mounts, names, and the end of the machine.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::unistd::fork;
use rustix::fs::CWD;
use rustix::mount::{MountFlags, MoveMountFlags, mount, mount_move, mount_remount, move_mount};

use super::children::Children;
use super::exec;
use super::failure::{Failure, c_string, cannot, cannot_run, make_directory};
use super::modules;
use super::network;
use super::orders::{Orders, SETUP, Setup};
use super::streams::{self, Channel};
use super::{port, process, template};

/// How long a device may take to appear after its driver was loaded.
const DEVICE_LIMIT: Duration = Duration::from_secs(10);
/// The image's disk, and the one for what is written, if there is one.
const DISK: &str = "/dev/vda";
const WRITABLE: &str = "/dev/vdb";
/// Where its streams go.
const CHANNEL: &str = "/dev/hvc0";

/// The whole life of the guest: does not return.
pub fn main() -> ! {
    let mut channel = None;
    let status = run(&mut channel).unwrap_or_else(|failure| {
        let text = format!("minivmm: error: in the guest: {}\n", failure.text);
        match &channel {
            Some(channel) => channel.error(text.as_bytes()),
            // COM1.
            None => _ = io::stderr().write_all(text.as_bytes()),
        }
        failure.status
    });
    if let Some(channel) = &channel {
        channel.drain();
    }
    end(status)
}

fn run(channel: &mut Option<Channel>) -> Result<u8, Failure> {
    process::set_file_limit(process::MAX_FILES)
        .map_err(cannot("raise the limit of descriptors"))?;
    mount_system()?;
    let setup = fs::read(SETUP).map_err(cannot("read the orders"))?;
    let mut setup: Setup = serde_json::from_slice(&setup).map_err(cannot("read the orders"))?;
    for module in &setup.modules {
        let loaded = modules::open(module).and_then(|file| modules::load(&file));
        loaded.map_err(cannot(format_args!("load the kernel module {module}")))?;
    }
    // While they can be reached.
    let later = setup.later_modules.iter().map(|name| modules::open(name));
    let mut later = later
        .collect::<io::Result<Vec<File>>>()
        .map_err(cannot("read a kernel module"))?;
    if let Some(orders) = setup.orders.take_if(|orders| orders.is_init) {
        return become_init(orders, later);
    }
    wait_for(CHANNEL, Path::exists)?;
    let terminal = streams::open(Path::new(CHANNEL)).map_err(cannot("open hvc0"))?;
    network::set_up_loopback();
    let children = Children::reap();
    let orders = match setup.orders {
        Some(orders) => orders,
        None => {
            // What is missing shows at the socket.
            later
                .drain(..)
                .for_each(|module| _ = modules::load(&module));
            wait_for(DISK, Path::exists)?;
            template::wait_for_orders()?
        }
    };
    let opened = Channel::stream(terminal).map_err(cannot("use hvc0"))?;
    let channel = channel.insert(opened);
    prepare(&orders)?;
    let program = process::start(&orders, channel, &children)?;
    exec::serve(later, Arc::new(orders), Some(program.pid), children);
    Ok(program.wait(process::kill_all))
}

/// Makes the machine what a program of the image expects.
fn prepare(orders: &Orders) -> Result<(), Failure> {
    enter_root(orders)?;
    rustix::system::sethostname(orders.hostname.as_bytes()).map_err(cannot("set the host name"))?;
    let network = orders.network.as_ref().map_or(Ok(()), network::set_up);
    network.map_err(cannot("set up the network"))
}

/// Replaces this process by the image's init, and has a child run what else the host asks for. Returns only if that fails.
#[allow(unsafe_code, reason = "process 1 has to stay process 1")]
fn become_init(orders: Orders, drivers: Vec<File>) -> Result<u8, Failure> {
    network::set_up_loopback();
    prepare(&orders)?;
    // SAFETY: this process has no other thread.
    if unsafe { fork() }.map_err(cannot("fork"))?.is_child() {
        exec::serve(drivers, Arc::new(orders), None, Children::reap());
        loop {
            thread::park();
        }
    }
    let mut words = orders.command.iter();
    let name = words.next().map_or("", String::as_str);
    let environment = orders.environment.iter().filter_map(|v| v.split_once('='));
    let _ = process::set_file_limit(process::FILES);
    let mut init = Command::new(name);
    init.args(words).env_clear().envs(environment);
    Err(cannot_run(name)(init.exec()))
}

/// Mounts what does not depend on the image, to be moved there: a template has done it.
fn mount_system() -> Result<(), Failure> {
    let (safe, hidden) = (
        MountFlags::NOSUID | MountFlags::NOEXEC | MountFlags::NODEV,
        MountFlags::NOSUID | MountFlags::NODEV,
    );
    let no_programs = MountFlags::NOSUID | MountFlags::NOEXEC;
    [
        ("proc", "/proc", "proc", safe),
        ("sys", "/sys", "sysfs", safe),
        ("dev", "/dev", "devtmpfs", MountFlags::NOSUID),
        ("pts", "/dev/pts", "devpts", no_programs),
        ("shm", "/dev/shm", "tmpfs", hidden),
    ]
    .iter()
    .try_for_each(mount_one)?;
    // What not every kernel has.
    for optional in [
        ("mqueue", "/dev/mqueue", "mqueue", safe),
        ("cgroup", "/sys/fs/cgroup", "cgroup2", safe),
    ] {
        let _ = mount_one(&optional);
    }
    for (name, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "/proc/self/fd/0"),
        ("stdout", "/proc/self/fd/1"),
        ("stderr", "/proc/self/fd/2"),
    ] {
        // devtmpfs may have them.
        let _ = std::os::unix::fs::symlink(target, Path::new("/dev").join(name));
    }
    Ok(())
}

fn mount_one(
    (source, target, kind, flags): &(&str, &str, &str, MountFlags),
) -> Result<(), Failure> {
    make_directory(Path::new(target)).map_err(cannot(format_args!("make {target}")))?;
    let options = match *kind {
        "devpts" => Some(c"mode=620,gid=5,ptmxmode=666"),
        "tmpfs" => Some(c"mode=1777"),
        _ => None,
    };
    mount(*source, *target, *kind, *flags, options)
        .map_err(cannot(format_args!("mount {kind} on {target}")))
}

/// Waits for a device that a driver is about to find, or to find ready.
fn wait_for(device: &str, is_ready: fn(&Path) -> bool) -> Result<(), Failure> {
    let limit = Instant::now() + DEVICE_LIMIT;
    while !is_ready(Path::new(device)) {
        if Instant::now() > limit {
            return Err(cannot(format_args!("find {device}"))(
                "the kernel has no driver for it",
            ));
        }
        thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Mounts the image, with memory or a disk above it for what is written, and makes it the root.
fn enter_root(orders: &Orders) -> Result<(), Failure> {
    // In a VM that was restored, the driver has yet to hear that the disk is no longer empty.
    wait_for(DISK, |disk| {
        let size = File::open(disk).and_then(|mut disk| disk.seek(SeekFrom::End(0)));
        size.is_ok_and(|size| size > 0)
    })?;
    for dir in ["/image", "/written", "/root"] {
        make_directory(Path::new(dir)).map_err(cannot(format_args!("make {dir}")))?;
    }
    mount(DISK, "/image", "erofs", MountFlags::RDONLY, None)
        .map_err(cannot("mount the image (EROFS)"))?;
    mount_written(orders)?;
    prepare_upper().map_err(cannot("prepare the root"))?;
    let layers = c"lowerdir=/image,upperdir=/written/upper,workdir=/written/work";
    mount(
        "image",
        "/root",
        "overlay",
        MountFlags::empty(),
        Some(layers),
    )
    .map_err(cannot("mount overlayfs"))?;
    let system = ["/proc", "/sys", "/dev"].map(|dir| (dir, File::open(dir)));
    rustix::process::chdir("/root").map_err(cannot("enter the image"))?;
    mount_move("/root", "/").map_err(cannot("make the image the root"))?;
    rustix::process::chroot(".").map_err(cannot("make the image the root"))?;
    rustix::process::chdir("/").map_err(cannot("enter the image"))?;
    for (dir, tree) in system {
        let tree = tree.map_err(cannot(format_args!("open {dir}")))?;
        make_directory(Path::new(dir)).map_err(cannot(format_args!("make {dir}")))?;
        // Where the image has a symbolic link, it leads within the image.
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        move_mount(&tree, "", CWD, dir, flags).map_err(cannot(format_args!("mount {dir}")))?;
    }
    write_files(orders).map_err(cannot("write /etc/hosts and the like"))?;
    // While the root can be written to.
    make_directory(Path::new(&orders.directory))
        .map_err(cannot(format_args!("make {}", orders.directory)))?;
    if orders.read_only {
        mount_remount("/", MountFlags::RDONLY, "").map_err(cannot("make the root read-only"))?;
    }
    Ok(())
}

/// Mounts the file system for what is written.
fn mount_written(orders: &Orders) -> Result<(), Failure> {
    let Some(options) = &orders.disk else {
        return mount("memory", "/written", "tmpfs", MountFlags::empty(), None)
            .map_err(cannot("mount tmpfs"));
    };
    wait_for(WRITABLE, Path::exists)?;
    let options = c_string(options)?;
    mount(
        WRITABLE,
        "/written",
        "ext4",
        MountFlags::empty(),
        Some(&*options),
    )
    .map_err(cannot("mount the disk for what is written (ext4)"))
}

/// The root directory is the one that is made here, unless the disk has it: it gets owner and permissions of the image's.
fn prepare_upper() -> io::Result<()> {
    use std::os::unix::fs::MetadataExt;
    let [work, new, upper] = ["work", "new", "upper"].map(|dir| Path::new("/written").join(dir));
    make_directory(&work)?;
    if !upper.exists() {
        make_directory(&new)?;
        let root = fs::metadata("/image")?;
        std::os::unix::fs::chown(&new, Some(root.uid()), Some(root.gid()))?;
        fs::set_permissions(&new, root.permissions())?;
        fs::rename(new, upper)?;
    }
    Ok(())
}

/// The files that say who this machine is, as docker writes them.
fn write_files(orders: &Orders) -> io::Result<()> {
    make_directory(Path::new("/etc"))?;
    let name = &orders.hostname;
    let hosts = format!(
        "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{name}\n"
    );
    let resolvers = orders.network.iter().flat_map(|net| &net.resolvers);
    let resolvers: String = resolvers.map(|ip| format!("nameserver {ip}\n")).collect();
    for (path, text) in [
        ("/etc/hostname", format!("{name}\n")),
        ("/etc/hosts", hosts),
        ("/etc/resolv.conf", resolvers),
    ] {
        // It may be a symbolic link to where nothing is.
        if fs::symlink_metadata(path).is_ok_and(|m| !m.is_file()) {
            fs::remove_file(path)?;
        }
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true).mode(0o644);
        let opened = options.custom_flags(libc::O_NOFOLLOW).open(path);
        opened?.write_all(text.as_bytes())?;
    }
    Ok(())
}

/// Ends the machine with this status.
fn end(status: u8) -> ! {
    rustix::fs::sync();
    if port::allow(port::EXIT).is_ok() {
        port::write(port::EXIT, status);
    }
    // Not under minivmm, or a kernel that is locked down: its status is lost.
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    loop {
        thread::park();
    }
}
