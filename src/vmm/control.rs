//! A VM's state: what its threads and its owner agree on.
//!
//! ```text
//!            pause                    (all vCPUs stand)
//! running ----------> pausing ------------------------> paused
//!    ^ |                 |                               | |
//!    | |  end            | end              end          | | resume
//!    | +-----------------+----------> ended <------------+ |
//!    +-----------------------------------------------------+
//! ```
//!
//! The first end counts; nothing leads out of it.

use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use minivmm_devices::event::{EventSink, GuestEvent};
use vmm_sys_util::eventfd::EventFd;

use super::outcome::Outcome;

/// What a vCPU's thread has to do before it enters the guest again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Go on.
    Run,
    /// Complete the access in hand, and stand still.
    Pause,
    /// Leave.
    End,
}

/// How a VM ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct End {
    /// Why.
    pub outcome: Outcome,
    /// The vCPU whose failure it was.
    pub vcpu: Option<u8>,
}

/// The state, shared by the owner of the VM, its vCPUs' threads and its devices.
pub struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// A copy of `State::request`, for vCPUs to look at between two exits.
    request: AtomicU8,
    ended: EventFd,
}

struct State {
    request: Request,
    /// vCPU threads that stand still.
    parked: usize,
    /// Whether a pause lasts until [`Control::release`].
    held: bool,
    end: Option<End>,
}

impl Control {
    /// A VM that runs as soon as its vCPUs do.
    pub fn new() -> std::io::Result<Self> {
        Ok(Self {
            state: Mutex::new(State {
                request: Request::Run,
                parked: 0,
                held: false,
                end: None,
            }),
            changed: Condvar::new(),
            request: AtomicU8::new(Request::Run as u8),
            ended: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?,
        })
    }

    /// What devices report, turned into the VM's end.
    pub fn event_sink(
        self: &Arc<Self>,
        boot_mark: Option<Box<dyn Fn(u8) + Send + Sync>>,
        hold_at: Option<(u8, EventFd)>,
    ) -> EventSink {
        let control = Arc::clone(self);
        let held = AtomicBool::new(false);
        Arc::new(move |event| match event {
            GuestEvent::PowerOff => control.end(Outcome::PowerOff),
            GuestEvent::Reset => control.end(Outcome::Reset),
            GuestEvent::Panicked => control.end(Outcome::Panicked),
            GuestEvent::Exit(status) => control.end(Outcome::Exit(status)),
            GuestEvent::BootMark(mark) => {
                if let Some((at, reached)) = &hold_at
                    && *at == mark
                    && !held.swap(true, Ordering::Relaxed)
                {
                    control.hold();
                    // Its counter has room: it is written once.
                    let _ = reached.write(1);
                }
                if let Some(observe) = &boot_mark {
                    observe(mark);
                }
            }
        })
    }

    /// Ends the VM for this reason, unless it has ended already.
    pub fn end(&self, outcome: Outcome) {
        self.end_by(outcome, None);
    }

    /// The same for the failure of a vCPU.
    pub fn end_by(&self, outcome: Outcome, vcpu: Option<u8>) {
        let mut state = self.state();
        if state.end.is_none() {
            state.end = Some(End { outcome, vcpu });
            self.ask(&mut state, Request::End);
            // An eventfd refuses a write only when its counter is full; then its reader is awake.
            let _ = self.ended.write(1);
        }
    }

    /// Readable once the VM has ended.
    pub fn ended(&self) -> &EventFd {
        &self.ended
    }

    /// How the VM ended, if it has.
    pub fn how_it_ended(&self) -> Option<End> {
        self.state().end.clone()
    }

    /// Waits until the VM has ended, at most for `limit`.
    pub fn await_end(&self, limit: Option<Duration>) {
        drop(self.wait_while(limit, |state| state.end.is_none()));
    }

    /// Waits while this is so, at most for `limit`; gives the state as it is then.
    fn wait_while(
        &self,
        limit: Option<Duration>,
        mut is_so: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'_, State> {
        let state = self.state();
        match limit {
            Some(limit) => {
                let waited = self.changed.wait_timeout_while(state, limit, is_so);
                waited.unwrap_or_else(PoisonError::into_inner).0
            }
            None => {
                let waited = self.changed.wait_while(state, &mut is_so);
                waited.unwrap_or_else(PoisonError::into_inner)
            }
        }
    }

    /// What a vCPU has to do.
    pub fn request(&self) -> Request {
        match self.request.load(Ordering::Acquire) {
            r if r == Request::Run as u8 => Request::Run,
            r if r == Request::Pause as u8 => Request::Pause,
            _ => Request::End,
        }
    }

    /// Asks the vCPUs to stand still; `false` if the VM has ended. Each must be kicked out of the guest after that.
    pub fn ask_to_pause(&self) -> bool {
        let mut state = self.state();
        if state.end.is_none() {
            self.ask(&mut state, Request::Pause);
        }
        state.end.is_none()
    }

    /// Waits until `vcpus` threads stand still. `false` if the VM has ended, or they do not within `limit`.
    pub fn await_pause(&self, vcpus: usize, limit: Duration) -> bool {
        let state = self.wait_while(Some(limit), |state| {
            state.end.is_none() && state.parked < vcpus
        });
        state.end.is_none() && state.parked >= vcpus
    }

    /// The same, from a vCPU's thread: it enters the guest no more, and the pause lasts until [`Control::release`].
    pub fn hold(&self) {
        let mut state = self.state();
        if state.end.is_none() {
            state.held = true;
            self.ask(&mut state, Request::Pause);
        }
    }

    /// Ends what [`Control::hold`] began.
    pub fn release(&self) {
        self.state().held = false;
        self.resume();
    }

    /// Lets paused vCPUs go on, unless they are held.
    pub fn resume(&self) {
        let mut state = self.state();
        if state.request == Request::Pause && !state.held {
            self.ask(&mut state, Request::Run);
        }
    }

    /// A vCPU's thread stands still here for as long as it is asked to.
    pub fn park(&self) {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        while state.request == Request::Pause {
            state = self
                .changed
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.parked -= 1;
    }

    fn ask(&self, state: &mut State, request: Request) {
        state.request = request;
        self.request.store(request as u8, Ordering::Release);
        self.changed.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::thread;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn the_first_end_counts() {
        let control = Control::new().unwrap();
        assert_eq!(control.how_it_ended(), None);
        control.end_by(Outcome::Exit(3), Some(1));
        control.end(Outcome::Deadline);
        let end = End {
            outcome: Outcome::Exit(3),
            vcpu: Some(1),
        };
        assert_eq!(control.how_it_ended(), Some(end));
        assert_eq!(control.ended().read().unwrap(), 1);
        assert_eq!(control.request(), Request::End);
        assert!(!control.ask_to_pause());
        control.resume();
        assert_eq!(control.request(), Request::End);
    }

    #[test]
    fn paused_threads_stand_until_they_are_resumed() {
        let control = Arc::new(Control::new().unwrap());
        let threads: Vec<_> = (0..3)
            .map(|_| {
                let control = Arc::clone(&control);
                thread::spawn(move || {
                    let mut pauses = 0;
                    loop {
                        match control.request() {
                            Request::Run => thread::yield_now(),
                            Request::Pause => {
                                control.park();
                                pauses += 1;
                            }
                            Request::End => return pauses,
                        }
                    }
                })
            })
            .collect();
        for _ in 0..20 {
            assert!(control.ask_to_pause() && control.await_pause(3, LONG));
            assert_eq!(control.state().parked, 3);
            control.resume();
        }
        assert!(control.ask_to_pause() && control.await_pause(3, LONG));
        control.end(Outcome::Quit);
        assert!(!control.await_pause(3, LONG));
        for thread in threads {
            assert!(thread.join().unwrap() >= 1);
        }
    }

    #[test]
    fn a_held_vm_is_not_resumed_by_others() {
        let control = Control::new().unwrap();
        control.hold();
        assert!(control.ask_to_pause());
        control.resume();
        assert_eq!(control.request(), Request::Pause);
        control.release();
        assert_eq!(control.request(), Request::Run);
    }

    #[test]
    fn a_pause_that_never_comes_is_given_up() {
        let control = Control::new().unwrap();
        assert!(control.ask_to_pause() && !control.await_pause(1, Duration::from_millis(1)));
    }
}
