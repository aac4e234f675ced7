//! A user at a terminal: a pseudo-terminal with a shell on it that runs minivmm, and what appears on the screen.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::thread;

use rustix::pty::{OpenptFlags, grantpt, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, Winsize, tcgetattr,
    tcsetattr, tcsetwinsize,
};

use super::kill;
use super::limit::{PATIENCE, SLICE, receive, until, within};

/// The user's end of a terminal.
pub(crate) struct Terminal {
    user: File,
    /// Open all the time, so that nothing is lost when the last program has gone.
    line: OwnedFd,
    original: Termios,
    screen: Screen,
}

/// What has appeared, and word that there is more.
type Screen = Arc<(Mutex<Vec<u8>>, Condvar)>;

/// The shell writes it behind the output of a command that has ended. It is not shown.
const END_MARK: u8 = 0;

/// Waits until the screen is as wanted.
#[track_caller]
fn wait_for_screen(screen: &Screen, what: &str, wanted: impl Fn(&[u8]) -> bool) {
    let appeared = within(PATIENCE, || {
        let seen = screen.0.lock().unwrap();
        let (_seen, timeout) = screen
            .1
            .wait_timeout_while(seen, SLICE, |seen| !wanted(seen))
            .unwrap();
        (!timeout.timed_out()).then_some(())
    });
    let seen = screen.0.lock().unwrap();
    let text = String::from_utf8_lossy(&seen);
    assert!(appeared.is_some(), "no {what} in {text:?}");
}

impl Terminal {
    /// A terminal in the modes of a shell, but for two that hardly anybody has: whoever restores defaults is found out.
    pub(crate) fn new() -> Self {
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        grantpt(&user).unwrap();
        unlockpt(&user).unwrap();
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let line = ioctl_tiocgptpeer(&user, flags).unwrap();
        let mut modes = tcgetattr(&line).unwrap();
        modes.input_modes |= InputModes::IXANY;
        modes.special_codes[SpecialCodeIndex::VERASE] = 8;
        tcsetattr(&line, OptionalActions::Now, &modes).unwrap();
        let terminal = Self {
            user: user.into(),
            line,
            original: modes,
            screen: Arc::default(),
        };
        let mut reader = terminal.user.try_clone().unwrap();
        let screen = terminal.screen.clone();
        thread::spawn(move || {
            let mut chunk = [0; 4096];
            // It ends with an error when nobody has the terminal open any more.
            while let Ok(len) = reader.read(&mut chunk) {
                screen.0.lock().unwrap().extend_from_slice(&chunk[..len]);
                screen.1.notify_all();
            }
        });
        terminal
    }

    /// Types, or pastes; fails if nobody takes it.
    #[track_caller]
    pub(crate) fn type_in(&self, keys: impl AsRef<[u8]>) {
        let mut user = self.user.try_clone().unwrap();
        let keys = keys.as_ref().to_vec();
        let (sender, typed) = mpsc::channel();
        thread::spawn(move || sender.send(user.write_all(&keys)));
        receive(&typed).expect("the keys are taken").unwrap();
    }

    /// All that has appeared so far. It is complete when [`Session::status`] has returned.
    pub(crate) fn screen(&self) -> Vec<u8> {
        let mut screen = self.screen.0.lock().unwrap().clone();
        screen.retain(|byte| *byte != END_MARK);
        screen
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.screen()).into_owned()
    }

    /// Waits until this has appeared `count` times.
    #[track_caller]
    pub(crate) fn wait_for_times(&self, wanted: &str, count: usize) {
        wait_for_screen(&self.screen, wanted, |seen| {
            String::from_utf8_lossy(seen).matches(wanted).count() >= count
        });
    }

    #[track_caller]
    pub(crate) fn wait_for(&self, wanted: &str) {
        self.wait_for_times(wanted, 1);
    }

    /// Waits until so many bytes have appeared in all.
    #[track_caller]
    pub(crate) fn wait_for_len(&self, len: usize) {
        wait_for_screen(&self.screen, &format!("{len} bytes"), |seen| {
            seen.len() >= len
        });
    }

    pub(crate) fn resize(&self, rows: u16, columns: u16) {
        let size = Winsize {
            ws_row: rows,
            ws_col: columns,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.user, size).unwrap();
    }

    /// As a shell does that takes its terminal back.
    pub(crate) fn reset_modes(&self) {
        tcsetattr(&self.line, OptionalActions::Now, &self.original).unwrap();
    }

    /// Every mode of the terminal, to be compared.
    pub(crate) fn modes(&self) -> String {
        format!("{:?}", tcgetattr(&self.line).unwrap())
    }

    /// No echo, no lines, no signals from keys.
    pub(crate) fn is_raw(&self) -> bool {
        let modes = tcgetattr(&self.line).unwrap().local_modes;
        !modes.intersects(LocalModes::ECHO | LocalModes::ICANON | LocalModes::ISIG)
    }

    #[track_caller]
    pub(crate) fn wait_until_raw(&self, raw: bool) {
        assert!(until(|| self.is_raw() == raw), "raw: {}", !raw);
    }

    /// Runs a command in the foreground of this terminal.
    pub(crate) fn run(&self, command: &Command) -> Session {
        self.run_script(command, "minivmm; ended")
    }

    /// Runs a shell on this terminal, with `script`, in which `minivmm` runs the command, and `ended` reports the exit
    /// status of what was run before it. The shell goes on when the script is done: when the first process of a
    /// terminal's session ends, the kernel resets the terminal's modes, and there would be nothing left to see.
    pub(crate) fn run_script(&self, command: &Command, script: &str) -> Session {
        let quote = |word: &OsStr| format!("'{}'", word.to_str().unwrap().replace('\'', "'\\''"));
        let words: Vec<String> = std::iter::once(command.get_program())
            .chain(command.get_args())
            .map(quote)
            .collect();
        // Descriptor 3 is for reports.
        let script = format!(
            "exec 3>&1 >&0 2>&0
            minivmm() {{ sh -c 'echo pid $$ >&3; exec \"$@\" 3>&-' sh {}; }}
            ended() {{ status=$?; printf '\\000'; echo status $status >&3; }}
            {script}
            exec sleep 1000",
            words.join(" ")
        );
        // Not a process group's leader, setsid does not fork: its process becomes the shell.
        let mut shell = Command::new("setsid");
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => shell.env(name, value),
                None => shell.env_remove(name),
            };
        }
        let mut shell = shell
            .args(["--ctty", "sh", "-c", &script])
            .stdin(Stdio::from(self.line.try_clone().unwrap()))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, reports) = mpsc::channel();
        let lines = BufReader::new(shell.stdout.take().unwrap()).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Session {
            shell,
            reports,
            screen: self.screen.clone(),
            pid: 0,
            ended: 0,
        }
    }
}

/// The shell on a terminal, and minivmm on it. It ends with this.
pub(crate) struct Session {
    shell: Child,
    reports: mpsc::Receiver<String>,
    screen: Screen,
    pid: u32,
    ended: usize,
}

impl Session {
    #[track_caller]
    fn report(&self, name: &str) -> u32 {
        let line = receive(&self.reports).expect(name);
        line.strip_prefix(name)
            .unwrap_or_else(|| panic!("{line:?} where {name} was expected"))
            .trim()
            .parse()
            .unwrap()
    }

    /// minivmm's process.
    #[track_caller]
    pub(crate) fn pid(&mut self) -> u32 {
        if self.pid == 0 {
            self.pid = self.report("pid");
        }
        self.pid
    }

    #[track_caller]
    pub(crate) fn signal(&mut self, name: &str) {
        assert!(kill(self.pid(), name));
    }

    /// Waits until minivmm's process is in this state, as ps names it.
    #[track_caller]
    pub(crate) fn wait_for_state(&mut self, state: char) {
        let path = format!("/proc/{}/stat", self.pid());
        let mut stat = String::new();
        let is_there = until(|| {
            stat = fs::read_to_string(&path).unwrap();
            // Behind the name, which may have anything in it.
            let (_, rest) = stat.rsplit_once(") ").unwrap();
            rest.starts_with(state)
        });
        assert!(is_there, "{state} wanted: {stat}");
    }

    /// Waits for minivmm's end, and for all that it has written; its exit status, as the shell sees it.
    #[track_caller]
    pub(crate) fn status(&mut self) -> u32 {
        self.pid();
        let status = self.report("status");
        self.ended += 1;
        wait_for_screen(&self.screen, "end", |seen| {
            seen.iter().filter(|byte| **byte == END_MARK).count() >= self.ended
        });
        status
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // The kernel hangs up for the rest of the session.
        _ = self.shell.kill();
        _ = self.shell.wait();
        if self.pid != 0 && thread::panicking() {
            kill(self.pid, "KILL");
        }
    }
}
