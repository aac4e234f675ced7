//! A console's two sides, whichever device is between them: [`ConsoleDevice`] faces the host, [`ConsoleOutput`] is the
//! host's.

/// The host's end of the output.
pub trait ConsoleOutput: Send {
    /// Takes bytes and returns how many; never blocks.
    fn write(&mut self, bytes: &[u8]) -> usize;

    /// Whether [`MIN_ROOM`] bytes fit now. After an answer of `false`, [`ConsoleDevice::output_ready`] must be called once
    /// there is room.
    fn has_room(&self) -> bool;

    /// Has [`ConsoleDevice::output_ready`] called soon, on a thread of the host's.
    fn call_back(&self);
}

/// What fits, in bytes, when [`ConsoleOutput::has_room`] says so: the FIFO of a UART, because a guest that saw the
/// transmitter empty sends as much without looking again.
pub const MIN_ROOM: usize = 16;

/// A console device as the host sees it. A device is given a kick, which it calls when [`ConsoleDevice::wants_input`] may
/// have changed from 0. It is called with the device locked, so it may only wake the thread that will look.
pub trait ConsoleDevice: Send {
    /// How many bytes the guest is ready for. An answer of 0 arms the kick.
    fn wants_input(&mut self) -> usize;

    /// Hands bytes to the guest, and returns how many it took. The kick is armed if it did not take all.
    fn receive(&mut self, bytes: &[u8]) -> usize;

    /// Asks for the guest's attention whatever it does: Linux takes the next byte for a SysRq command. `false` if there is no
    /// room for that; the kick is armed then.
    fn send_break(&mut self) -> bool;

    /// The host has room for output again, or was asked to call back.
    fn output_ready(&mut self);

    /// The user's terminal has this size now.
    fn resize(&mut self, _size: TerminalSize) {}
}

/// The size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TerminalSize {
    /// Characters a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// See [`ConsoleDevice`].
pub type Kick = std::sync::Arc<dyn Fn() + Send + Sync>;
