//! Raw mode of the terminal on stdin, and its restoration on every way out.
//!
//! The terminal outlives the process, so its state is global: a panic hook or a fatal signal's handler must be able to restore
//! it. Only a foreground process may change the terminal; a background process would be stopped (SIGTTOU).

use std::io;
use std::os::fd::AsFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Once, OnceLock};

use rustix::termios::{
    OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// The terminal as it was found. Set once, before `RAW` is first set.
static ORIGINAL: OnceLock<Termios> = OnceLock::new();
/// This process has made the terminal raw.
static RAW: AtomicBool = AtomicBool::new(false);
/// The terminal should be raw while this process is in the foreground.
static WANTED: AtomicBool = AtomicBool::new(false);

/// Keeps the terminal on stdin raw while it lives.
#[derive(Debug)]
#[must_use = "dropping it restores the terminal"]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal on stdin raw, and arranges that a fault restores it; [`crate::cli::process::install_fault_handlers`] does so
    /// for panics and aborts, and [`crate::console::Signals`] has what is sent to end the process. `None` if stdin is no
    /// terminal. In the background the terminal is left alone until the first input or [`reenter_raw`] in the
    /// foreground.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        if ORIGINAL.get().is_none() {
            let _ = ORIGINAL.set(tcgetattr(&stdin)?);
        }
        static HOOKS: Once = Once::new();
        HOOKS.call_once(restore_on_fatal_signals);
        WANTED.store(true, Ordering::SeqCst);
        let guard = Self(());
        set_raw()?;
        Ok(Some(guard))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore_terminal();
    }
}

/// Gives the terminal back as it was found, for good. May be called any number of times, from any thread, also from a
/// signal handler; without [`RawTerminal::enter`] it does nothing.
pub fn restore_terminal() {
    WANTED.store(false, Ordering::SeqCst);
    lend_terminal();
}

/// Gives the terminal back as it was found until [`reenter_raw`]: for the time that the process is stopped.
pub fn lend_terminal() {
    if RAW.load(Ordering::SeqCst) {
        let stdin = rustix::stdio::stdin();
        if let Some(original) = ORIGINAL.get()
            && in_foreground(stdin)
        {
            // Nothing is left to be done about a terminal that has gone.
            let _ = tcsetattr(stdin, OptionalActions::Now, original);
        }
        // Afterwards, so that no one who finds it false ends the process too early.
        RAW.store(false, Ordering::SeqCst);
    }
}

/// After a SIGCONT: the shell has given the terminal its own modes while we were stopped. Does nothing where
/// [`RawTerminal`] is not held or we are in the background.
pub fn reenter_raw() {
    if let Err(e) = set_raw() {
        log::warn!("cannot make the terminal raw again: {e}");
    }
}

/// Whether the terminal is raw now, so that a line on it must end with CR and LF.
pub fn is_raw() -> bool {
    RAW.load(Ordering::SeqCst)
}

/// Before input is taken from the terminal `fd`: whether it is ours, and if it has just become ours, makes it raw.
pub(super) fn ready_for_input(fd: impl AsFd) -> bool {
    if !in_foreground(fd) {
        return false;
    }
    if !is_raw() {
        reenter_raw();
    }
    true
}

fn set_raw() -> io::Result<()> {
    if !WANTED.load(Ordering::SeqCst) {
        return Ok(());
    }
    let stdin = rustix::stdio::stdin();
    let (Some(original), true) = (ORIGINAL.get(), in_foreground(stdin)) else {
        RAW.store(false, Ordering::SeqCst);
        return Ok(());
    };
    // Before, so that a signal in between restores.
    RAW.store(true, Ordering::SeqCst);
    Ok(tcsetattr(
        stdin,
        OptionalActions::Now,
        &raw_modes(original),
    )?)
}

/// No echo, no lines, no signals, no translation: every key goes to the guest as it is, and so does its output.
pub(super) fn raw_modes(termios: &Termios) -> Termios {
    let mut raw = termios.clone();
    raw.make_raw();
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    raw
}

/// Whether we may use the terminal. One that is not our controlling terminal knows no background.
fn in_foreground(fd: impl AsFd) -> bool {
    tcgetpgrp(fd).map_or(true, |group| group == rustix::process::getpgrp())
}

/// What a faulting instruction ends a process with. They come again when the handler returns.
const FAULTS: [libc::c_int; 4] = [libc::SIGILL, libc::SIGBUS, libc::SIGFPE, libc::SIGSEGV];
/// What was done about them before, in the same order.
static PREVIOUS: [OnceLock<libc::sigaction>; 4] = [const { OnceLock::new() }; 4];
/// The other signal that an instruction can set off, a breakpoint. [`crate::cli::process`] has SIGSYS.
const TRAPS: [libc::c_int; 1] = [libc::SIGTRAP];

#[allow(unsafe_code, reason = "no safe interface handles fatal signals")]
fn restore_on_fatal_signals() {
    let previous = PREVIOUS.iter().map(Some).chain(std::iter::repeat(None));
    for (signal, previous) in FAULTS.into_iter().chain(TRAPS).zip(previous) {
        // SAFETY: an all-zero sigaction is a valid value: SIG_DFL, no flags, an empty mask.
        let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
        // SAFETY: with a null new action, sigaction only writes the current one to `action`, which is ours.
        if unsafe { libc::sigaction(signal, ptr::null(), &mut action) } != 0 {
            continue;
        }
        match previous {
            // It must be there before the handler can run.
            Some(previous) => _ = previous.set(action),
            None if action.sa_sigaction == libc::SIG_IGN => continue,
            None => {}
        }
        action.sa_sigaction = on_fatal_signal as *const () as usize;
        // On the alternate stack where there is one, as a stack overflow needs.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        // SAFETY: `action` is a current action with a handler of the signature that SA_SIGINFO asks for, and the handler
        // does only what is async-signal-safe.
        unsafe { libc::sigaction(signal, &action, ptr::null_mut()) };
    }
}

/// Restores the terminal, then lets the signal do what it would have done without us.
#[allow(unsafe_code, reason = "it runs as a signal handler")]
extern "C" fn on_fatal_signal(
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    restore_terminal();
    // SAFETY: with SA_SIGINFO the kernel passes a valid siginfo.
    let sent = unsafe { (*info).si_code } <= 0;
    let previous = FAULTS
        .iter()
        .position(|s| *s == signal)
        .and_then(|i| PREVIOUS.get(i)?.get());
    match previous {
        // The faulting instruction faults again when the handler returns. It may have run out of stack, which Rust's own
        // handler explains.
        Some(previous) if !sent => {
            // SAFETY: `previous` is an action that sigaction itself returned, for this signal.
            unsafe { libc::sigaction(signal, previous, ptr::null_mut()) };
        }
        // What was sent has to be sent again, past any handler that waits for a fault; it is blocked until we return.
        _ => raise_by_default(signal),
    }
}

/// From a signal's handler: has it do what it does by default.
#[allow(unsafe_code, reason = "it is called in signal handlers")]
pub fn raise_by_default(signal: libc::c_int) {
    // SAFETY: both are async-signal-safe, and SIG_DFL is an action for any signal.
    unsafe {
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
