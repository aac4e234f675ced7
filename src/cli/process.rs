//! The process that minivmm is: what it inherits, and how a bug or a lack of memory ends it.

use std::ffi::{CStr, OsStr};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::exit;
use std::sync::OnceLock;

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
    handle(libc::SIGABRT, on_abort);
    handle(libc::SIGSYS, on_refused_call);
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
fn handle(signal: libc::c_int, handler: Handler) {
    // SAFETY: an all-zero sigaction is a valid value: no flags, an empty mask.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as usize;
    // On the alternate stack where there is one, as a stack overflow needs.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: `action` has a handler of the signature that SA_SIGINFO asks for, which does only what is
    // async-signal-safe.
    unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
}

#[allow(unsafe_code, reason = "it runs as a signal handler")]
extern "C" fn on_abort(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    const MESSAGE: &[u8] = b"minivmm: error: aborted for the reason above; if that is memory, raise its limit (ulimit -v)\n";

    console::restore_terminal();
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo; getpid, write, _exit, signal and raise are
    // async-signal-safe, and the pointer and length are those of MESSAGE.
    unsafe {
        // abort(3) sends it with tgkill; whoever sends it from outside wants a core dump.
        if (*info).si_code == libc::SI_TKILL && (*info).si_pid() == libc::getpid() {
            libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(VMM_FAILED.into());
        }
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
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
        handle(libc::SIGBUS, on_bus_error);
    }
}

#[allow(unsafe_code, reason = "it runs as a signal handler")]
extern "C" fn on_bus_error(
    _signal: libc::c_int,
    _info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    console::restore_terminal();
    let message = BUS_ERROR
        .get()
        .map_or(&[][..], |message| message.as_bytes());
    // SAFETY: write and _exit are async-signal-safe, and the pointer and length are those of the message.
    unsafe {
        libc::write(2, message.as_ptr().cast(), message.len());
        libc::_exit(VMM_FAILED.into());
    }
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
    let mut line = [0u8; LINE];
    let mut name = [0u8; 16];
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo and context; PR_GET_NAME writes 16 bytes at most; prctl, poll, write,
    // _exit, signal and raise are async-signal-safe; to format a call allocates nothing.
    unsafe {
        if (*info).si_code != SYS_SECCOMP {
            libc::signal(signal, libc::SIG_DFL);
            libc::raise(signal);
            return;
        }
        libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr());
        let registers = &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let register = |index| registers.get(index as usize).copied().unwrap_or(-1);
        let call = Call {
            number: register(libc::REG_RAX),
            request: register(libc::REG_RSI) as u32,
            thread: CStr::from_bytes_until_nul(&name)
                .ok()
                .and_then(|name| name.to_str().ok())
                .unwrap_or("?"),
        };
        let mut rest = line.as_mut_slice();
        let _ = writeln!(
            rest,
            "minivmm: error: the sandbox refused a system call: {call}"
        );
        let len = LINE - rest.len();
        let mut stderr = libc::pollfd {
            fd: 2,
            events: libc::POLLOUT,
            revents: 0,
        };
        // Nobody may read it.
        if libc::poll(&raw mut stderr, 1, 200) != 0 {
            libc::write(2, line.as_ptr().cast(), len);
        }
        libc::_exit(VMM_FAILED.into());
    }
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
