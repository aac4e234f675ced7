//! An event loop: file descriptors and a deadline, each source with a token by which its owner knows it.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Instant;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Events taken from the kernel at once.
const BATCH: usize = 8;

/// Sources to wait for. A source may be added and removed at any time.
pub struct EventLoop<T> {
    epoll: Epoll,
    sources: BTreeMap<RawFd, T>,
}

impl<T: Copy> EventLoop<T> {
    /// A loop without sources.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            epoll: Epoll::new()?,
            sources: BTreeMap::new(),
        })
    }

    /// Waits for `fd` to be readable from here on, and says `token` when it is: as long as it is, or with `edge` once each time
    /// it becomes so. A file that is always readable, as a regular one is, is no source: epoll does not take it.
    ///
    /// The descriptor must be removed before it is closed.
    pub fn add(&mut self, fd: &impl AsRawFd, edge: bool, token: T) -> io::Result<()> {
        let fd = fd.as_raw_fd();
        let mut events = EventSet::IN;
        if edge {
            events |= EventSet::EDGE_TRIGGERED;
        }
        let event = EpollEvent::new(events, fd as u64);
        match self.epoll.ctl(ControlOperation::Add, fd, event) {
            Err(e) if e.raw_os_error() == Some(libc::EPERM) => return Ok(()),
            result => result?,
        }
        self.sources.insert(fd, token);
        Ok(())
    }

    /// Waits for `fd` no longer.
    pub fn remove(&mut self, fd: &impl AsRawFd) -> io::Result<()> {
        let fd = fd.as_raw_fd();
        let delete = ControlOperation::Delete;
        match self.sources.remove(&fd) {
            Some(_) => self.epoll.ctl(delete, fd, EpollEvent::default()),
            None => Ok(()),
        }
    }

    /// Waits until a source is ready, and gives the tokens of those that are; none when `deadline` has passed.
    pub fn wait(&self, deadline: Option<Instant>) -> io::Result<Vec<T>> {
        let mut events = [EpollEvent::default(); BATCH];
        loop {
            let timeout = match deadline {
                None => -1,
                Some(deadline) => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        return Ok(Vec::new());
                    }
                    // Rounded up, so that the last millisecond is not spun away.
                    i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
                }
            };
            let ready = match self.epoll.wait(timeout, &mut events) {
                Ok(count) => events.iter().take(count),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(e),
            };
            #[cfg(feature = "attack-port")]
            minivmm_devices::attack::turn();
            let token = |event: &EpollEvent| self.sources.get(&event.fd()).copied();
            let tokens: Vec<T> = ready.filter_map(token).collect();
            if !tokens.is_empty() {
                return Ok(tokens);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use std::time::Duration;

    use vmm_sys_util::eventfd::EventFd;

    fn event() -> EventFd {
        EventFd::new(libc::EFD_NONBLOCK).unwrap()
    }

    fn soon() -> Option<Instant> {
        Some(Instant::now() + Duration::from_millis(5))
    }

    #[test]
    fn sources_come_and_go() {
        let mut events = EventLoop::new().unwrap();
        let (one, two) = (event(), event());
        events.add(&one, false, 'a').unwrap();
        events.add(&two, true, 'b').unwrap();
        assert!(events.wait(soon()).unwrap().is_empty());
        one.write(1).unwrap();
        assert_eq!(events.wait(None).unwrap(), ['a']);
        // By level: it was not read.
        assert_eq!(events.wait(None).unwrap(), ['a']);
        events.remove(&one).unwrap();
        events.remove(&one).unwrap();
        assert!(events.wait(soon()).unwrap().is_empty());
        two.write(1).unwrap();
        assert_eq!(events.wait(None).unwrap(), ['b']);
        assert!(events.wait(soon()).unwrap().is_empty(), "by edge");
    }

    #[test]
    fn a_regular_file_is_no_source() {
        let mut events = EventLoop::new().unwrap();
        let file = File::open("/proc/self/exe").unwrap();
        events.add(&file, false, ()).unwrap();
        assert!(events.wait(soon()).unwrap().is_empty());
    }
}
