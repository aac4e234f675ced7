//! A blob, read over as many connections as it takes.

use std::io::{self, Read};
use std::thread;
use std::time::Duration;

use ureq::http::header::CONTENT_RANGE;
use ureq::http::{Response, StatusCode};
use ureq::{Body, BodyReader};

use super::{Digest, RANGE, Repository, bad, header};

/// Failures in a row after which a blob is given up. The pauses between them, 0.5 s and twice as much each time, come to 31 s.
const MAX_FAILURES: u32 = 6;
/// The first pause.
const PAUSE: Duration = Duration::from_millis(500);
/// Bytes after which a connection counts as a good one, so that a registry cannot send a few at a time for ever.
const PROGRESS: u64 = 1 << 20;

/// A blob as a stream.
pub(crate) struct Blob<'a> {
    repository: &'a Repository,
    path: String,
    size: u64,
    /// Bytes that have been read.
    at: u64,
    /// The same when the last connection was made.
    started: u64,
    body: Option<BodyReader<'static>>,
}

impl<'a> Blob<'a> {
    pub(crate) fn new(repository: &'a Repository, digest: &Digest, size: u64) -> Self {
        Self {
            repository,
            path: format!("blobs/{digest}"),
            size,
            at: 0,
            started: 0,
            body: None,
        }
    }

    /// A connection that gives what follows.
    fn connect(&self) -> io::Result<BodyReader<'static>> {
        let range = format!("bytes={}-", self.at);
        let headers = [(RANGE, range.as_str())];
        let headers = if self.at > 0 { &headers[..] } else { &[] };
        let response = self.repository.get(&self.path, headers)?;
        let response = self.repository.good(response)?;
        let skipped = self.skipped(&response)?;
        let body = response.into_body().into_with_config().limit(u64::MAX);
        let mut body = body.reader();
        let passed = io::copy(&mut (&mut body).take(skipped), &mut io::sink())?;
        if passed < skipped {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(body)
    }

    /// How much of what is sent has been read already. A registry need not know ranges.
    fn skipped(&self, response: &Response<Body>) -> io::Result<u64> {
        let (start, total) = match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(response.headers(), &CONTENT_RANGE);
                let parsed = range.strip_prefix("bytes ").and_then(|range| {
                    let (range, total) = range.split_once('/')?;
                    let (start, _) = range.split_once('-')?;
                    Some((start.parse().ok()?, total.parse().ok()))
                });
                parsed.ok_or_else(|| bad(format!("a wrong Content-Range, '{range}'")))?
            }
            _ => (0, response.body().content_length()),
        };
        if total.is_some_and(|total| total != self.size) {
            let total = total.unwrap_or_default();
            return Err(bad(format!(
                "the registry has {total} bytes of it, and the manifest says {}",
                self.size
            )));
        }
        self.at
            .checked_sub(start)
            .ok_or_else(|| bad("the registry sent another range than was asked for"))
    }

    /// Waits before the next attempt, if there may be one.
    fn failed(&mut self, error: io::Error) -> io::Result<()> {
        self.body = None;
        let lasting = [
            io::ErrorKind::InvalidData,
            io::ErrorKind::NotFound,
            io::ErrorKind::PermissionDenied,
        ];
        if lasting.contains(&error.kind()) {
            return Err(error);
        }
        let failures = &self.repository.failures;
        if self.at - self.started >= PROGRESS {
            failures.set(0);
        }
        let count = failures.get();
        if count >= MAX_FAILURES {
            let text = format!("it broke off {} times, at last: {error}", count + 1);
            return Err(io::Error::new(error.kind(), text));
        }
        log::info!("the connection broke off after {} bytes: {error}", self.at);
        failures.set(count + 1);
        thread::sleep(PAUSE * 2u32.pow(count));
        Ok(())
    }
}

impl Read for Blob<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while !buf.is_empty() {
            let read = match &mut self.body {
                Some(body) => body.read(buf),
                None => match self.connect() {
                    Ok(body) => {
                        self.started = self.at;
                        self.body = Some(body);
                        continue;
                    }
                    Err(e) => Err(e),
                },
            };
            match read {
                Ok(0) if self.at < self.size => {
                    self.failed(io::ErrorKind::UnexpectedEof.into())?;
                }
                Ok(count) => {
                    self.at += count as u64;
                    return Ok(count);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => self.failed(e)?,
            }
        }
        Ok(0)
    }
}
