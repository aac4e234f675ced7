//! The guest's end of hvc0.

use std::fs::{File, OpenOptions};
use std::io::{self, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::termios::{OptionalActions, Winsize, tcdrain, tcgetattr, tcsetattr, tcsetwinsize};

use super::children::send_signal;
use super::frames::{ERROR, INPUT, OUTPUT, RESIZE, SIGNAL, TAKEN, frame};

/// Bytes that are sent in one frame.
const PIECE: usize = 4096 - super::frames::HEADER;

/// hvc0, for frames in both directions.
#[derive(Clone)]
pub(super) struct Channel {
    file: Arc<File>,
    /// A frame is written as a whole.
    writing: Arc<Mutex<()>>,
}

/// Opens the console, which passes on all bytes as they are.
pub(super) fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true);
    let file = options.custom_flags(libc::O_NOCTTY).open(path)?;
    let mut settings = tcgetattr(&file)?;
    settings.make_raw();
    tcsetattr(&file, OptionalActions::Now, &settings)?;
    Ok(file)
}

impl Channel {
    /// Frames on a console that is open, or on a connection.
    pub(super) fn stream(file: File) -> io::Result<Self> {
        let channel = Self {
            file: Arc::new(file),
            writing: Arc::default(),
        };
        channel.send(TAKEN, &[0; 4])?;
        Ok(channel)
    }

    pub(super) fn send(&self, kind: u8, content: &[u8]) -> io::Result<()> {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        (&*self.file).write_all(&frame(kind, content))
    }

    /// Text for stderr.
    pub(super) fn error(&self, text: &[u8]) {
        for piece in text.chunks(PIECE) {
            // There is nobody else to tell.
            let _ = self.send(ERROR, piece);
        }
    }

    /// Waits until all that was sent has been taken.
    pub(super) fn drain(&self) {
        let _ = tcdrain(&self.file);
    }

    /// Sends on what comes from the program, until all that could write it are gone.
    pub(super) fn copy_output(&self, is_error: bool, from: OwnedFd) {
        let kind = if is_error { ERROR } else { OUTPUT };
        let mut from = File::from(from);
        let mut buffer = vec![0; PIECE];
        loop {
            match from.read(&mut buffer) {
                // A terminal that nobody has open any more answers so.
                Ok(0) | Err(_) => return,
                Ok(count) => {
                    let piece = buffer.get(..count).unwrap_or_default();
                    if self.send(kind, piece).is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// Gives the program what `input` brings, up to an empty piece. What it does not take is taken from it: nobody waits.
    pub(super) fn copy_input(&self, input: &Receiver<Vec<u8>>, to: OwnedFd, terminal: bool) {
        let mut to = Some(File::from(to));
        while let Ok(piece) = input.recv() {
            if piece.is_empty() {
                if terminal {
                    // Ctrl-D, as it is typed at a terminal.
                    let _ = to.as_ref().map(|mut to| to.write_all(b"\x04"));
                }
                to = None;
                continue;
            }
            if let Some(file) = &mut to
                && file.write_all(&piece).is_err()
            {
                to = None;
            }
            let taken = u32::try_from(piece.len()).unwrap_or(u32::MAX);
            if self.send(TAKEN, &taken.to_le_bytes()).is_err() {
                return;
            }
        }
    }

    /// Does what the host sends. `group` is the program's process group, `terminal` its terminal if it has one.
    pub(super) fn serve(
        &self,
        input: &Sender<Vec<u8>>,
        group: rustix::process::Pid,
        terminal: Option<&OwnedFd>,
    ) {
        let mut reader = BufReader::new(&*self.file);
        loop {
            let mut header = [0; super::frames::HEADER];
            if reader.read_exact(&mut header).is_err() {
                return;
            }
            let [kind, low, high] = header;
            let mut content = vec![0; usize::from(u16::from_le_bytes([low, high]))];
            if reader.read_exact(&mut content).is_err() {
                return;
            }
            match (kind, content.as_slice()) {
                (INPUT, _) => _ = input.send(content),
                (RESIZE, [r0, r1, c0, c1]) => {
                    if let Some(terminal) = terminal {
                        let size = Winsize {
                            ws_row: u16::from_le_bytes([*r0, *r1]),
                            ws_col: u16::from_le_bytes([*c0, *c1]),
                            ws_xpixel: 0,
                            ws_ypixel: 0,
                        };
                        let _ = tcsetwinsize(terminal, size);
                    }
                }
                (SIGNAL, [number]) => send_signal(group, *number),
                _ => {}
            }
        }
    }
}
