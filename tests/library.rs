//! minivmm as a library: several VMs in one process, with nothing of the command line.

mod common;
#[path = "../examples/two_vms.rs"]
mod two_vms;

use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use common::{PATIENCE, tiny};
use minivmm::vmm::control::Request;
use minivmm::vmm::outcome::Outcome;
use two_vms::{Captured, start, wait_for_all};

/// Waits until the guest has written so many bytes.
fn await_output(output: &Captured, count: usize) -> Vec<u8> {
    let limit = Instant::now() + PATIENCE;
    loop {
        let bytes = output.bytes();
        if bytes.len() >= count {
            return bytes;
        }
        assert!(Instant::now() < limit, "the guest writes nothing");
        thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn two_vms_run_at_once_and_end_each_for_itself() {
    // Both spin after their output, so that they are alive at the same time.
    let (spinning, first_output) = start(&tiny("ends"), "ms").unwrap();
    let (second, second_output) = start(&tiny("ends"), "ms").unwrap();
    await_output(&first_output, 1);
    await_output(&second_output, 1);
    assert!(spinning.control().how_it_ended().is_none());
    assert!(second.control().how_it_ended().is_none());

    // A third one comes and ends while the others run, and each has its own console.
    let (third, third_output) = start(&tiny("ends"), "me7").unwrap();
    assert_eq!(
        wait_for_all(&mut [third]).unwrap(),
        [Outcome::Exit(b'7')],
        "only the third VM wrote a status"
    );
    let words = third_output.bytes();
    assert_eq!(await_output(&first_output, words.len()), words);
    assert_eq!(await_output(&second_output, words.len()), words);

    // The end of one is not the other's.
    second.control().end(Outcome::Deadline);
    assert_eq!(wait_for_all(&mut [second]).unwrap(), [Outcome::Deadline]);
    assert!(spinning.control().how_it_ended().is_none());
    spinning.control().end(Outcome::Quit);
    assert_eq!(wait_for_all(&mut [spinning]).unwrap(), [Outcome::Quit]);
}

#[test]
fn a_paused_vm_stands_still_while_another_runs() {
    let (paused, output) = start(&tiny("flood"), "").unwrap();
    await_output(&output, 1);
    assert!(paused.pause(), "the vCPU stands still");
    let written = output.bytes().len();
    let (other, _) = start(&tiny("hello"), "").unwrap();
    assert_eq!(
        wait_for_all(&mut [other]).unwrap(),
        [Outcome::PowerOff],
        "the pause is not the other VM's"
    );
    assert_eq!(output.bytes().len(), written, "a paused guest writes");
    paused.resume();
    await_output(&output, written + 1);
    paused.control().end(Outcome::Quit);
    assert_eq!(wait_for_all(&mut [paused]).unwrap(), [Outcome::Quit]);
}

#[test]
fn a_guest_goes_on_after_a_pause_that_was_given_up() {
    /// Enough for a vCPU's next access, and for a kick. If it is not, the pause may come, and the guest goes on all the same.
    const MOMENT: Duration = Duration::from_millis(50);
    let (vm, output) = start(&tiny("flood"), "").unwrap();
    await_output(&output, 1);
    let control = Arc::clone(vm.control());
    let [serial, _] = vm.senders().map(|device| device.upgrade().unwrap());
    let (tell, locked) = mpsc::channel();
    let helper = thread::spawn(move || {
        // The vCPU's next access waits for this, so that it cannot be paused.
        let held = serial.lock().unwrap();
        thread::sleep(MOMENT);
        tell.send(()).unwrap();
        while control.request() != Request::Pause {
            thread::yield_now();
        }
        // The kick comes right after the request.
        thread::sleep(MOMENT);
        control.resume();
        // The access in hand may write one byte.
        let wanted = output.bytes().len() + 100;
        drop(held);
        let limit = Instant::now() + PATIENCE;
        while output.bytes().len() < wanted && Instant::now() < limit {
            thread::sleep(Duration::from_millis(1));
        }
        control.end(Outcome::Quit);
        output.bytes().len() >= wanted
    });
    locked.recv().unwrap();
    let _ = vm.pause();
    assert!(helper.join().unwrap(), "the guest runs no more");
    assert_eq!(wait_for_all(&mut [vm]).unwrap(), [Outcome::Quit]);
}
