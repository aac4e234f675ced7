//! Extended headers of tar archives.

use std::collections::BTreeMap;
use std::io;

use super::limits::bad;

/// What extended headers say of the member behind them.
#[derive(Default)]
pub(super) struct Extended {
    pub(super) path: Option<Vec<u8>>,
    /// Goes over the other, which is made up then.
    pub(super) sparse_name: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<(i64, u32)>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
    pub(super) seen: bool,
}

/// A sparse file in pax format: version 0.0 has a record for each number of its map, 0.1 one for all, 1.0 has the map in the content.
#[derive(Default)]
pub(super) struct Sparse {
    pub(super) size: Option<u64>,
    pub(super) map: Vec<u64>,
    pub(super) is_in_content: bool,
}

impl Extended {
    pub(super) fn is_empty(&self) -> bool {
        !self.seen && self.path.is_none() && self.link.is_none()
    }

    /// Reads records of the form "LENGTH KEY=VALUE\n" (POSIX.1-2017, pax, "pax Extended Header"). A value may have any bytes.
    pub(super) fn read_pax(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        self.seen = true;
        let damaged = || bad("a damaged extended header");
        while !bytes.is_empty() {
            let space = bytes.iter().position(|b| *b == b' ').ok_or_else(damaged)?;
            let (length, _) = bytes.split_at_checked(space).ok_or_else(damaged)?;
            let length = number(length).ok_or_else(damaged)?;
            let length = usize::try_from(length).map_err(|_| damaged())?;
            let (record, rest) = bytes.split_at_checked(length).ok_or_else(damaged)?;
            let record = record.get(space + 1..).ok_or_else(damaged)?;
            let record = record.strip_suffix(b"\n").ok_or_else(damaged)?;
            let equals = record.iter().position(|b| *b == b'=');
            let (key, value) = (equals.and_then(|at| record.split_at_checked(at)))
                .and_then(|(key, value)| Some((key, value.get(1..)?)))
                .ok_or_else(damaged)?;
            self.record(key, value).ok_or_else(|| {
                bad(format!(
                    "an extended header with a bad {}",
                    String::from_utf8_lossy(key)
                ))
            })?;
            bytes = rest;
        }
        Ok(())
    }

    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let name = |value: &[u8]| (!value.contains(&0)).then(|| value.to_vec());
        match key {
            b"path" => self.path = Some(name(value)?),
            b"linkpath" => self.link = Some(name(value)?),
            b"size" => self.size = Some(number(value)?),
            b"uid" => self.uid = Some(number(value)?),
            b"gid" => self.gid = Some(number(value)?),
            b"mtime" => self.mtime = Some(time(value)?),
            b"GNU.sparse.name" => self.sparse_name = Some(name(value)?),
            b"GNU.sparse.size" | b"GNU.sparse.realsize" => self.sparse.size = Some(number(value)?),
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // They take turns.
                let is_offset = self.sparse.map.len().is_multiple_of(2);
                (is_offset == (key == b"GNU.sparse.offset")).then_some(())?;
                self.sparse.map.push(number(value)?);
            }
            b"GNU.sparse.map" => {
                let numbers = value.split(|byte| *byte == b',').map(number);
                self.sparse.map = numbers.collect::<Option<_>>()?;
            }
            b"GNU.sparse.major" => {
                self.sparse.is_in_content = value == b"1";
                (number(value)? <= 1).then_some(())?;
            }
            _ => {
                if let Some(key) = key.strip_prefix(b"SCHILY.xattr.") {
                    self.xattrs.insert(name(key)?, value.to_vec());
                }
            }
        }
        Some(())
    }
}

pub(super) fn number(digits: &[u8]) -> Option<u64> {
    let digits = str::from_utf8(digits).ok()?;
    // Rust takes a sign, too.
    digits.bytes().all(|b| b.is_ascii_digit()).then_some(())?;
    digits.parse().ok()
}

/// Seconds with a fraction, before 1970 with a minus sign.
fn time(text: &[u8]) -> Option<(i64, u32)> {
    let (negative, text) = match text.strip_prefix(b"-") {
        Some(text) => (true, text),
        None => (false, text),
    };
    let mut parts = text.splitn(2, |b| *b == b'.');
    let seconds = i64::try_from(number(parts.next()?)?).ok()?;
    let fraction: Vec<u8> = (parts.next().unwrap_or_default().iter().copied())
        .chain(std::iter::repeat_n(b'0', 9))
        .take(9)
        .collect();
    let nanoseconds = u32::try_from(number(&fraction)?).ok()?;
    Some(match (negative, nanoseconds) {
        (false, nanoseconds) => (seconds, nanoseconds),
        (true, 0) => (-seconds, 0),
        (true, nanoseconds) => (-seconds - 1, 1_000_000_000 - nanoseconds),
    })
}
