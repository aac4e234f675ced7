//! The program of an image: who it runs as, where, with which streams; and its end.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};

use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;
use rustix::stdio::{stderr, stdin, stdout};
use rustix::thread::{Gid, Uid};

use super::children::Children;
use super::failure::{Failure, c_string, cannot, cannot_run};
use super::orders::Orders;
use super::streams::Channel;
use super::users::{self, User};

/// What the program finds as its streams, and our ends of them.
struct Streams {
    program: [OwnedFd; 3],
    input: OwnedFd,
    output: OwnedFd,
    /// Where there is a terminal, it is all in the output.
    error: Option<OwnedFd>,
    /// The terminal's other end, for its size.
    terminal: Option<OwnedFd>,
}

/// A program that runs.
pub(super) struct Started {
    /// Its process ID, which is that of its process group, too.
    pub(super) pid: rustix::process::Pid,
    status: Receiver<u8>,
    outputs: Vec<JoinHandle<()>>,
}

impl Started {
    /// Waits for its end, does what is to be done `then`, and waits for the end of its output. Its exit status, as a shell has it.
    pub(super) fn wait(self, then: impl FnOnce()) -> u8 {
        // It comes always: a child is reaped when it ends.
        let status = self.status.recv().unwrap_or(125);
        then();
        self.outputs
            .into_iter()
            .for_each(|output| drop(output.join()));
        status
    }
}

/// Starts the program, with its streams at `channel`.
pub(super) fn start(
    orders: &Orders,
    channel: &Channel,
    children: &Children,
) -> Result<Started, Failure> {
    let unusable = |text| Failure { status: 125, text };
    let passwd = users::read("/etc/passwd").map_err(cannot("read /etc/passwd"))?;
    let group = users::read("/etc/group").map_err(cannot("read /etc/group"))?;
    let user = User::find(&orders.user, &passwd, &group).map_err(unusable)?;
    let directory = Path::new(&orders.directory);
    let (name, arguments) = (orders.command)
        .split_first()
        .ok_or_else(|| unusable("no command is given, and the image has none".to_owned()))?;
    orders
        .command
        .iter()
        .try_for_each(|word| c_string(word).map(drop))?;
    let streams = if orders.terminal {
        Streams::terminal()
    } else {
        Streams::pipes()
    };
    let streams = streams.map_err(cannot("make the program's streams"))?;

    let mut command = Command::new(name);
    command.args(arguments).env_clear().current_dir(directory);
    command.env("HOME", &user.home);
    for variable in &orders.environment {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        c_string(variable)?;
        if !name.is_empty() {
            command.env(name, value);
        }
    }
    let [stdin, stdout, stderr] = streams.program.map(Stdio::from);
    command.stdin(stdin).stdout(stdout).stderr(stderr);
    before_program(&mut command, user, orders.terminal);
    let child = children.spawn(&mut command);
    // Our copies of the program's ends.
    drop(command);
    let (pid, status) = child.map_err(cannot_run(name))?;

    // The host sends no more than a window of what the program has not taken.
    let (input, pieces) = mpsc::channel();
    let (to, writer) = (streams.input, channel.clone());
    let terminal = orders.terminal;
    thread::spawn(move || writer.copy_input(&pieces, to, terminal));
    let (reader, size) = (channel.clone(), streams.terminal);
    thread::spawn(move || reader.serve(&input, pid, size.as_ref()));
    let outputs = [(false, Some(streams.output)), (true, streams.error)];
    let outputs: Vec<_> = outputs
        .into_iter()
        .filter_map(|(is_error, from)| {
            let (channel, from) = (channel.clone(), from?);
            Some(thread::spawn(move || channel.copy_output(is_error, from)))
        })
        .collect();

    Ok(Started {
        pid,
        status,
        outputs,
    })
}

impl Streams {
    fn pipes() -> io::Result<Self> {
        let flags = rustix::pipe::PipeFlags::CLOEXEC;
        let [input, output, error] = [(); 3].map(|()| rustix::pipe::pipe_with(flags));
        let (input, output, error) = (input?, output?, error?);
        Ok(Self {
            program: [input.0, output.1, error.1],
            input: input.1,
            output: output.0,
            error: Some(error.0),
            terminal: None,
        })
    }

    fn terminal() -> io::Result<Self> {
        use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let master = openpt(flags)?;
        grantpt(&master)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, flags)?;
        Ok(Self {
            program: [slave.try_clone()?, slave.try_clone()?, slave],
            input: master.try_clone()?,
            output: master.try_clone()?,
            error: None,
            terminal: Some(master),
        })
    }
}

/// Descriptors that a program can have, unless it asks for up to [`MAX_FILES`]: what it may expect, and what Linux allows.
pub(super) const FILES: u64 = 1024;
pub(super) const MAX_FILES: u64 = 1 << 20;

/// Sets how many descriptors this process can have, and what it starts.
pub(super) fn set_file_limit(files: u64) -> io::Result<()> {
    let limit = rustix::process::Rlimit {
        current: Some(files),
        maximum: Some(MAX_FILES),
    };
    Ok(rustix::process::setrlimit(
        rustix::process::Resource::Nofile,
        limit,
    )?)
}

/// What the program's process does before it becomes the program.
#[allow(unsafe_code, reason = "it runs between fork and exec")]
fn before_program(command: &mut Command, user: User, terminal: bool) {
    let groups: Vec<Gid> = user.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    let prepare = move || -> io::Result<()> {
        // A session and a process group of its own, for signals and job control.
        rustix::process::setsid()?;
        set_file_limit(FILES)?;
        if terminal {
            rustix::process::ioctl_tiocsctty(stdin())?;
        }
        // A pipe that is opened by its name, as /dev/stderr is, has an owner.
        for stream in [stdin(), stdout(), stderr()] {
            rustix::fs::fchown(stream, Some(Uid::from_raw(user.uid)), None)?;
        }
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_gid(Gid::from_raw(user.gid))?;
        rustix::thread::set_thread_uid(Uid::from_raw(user.uid))?;
        Ok(())
    };
    // SAFETY: it makes system calls only, and allocates nothing.
    unsafe { command.pre_exec(prepare) };
}

/// Kills all processes but this one: what the image's program has left behind goes with it, so that its streams end.
pub(super) fn kill_all() {
    // It fails where there is none.
    let _ = signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
}
