//! Runs a VM: ties it to the console, the signals, the deadline and the timeline.

use std::io::Write;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use minivmm_devices::chardev::tell_of_tx_space;
use minivmm_devices::thread::ThreadStarter;

use super::confine;
use super::final_log::{FinalLog, emit, explain, report, summary};
use super::guest_log::SleepCheck;
use super::plan::{Plan, Streams};
use super::process;
use super::release::{Wait, release};
pub use super::run_error::{RunError, config_hint};
use super::snapshot_at::Saver;
use super::watch::{DRAIN_TIMEOUT, Watch};
use crate::config::{ConsoleTarget, OnReboot};
use crate::console::{self, Console, ConsoleInput, FrameSink, InputOutcome, RawTerminal, Signals};
use crate::guest::{EXEC_PORT, Exec};
use crate::observe::timeline::Timeline;
use crate::observe::transcript::SharedTranscript;
use crate::sandbox::Sandbox;
use crate::vmm::ending;
use crate::vmm::error::{VmError, host};
use crate::vmm::event_loop::EventLoop;
use crate::vmm::networks::Networks;
use crate::vmm::outcome::Outcome;
use crate::vmm::prepare::{BuildTimes, Prepared};
use crate::vmm::vcpu::VcpuError;
use crate::vmm::vm::{ConsoleEnds, Observers, Vm};

/// How often devices that the host could not let be paused are asked whether they go on.
const RESUME_PERIOD: Duration = Duration::from_millis(10);

/// From now on, signals that ask minivmm to end, and the deadline, end the process.
///
/// To be called from a process's first thread, before it has others: signals are blocked for all that follow.
pub fn watch(deadline: Option<Instant>) -> Result<Watch, RunError> {
    let signals = Signals::block().map_err(host("signal handling"))?;
    start_watch(&Arc::new(signals), deadline, None)
}

fn start_watch(
    signals: &Arc<Signals>,
    deadline: Option<Instant>,
    console: Option<Console>,
) -> Result<Watch, RunError> {
    Watch::start(Arc::clone(signals), deadline, console)
        .map_err(|source| VmError::from(VcpuError::Thread(0, source)).into())
}

/// Builds the VM of `plan` and runs it to its end, again after every reset if the configuration wants it.
/// `started` is where the deadline counts from; what happens when goes to `timeline`. While the VM is not ready for signals
/// and deadline, `watch` is.
pub fn run(
    plan: &Plan,
    started: Instant,
    watch: Watch,
    timeline: &mut Timeline,
) -> Result<Outcome, RunError> {
    let config = &plan.config;
    let signals = Arc::clone(watch.signals());
    let deadline = config.deadline.and_then(|span| span.after(started));
    watch.set_deadline(deadline);

    let sandbox = confine::sandbox(config, confine::main_role(plan))?;
    let threads = confine::threads(&sandbox);
    watch.confine(&threads);
    // Files and KVM are looked at before the terminal is touched, so that errors are read on a sane one.
    let networks = Networks::open(config, &threads)?;
    let prepared = plan.prepare(&networks, &threads, false, timeline)?;
    let source = plan.snapshot.as_ref().map(|(snapshot, _)| &**snapshot);
    let saver = Saver::open(plan.snapshot_at.as_ref(), source).map_err(VmError::from)?;
    if let Some(source) = source {
        process::name_file_on_bus_error(&source.path);
    }
    let (console, stderr, input) = plan.open_consoles(&threads)?;
    let terminal = match config.serial {
        ConsoleTarget::Stdio if plan.streams.is_none_or(Streams::share_terminal) => {
            RawTerminal::enter().map_err(host("the terminal"))?
        }
        _ => None,
    };
    let mut run = Run {
        plan,
        saver,
        sandbox: &sandbox,
        networks: &networks,
        threads: &threads,
        console: &console,
        stderr: stderr.as_ref(),
        input,
        signals: &signals,
        deadline,
        stopping: None,
        timeline,
    };
    let ended = run.until_the_end(prepared, watch);
    // The output of a guest that ended by itself, or cannot be started again, is delivered however slow the reader is. After an
    // external stop, the console is drained for at most DRAIN_TIMEOUT.
    let ended_by = ended.as_ref().map(|(outcome, _)| outcome);
    let stopped = ended_by.is_ok_and(Outcome::is_external);
    let limit = Instant::now() + DRAIN_TIMEOUT;
    let give_up = || {
        let late = Instant::now() > limit;
        if late {
            // Keys go nowhere any more; cooked, Ctrl-C at least is a signal.
            console::restore_terminal();
        }
        signals.stop_requested().is_some()
            || (stopped && late)
            || deadline.is_some_and(|deadline| Instant::now() > deadline)
    };
    (std::iter::once(&console).chain(&stderr)).for_each(|console| console.finish(&give_up));
    let dropped = console.bytes_dropped();
    if dropped > 0 {
        log::info!("{dropped} bytes of console output went nowhere");
    }
    // Behind the guest's last words, and on a terminal that is no longer raw.
    drop(terminal);
    let (outcome, final_log) = ended?;
    // Memory that has gone may be an error of KVM_RUN or a guest without handlers.
    if let Some(source) = source
        && matches!(outcome, Outcome::VcpuFailed(_))
    {
        source.check_unchanged().map_err(VmError::from)?;
    }
    emit(final_log);
    Ok(outcome)
}

/// What the event loop waits for.
#[derive(Clone, Copy)]
enum Source {
    Ended,
    Signal,
    Input,
    /// The console's device can take input again.
    ConsoleReady,
    /// The guest has written the boot mark at which it is saved.
    Held,
    /// Nobody reads a program's stdout any more.
    ReaderGone,
}

/// What all boots of a VM have in common.
struct Run<'a> {
    plan: &'a Plan,
    /// Until the VM is saved.
    saver: Option<Saver>,
    sandbox: &'a Sandbox,
    networks: &'a Networks,
    threads: &'a ThreadStarter,
    console: &'a Console,
    /// Where COM1 goes if the console is a program's stdout.
    stderr: Option<&'a Console>,
    input: ConsoleInput,
    signals: &'a Arc<Signals>,
    deadline: Option<Instant>,
    /// The signal at which the image's init was told to power off, and when that must have come.
    stopping: Option<(i32, Instant)>,
    timeline: &'a mut Timeline,
}

impl Run<'_> {
    /// Runs the VM to its end, and again after every reset if the configuration wants it.
    fn until_the_end(
        &mut self,
        mut prepared: Prepared,
        mut watch: Watch,
    ) -> Result<(Outcome, FinalLog), RunError> {
        loop {
            let (outcome, final_log) = self.boot(prepared, watch)?;
            if !self.boots_again(&outcome) {
                return Ok((outcome, final_log));
            }
            emit(final_log);
            log::info!("the guest reset the machine: booting again");
            watch = start_watch(self.signals, self.deadline, Some(self.console.clone()))?;
            watch.confine(self.threads);
            prepared = (self.plan).prepare(self.networks, self.threads, true, self.timeline)?;
        }
    }

    /// Whether the VM is to boot again after this end.
    fn boots_again(&self, outcome: &Outcome) -> bool {
        *outcome == Outcome::Reset && self.plan.config.on_reboot == OnReboot::Restart
    }

    /// Builds the VM, and runs it to its end.
    fn boot(&mut self, prepared: Prepared, watch: Watch) -> Result<(Outcome, FinalLog), RunError> {
        let watched = self.timeline.watches_boot();
        let transcript = SharedTranscript::new(watched);
        self.log()
            .start_of_vm(Box::new(transcript.clone()), watched);
        let ends = self.console_ends();
        let marks = self.timeline.boot_marks();
        let saver = self.saver.as_ref();
        let hold_at = saver.map(Saver::hold_at).transpose();
        let observers = Observers {
            hold_at: hold_at.map_err(host("an eventfd"))?,
            boot_mark: Some(Box::new(move |mark| {
                if let Some(marks) = &marks {
                    marks.note(mark);
                }
                log::info!("boot mark {mark}");
            })),
            profile_exits: watched,
        };
        let recorder = self.plan.recorder(prepared.mem());
        let mut times = BuildTimes::default();
        let mut vm = Vm::build(prepared, ends, observers, &mut times)
            .inspect_err(|_| self.plan.forget_template())?;
        self.timeline.note_build(&times);
        let senders = vm.senders();
        let on_ready: Arc<dyn Fn() + Send + Sync> = Arc::new(move || tell_of_tx_space(&senders));
        self.console.on_output_ready(Arc::clone(&on_ready));
        self.log().on_output_ready(on_ready);
        transcript.get().on_panic_end = Some(ending::on_panic_end(&vm));

        let events = self.sources(&vm).map_err(host("the event loop"))?;
        let control = Arc::clone(vm.control());
        let paths = || confine::paths(self.plan, self.console.pty_path());
        let started = vm.start(
            || self.sandbox.confine_main(paths).map_err(RunError::from),
            Some(Box::new(move |job| watch.hand_over(job, control))),
        );
        let looped = self.serve(&vm, &events);
        let end = vm.join();
        self.log().observe();
        transcript.get().on_panic_end = None;
        let (phases, bytes) = (transcript.get().phases(), self.log().bytes_out());
        let nets = self.networks;
        self.timeline.end_of_boot(&vm, nets, phases, bytes);
        if let (Some(recorder), false) = (recorder, end.outcome.is_external()) {
            recorder.record(vm.mem());
        }
        let summary = summary(&vm);
        let interrupted = self.stop_devices(&mut vm, &end.outcome);
        started?;
        looped.map_err(host("the event loop"))?;
        let saw_panic = transcript.get().saw_panic();
        // That a container's program was stopped says nothing about the machine.
        let is_program = self.input.credit().is_some_and(|credit| credit.is_open());
        let bytes = self.log().bytes_out();
        let (outcome, mut lines) = explain(&vm, &end, interrupted, saw_panic, &summary);
        if !(outcome.is_external() && is_program) {
            lines.extend(report(&vm, &end, &outcome, bytes));
        }
        Ok((outcome, lines))
    }

    /// The console that has the kernel's log.
    fn log(&self) -> &Console {
        self.stderr.unwrap_or(self.console)
    }

    fn console_ends(&self) -> ConsoleEnds {
        let mut virtio = self.console.sink();
        if let (Some(stderr), Some(credit)) = (self.stderr, self.input.credit()) {
            virtio = Box::new(FrameSink::new(virtio, stderr.sink(), Arc::clone(credit)));
        }
        ConsoleEnds {
            serial: self.log().sink(),
            virtio,
            size: self.input.terminal_size(),
        }
    }

    /// What the event loop waits for.
    fn sources(&self, vm: &Vm) -> std::io::Result<EventLoop<Source>> {
        let mut events = EventLoop::new()?;
        events.add(vm.control().ended(), false, Source::Ended)?;
        events.add(&**self.signals, false, Source::Signal)?;
        events.add(vm.console_ready(), false, Source::ConsoleReady)?;
        if let Some(credit) = self.input.credit() {
            events.add(&**credit.reader_gone(), true, Source::ReaderGone)?;
        }
        if let Some(saver) = &self.saver {
            events.add(&saver.held, true, Source::Held)?;
        }
        self.input.add_to(&mut events, Source::Input)?;
        Ok(events)
    }

    /// Serves console, signals and deadline until the VM has ended.
    fn serve(&mut self, vm: &Vm, events: &EventLoop<Source>) -> std::io::Result<()> {
        let control = vm.control();
        self.send_size();
        // A restarted VM may find input that was read from no edge of its own.
        self.pump(vm);
        // Whether no device waits for the host since it could not be paused.
        let mut resumed = true;
        let mut sleep_check = log::log_enabled!(log::Level::Info).then(SleepCheck::new);
        loop {
            let next = sleep_check.as_ref().map(|check| check.next);
            let again = (!resumed).then(|| Instant::now() + RESUME_PERIOD);
            let limit = self.stopping.map(|(_, limit)| limit);
            let limits = self.deadline.into_iter().chain(limit);
            let next = limits.chain(next).chain(again).min();
            let ready = events.wait(next)?;
            let now = Instant::now();
            resumed = resumed || vm.resume_devices();
            if self.deadline.is_some_and(|deadline| deadline <= now) {
                control.end(Outcome::Deadline);
                return Ok(());
            }
            if let Some((signal, _)) = self.stopping.filter(|(_, limit)| *limit <= now) {
                control.end(Outcome::Signal(signal));
                return Ok(());
            }
            if let Some(check) = &mut sleep_check {
                check.look(vm, now);
            }
            for source in ready {
                match source {
                    Source::Ended => return Ok(()),
                    Source::Signal => {
                        if let Some(signal) = self.signals.stop_requested()
                            && !self.input.forward_signal(signal)
                            && !self.power_off(vm, signal)
                        {
                            control.end(Outcome::Signal(signal));
                            return Ok(());
                        }
                        // It may have been a SIGCONT or a SIGWINCH.
                        self.after_stop(vm);
                    }
                    Source::ConsoleReady => _ = vm.console_ready().read(),
                    Source::Held => {
                        if let Some(saver) = self.saver.take() {
                            resumed = saver.save(vm, self.signals, self.deadline);
                        }
                    }
                    // As a program that writes to such a pipe ends.
                    Source::ReaderGone => {
                        control.end(Outcome::Signal(libc::SIGPIPE));
                        return Ok(());
                    }
                    Source::Input => {}
                }
                self.pump(vm);
            }
        }
    }

    /// Has an image's own init power off, at the first signal; whether it was told.
    fn power_off(&mut self, vm: &Vm, signal: i32) -> bool {
        let timeout = self.plan.streams.and_then(|streams| streams.init);
        let (None, Some(timeout), Some(mut guest)) =
            (self.stopping, timeout, vm.reserved_connection())
        else {
            return false;
        };
        self.stopping = Some((signal, Instant::now() + timeout));
        let connect = format!("CONNECT {EXEC_PORT}\n").into_bytes();
        let message = Exec::poweroff().message();
        let sent = message.and_then(|message| guest.write_all(&[connect, message].concat()));
        sent.is_ok()
    }

    /// The process may have been stopped: then there may be input that gave no event, and the terminal may have another size; and the
    /// guest has to know that it did not hang. Devices were stopped with the process and lose nothing: they need no pause of their own.
    fn after_stop(&mut self, vm: &Vm) {
        if let Some(size) = self.input.terminal_size() {
            let console = vm.console();
            let mut console = console.lock().unwrap_or_else(PoisonError::into_inner);
            console.resize(size);
        }
        self.send_size();
        if vm.pause() {
            vm.resume();
        }
    }

    fn send_size(&mut self) {
        if self.plan.streams.is_some_and(|streams| streams.terminal) {
            self.input.send_size();
        }
    }

    fn pump(&mut self, vm: &Vm) {
        if self.input.pump(&**vm.console()) == InputOutcome::Quit {
            vm.control().end(Outcome::Quit);
        }
    }

    /// Stops the devices; what interrupted that, if it took too long.
    fn stop_devices(&self, vm: &mut Vm, outcome: &Outcome) -> Option<Outcome> {
        let disks = vm.machine().disks.clone();
        let devices = vm.take_devices();
        if disks.is_empty() {
            return None;
        }
        let wait = Wait {
            outcome,
            signals: self.signals,
            deadline: self.deadline,
        };
        release(devices, disks, vm.mem(), &wait, self.boots_again(outcome))
    }
}
