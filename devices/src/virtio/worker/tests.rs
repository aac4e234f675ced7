use std::sync::atomic::AtomicUsize;

use super::*;
use crate::state::{Record, SaveState, StateError, Suspend};
use crate::virtio::device::VirtioDevice;
use crate::virtio::rng;
use crate::virtio::testing::{DATA, Driver, WRITE, wait};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EFD_SEMAPHORE};

/// A device with two queues and a further descriptor on one thread: it writes a byte to each buffer.
struct TwoQueues {
    workers: [QueueWorker; 1],
}

impl TwoQueues {
    fn new(threads: &ThreadStarter, further: EventFd, seen: Arc<AtomicUsize>) -> Self {
        let descriptors = [further.as_raw_fd()];
        let name = "two queues".to_owned();
        let worker = QueueWorker::new(
            threads,
            ThreadKind::Rng,
            name,
            0..2,
            &descriptors,
            move |worker, queues| serve(worker, queues, &further, &seen),
        );
        Self {
            workers: [worker.unwrap()],
        }
    }
}

fn serve<'m>(
    worker: &'m WorkerContext,
    queues: &mut [QueueContext<'m>],
    further: &EventFd,
    seen: &AtomicUsize,
) -> Result<(), QueueError> {
    let mut chain = Chain::default();
    worker.run(queues, |queue| {
        seen.fetch_add(further.read().unwrap_or(0) as usize, Ordering::Relaxed);
        queue.handle_all(&mut chain, |chain| {
            Ok(chain.writable.write_front(b"x") as u32)
        })
    })
}

impl SaveState for TwoQueues {
    fn save(&self) -> Result<Box<Record>, StateError> {
        Err(StateError::NotPaused)
    }

    fn restore(&mut self, _: &Record) -> Result<(), StateError> {
        Err(StateError::NotPaused)
    }
}

impl VirtioDevice for TwoQueues {
    fn device_type(&self) -> u32 {
        rng::DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16, 16]
    }

    fn read_config(&self, _offset: u64, _data: &mut [u8]) {}

    fn workers(&mut self) -> &mut [QueueWorker] {
        &mut self.workers
    }
}

#[test]
fn one_thread_serves_queues_and_descriptors() {
    let started = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&started);
    let threads = ThreadStarter::new(move |kind| {
        assert_eq!(kind, ThreadKind::Rng);
        counter.fetch_add(1, Ordering::Relaxed);
    });
    let (further, seen) = (EventFd::new(EFD_NONBLOCK).unwrap(), Arc::default());
    let device = TwoQueues::new(&threads, further.try_clone().unwrap(), Arc::clone(&seen));
    let mut driver = Driver::new(Box::new(device));
    driver.queues = 0..2;
    let mut written = 0;
    // The thread is one and the same after a reset, and with one queue taken back.
    for _ in 0..3 {
        driver.start(0);
        for round in 0..20 {
            driver.queue = round % 2;
            assert_eq!(driver.request(&[(DATA, 4, WRITE)]), 1);
            further.write(1).unwrap();
            written += 1;
            wait("what woke it", || seen.load(Ordering::Relaxed) == written);
        }
        driver.take_back(1);
        driver.queue = 0;
        assert_eq!(driver.request(&[(DATA, 4, WRITE)]), 1);
    }
    drop(driver);
    assert_eq!(started.load(Ordering::Relaxed), 1);
}

/// Firecracker #6074: with EVENT_IDX, a device that went on looked at its queue without end.
#[test]
fn a_resumed_worker_sleeps() {
    // Each turn reads a one from it.
    let further = EventFd::new(EFD_NONBLOCK | EFD_SEMAPHORE).unwrap();
    further.write(1 << 40).unwrap();
    let turns = Arc::default();
    let device = TwoQueues::new(&ThreadStarter::default(), further, Arc::clone(&turns));
    let mut driver = Driver::new(Box::new(device));
    driver.queues = 0..2;
    driver.start(0);
    driver.request(&[(DATA, 4, WRITE)]);
    for _ in 0..20 {
        assert!(driver.transport.pause(Duration::from_secs(20)));
        assert!(driver.transport.resume());
        driver.request(&[(DATA, 4, WRITE)]);
    }
    std::thread::sleep(Duration::from_millis(50));
    // A few for each start, stop and notification.
    let turns = turns.load(Ordering::Relaxed);
    assert!((40..1000).contains(&turns), "{turns}");
}
