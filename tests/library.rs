//! minivmm as a library: several VMs in one process, with nothing of the command line.

mod common;
#[path = "../examples/two_vms.rs"]
mod two_vms;

use std::time::{Duration, Instant};

use common::{PATIENCE, tiny};
use minivmm::vmm::outcome::Outcome;
use two_vms::{Captured, start, wait_for_all};

/// Waits until the guest has written something.
fn await_output(output: &Captured) -> Vec<u8> {
    let limit = Instant::now() + PATIENCE;
    loop {
        let bytes = output.bytes();
        if !bytes.is_empty() {
            return bytes;
        }
        assert!(Instant::now() < limit, "the guest writes nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn two_vms_run_at_once_and_end_each_for_itself() {
    // Both spin after their output, so that they are alive at the same time.
    let (spinning, first_output) = start(&tiny("ends"), "ms").unwrap();
    let (second, second_output) = start(&tiny("ends"), "ms").unwrap();
    assert_eq!(await_output(&first_output), await_output(&second_output));
    assert!(spinning.control().how_it_ended().is_none());
    assert!(second.control().how_it_ended().is_none());

    // A third one comes and ends while the others run.
    let (third, third_output) = start(&tiny("ends"), "me7").unwrap();
    let mut third = [third];
    assert_eq!(
        wait_for_all(&mut third).unwrap(),
        [Outcome::Exit(b'7')],
        "only the third VM wrote a status"
    );
    assert_eq!(third_output.bytes(), first_output.bytes());

    // The end of one is not the other's.
    second.control().end(Outcome::Deadline);
    let mut second = [second];
    assert_eq!(wait_for_all(&mut second).unwrap(), [Outcome::Deadline]);
    assert!(spinning.control().how_it_ended().is_none());
    spinning.control().end(Outcome::Quit);
    let mut spinning = [spinning];
    assert_eq!(wait_for_all(&mut spinning).unwrap(), [Outcome::Quit]);
}

#[test]
fn pausing_one_vm_leaves_the_other_running() {
    let (paused, output) = start(&tiny("ends"), "ms").unwrap();
    await_output(&output);
    assert!(paused.pause(), "the vCPU stands still");
    let (other, _) = start(&tiny("hello"), "").unwrap();
    let mut other = [other];
    assert_eq!(wait_for_all(&mut other).unwrap(), [Outcome::PowerOff]);
    paused.resume();
    assert!(paused.pause(), "a resumed VM can be paused again");
    paused.resume();
    paused.control().end(Outcome::Quit);
    let mut paused = [paused];
    assert_eq!(wait_for_all(&mut paused).unwrap(), [Outcome::Quit]);
}
