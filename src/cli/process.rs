//! The process that minivmm is: what it inherits, and how a bug or a lack of memory ends it.

use std::ffi::{CStr, OsStr};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::exit;
use std::sync::OnceLock;

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::exit_status::VMM_FAILED;
use super::log::TimedStderr;
use crate::sandbox::Call;
use crate::{console, escaped};

/// The first file descriptor behind stdin, stdout and stderr.
const FIRST_INHERITED: u32 = 3;

/// Closes what was inherited: a pipe or a lock of the caller's would be held as long as the guest runs, and be within
/// reach of whoever breaks out of it. What an argument names, as in `--initrd <(make-initrd)`, stays. Linux before 5.9
/// cannot do it, and then all stays open.
///
/// # Safety
///
/// To be called before anything is opened that is used afterwards.
#[allow(unsafe_code, reason = "descriptors are closed that nothing here owns")]
pub unsafe fn close_inherited_files(args: impl Iterator<Item = impl AsRef<OsStr>>) {
    let mut named: Vec<u32> = args.flat_map(|arg| named_files(arg.as_ref())).collect();
    named.sort_unstable();
    let mut first = FIRST_INHERITED;
    for keep in named.into_iter().chain([u32::MAX]) {
        if let Some(last) = keep.checked_sub(1).filter(|last| *last >= first) {
            // SAFETY: the caller sees to it that no owner of a descriptor loses it.
            unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
        }
        first = first.max(keep.saturating_add(1));
    }
}

/// The file descriptors that an argument names: N in `/dev/fd/N`, `/proc/self/fd/N` or `fd=N`, wherever in it that is.
fn named_files(arg: &OsStr) -> Vec<u32> {
    let text = String::from_utf8_lossy(arg.as_bytes());
    let (paths, keys) = (text.split("/fd/").skip(1), text.split("fd=").skip(1));
    paths
        .chain(keys)
        .filter_map(|rest| {
            let end = rest.find(|c: char| !c.is_ascii_digit());
            rest.get(..end.unwrap_or(rest.len()))?.parse().ok()
        })
        .collect()
}

/// A panic, on any thread, and an abort, which is how Rust answers a lack of memory and an overflow of a stack, end the
/// process with the status of minivmm's own failures. As signals they would have that of a guest whose kernel panicked.
pub fn install_fault_handlers() {
    std::panic::set_hook(Box::new(|info| {
        console::restore_terminal();
        // Not eprintln, which panics when nobody reads.
        let bug = escaped(&info.to_string()).into_owned();
        let _ = writeln!(
            TimedStderr,
            "minivmm: error: this is a bug in minivmm: {bug}"
        );
        exit(VMM_FAILED.into())
    }));
    handle(Signal::SIGABRT, on_abort);
    handle(Signal::SIGSYS, on_refused_call);
}

/// Has all threads share one heap. glibc's further ones ask /proc/sys/vm/overcommit_memory before they shrink, and a confined
/// thread opens no files.
#[cfg(target_env = "gnu")]
#[allow(unsafe_code, reason = "no safe interface sets it")]
pub fn share_one_heap() {
    // SAFETY: it sets a number.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

#[allow(unsafe_code, reason = "no safe handler may end the process")]
fn handle(signal: Signal, handler: Handler) {
    // On the alternate stack where there is one, as a stack overflow needs.
    let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
    let action = SigAction::new(SigHandler::SigAction(handler), flags, SigSet::empty());
    // SAFETY: the handlers do only what is async-signal-safe.
    let _ = unsafe { sigaction(signal, &action) };
}

/// Ends the process, from a signal handler, with a last message, if stderr takes it soon: nobody may read it.
#[allow(unsafe_code, reason = "no destructor may run in a signal handler")]
fn end_with(message: &[u8]) -> ! {
    let patience = Timespec {
        tv_sec: 0,
        tv_nsec: 200_000_000,
    };
    let stderr = rustix::stdio::stderr();
    if poll(&mut [PollFd::new(&stderr, PollFlags::OUT)], Some(&patience)) != Ok(0) {
        let _ = rustix::io::write(stderr, message);
    }
    // SAFETY: it is async-signal-safe.
    unsafe { libc::_exit(VMM_FAILED.into()) }
}

#[allow(unsafe_code, reason = "it runs as a signal handler")]
extern "C" fn on_abort(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    console::restore_terminal();
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; getpid is async-signal-safe.
    let is_own = unsafe { (*info).si_code == libc::SI_TKILL && (*info).si_pid() == libc::getpid() };
    // abort(3) sends it with tgkill; whoever sends it from outside wants a core dump.
    if is_own {
        end_with(
            b"minivmm: error: aborted for the reason above; if that is memory, raise its limit (ulimit -v)\n",
        );
    }
    console::raise_by_default(signal);
}

/// What [`on_bus_error`] writes.
static BUS_ERROR: OnceLock<String> = OnceLock::new();

/// A file that is mapped as guest memory may be cut short while a VM runs from it. What then reads behind its end gets SIGBUS, which
/// ends the process with the status of minivmm's own failures and names the file.
pub fn name_file_on_bus_error(path: &Path) {
    let message = format!(
        "minivmm: error: the snapshot {} was cut short while a VM ran from it\n",
        escaped(&path.to_string_lossy())
    );
    if BUS_ERROR.set(message).is_ok() {
        handle(Signal::SIGBUS, on_bus_error);
    }
}

extern "C" fn on_bus_error(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    console::restore_terminal();
    end_with(BUS_ERROR.get().map_or(&[], |message| message.as_bytes()));
}

/// A call that the sandbox refuses ends the process: something has gone wrong with its thread, or a guest has taken it over.
#[allow(unsafe_code, reason = "it runs as a signal handler")]
extern "C" fn on_refused_call(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    /// <asm-generic/siginfo.h>: the signal is a filter's.
    const SYS_SECCOMP: libc::c_int = 1;
    /// Bytes of a line.
    const LINE: usize = 160;

    console::restore_terminal();
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    if unsafe { (*info).si_code } != SYS_SECCOMP {
        return console::raise_by_default(signal);
    }
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME, which is async-signal-safe, writes 16 bytes at most; with SA_SIGINFO the kernel passes a valid context.
    let registers = unsafe {
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs
    };
    let register = |index| registers.get(index as usize).copied().unwrap_or(-1);
    let name = CStr::from_bytes_until_nul(&name).ok();
    let call = Call {
        number: register(libc::REG_RAX),
        request: register(libc::REG_RSI) as u32,
        thread: name.and_then(|name| name.to_str().ok()).unwrap_or("?"),
    };
    let mut line = [0u8; LINE];
    let mut rest = line.as_mut_slice();
    // To format a call allocates nothing.
    let _ = writeln!(
        rest,
        "minivmm: error: the sandbox refused a system call: {call}"
    );
    let len = LINE - rest.len();
    end_with(line.get(..len).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_name_file_descriptors() {
        for (arg, named) in [
            ("/dev/fd/63", &[63][..]),
            ("path=/proc/self/fd/3,ro", &[3]),
            ("file=/dev/fd/4", &[4]),
            ("mac=02:00:00:00:00:01,fd=7", &[7]),
            ("/dev/fd/", &[]),
            ("/dev/fd/99999999999", &[]),
            ("/fd", &[]),
            ("/dev/fd/5/fd/6", &[5, 6]),
        ] {
            assert_eq!(named_files(OsStr::new(arg)), named, "{arg}");
        }
    }
}
