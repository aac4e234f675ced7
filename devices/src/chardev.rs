//! The character device interface of consoles: [`ConsoleDevice`] is implemented by the device, [`ConsoleOutput`] by the
//! host's back end.

use std::sync::{Mutex, PoisonError, Weak};

/// The back end of a console's output.
pub trait ConsoleOutput: Send {
    /// Takes bytes and returns how many it took. Never blocks.
    fn write(&mut self, bytes: &[u8]) -> usize;

    /// Whether [`MIN_ROOM`] bytes fit. After `false`, the back end must call [`ConsoleDevice::on_tx_space`] once they
    /// fit.
    fn has_room(&self) -> bool;

    /// Requests a call of [`ConsoleDevice::on_tx_space`] on the back end's thread.
    fn call_back(&self);
}

/// Bytes that fit if [`ConsoleOutput::has_room`] is true: a UART's FIFO, which a driver fills without polling again once the
/// transmitter is empty.
pub const MIN_ROOM: usize = 16;

/// A console device, as its back end sees it. The device calls its [`Kick`] when [`ConsoleDevice::rx_space`] may no longer
/// be 0. The kick runs with the device locked, so it may only wake another thread.
pub trait ConsoleDevice: Send {
    /// How many bytes of input the guest has room for. Returning 0 arms the kick.
    fn rx_space(&mut self) -> usize;

    /// Passes input to the guest and returns how many bytes it took. If that is not all, the kick is armed.
    fn receive(&mut self, bytes: &[u8]) -> usize;

    /// Sends a BREAK, after which Linux takes the next byte as a SysRq command. Without room for it, returns `false` and
    /// arms the kick.
    fn send_break(&mut self) -> bool;

    /// The back end has room for output again, or a call was requested.
    fn on_tx_space(&mut self);

    /// The user's terminal was resized.
    fn resize(&mut self, _size: TerminalSize) {}
}

/// Tells those of the devices that are still there that the back end has room for output.
pub fn tell_of_tx_space(devices: &[Weak<Mutex<dyn ConsoleDevice>>]) {
    for device in devices.iter().filter_map(Weak::upgrade) {
        let mut device = device.lock().unwrap_or_else(PoisonError::into_inner);
        device.on_tx_space();
    }
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Characters per line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// Wakes the back end's thread; see [`ConsoleDevice`].
pub type Kick = std::sync::Arc<dyn Fn() + Send + Sync>;
