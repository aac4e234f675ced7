//! Where the parts of an image lie: in a directory, a tar archive or a registry; and how they are read, unpacked and verified.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Cursor, Read, Seek};
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use sha2::{Digest as _, Sha256};

use super::digest::Digest;
use super::limits::{MAX_JSON, MAX_MEMBERS, MAX_METADATA, bad};
#[cfg(feature = "registry")]
use super::registry::Repository;
#[cfg(feature = "registry")]
use super::registry::blob::Blob;
use super::tar::{Archive, Kind};

/// The files that an image's parts are in, by name.
pub(super) enum Parts {
    Directory(PathBuf),
    Archive {
        file: File,
        /// Where in the archive each file's content is: offset and length, or the name that it is a link to.
        members: BTreeMap<Vec<u8>, Part>,
    },
    #[cfg(feature = "registry")]
    Registry(Box<Repository>),
}

/// Copies what it is given to a file.
pub(super) type Spool<'a> = &'a dyn Fn(&mut dyn Read) -> io::Result<File>;

/// A file in an archive.
pub(super) enum Part {
    At(u64, u64),
    Link(Vec<u8>),
}

impl Parts {
    /// Opens a directory or an archive, which may be compressed as a whole; `spool` as for [`Self::stream`].
    pub(super) fn open(path: &Path, spool: Spool<'_>) -> io::Result<Self> {
        if fs::metadata(path)?.is_dir() {
            return Ok(Self::Directory(path.to_owned()));
        }
        let file = open_regular(path)?;
        if is_compressed(&file)? {
            return Self::stream(file, spool);
        }
        Self::archive(file)
    }

    /// Unpacks an archive with `spool`, which copies it to a temporary file, since it is read in another order than it has.
    pub(super) fn stream(reader: impl Read, spool: Spool<'_>) -> io::Result<Self> {
        let file = spool(&mut *unpacked(reader)?)?;
        // Once is what tools do. What is unpacked may be another such archive, or even the same again.
        if is_compressed(&file)? {
            return Err(bad("the archive is compressed more than once"));
        }
        Self::archive(file)
    }

    fn archive(file: File) -> io::Result<Self> {
        let members = members(&file, MAX_METADATA)?;
        Ok(Self::Archive { file, members })
    }

    /// Whether there is such a file.
    pub(super) fn has(&self, name: &str) -> bool {
        match self {
            Self::Directory(dir) => dir.join(name).is_file(),
            Self::Archive { members, .. } => members.contains_key(name.as_bytes()),
            #[cfg(feature = "registry")]
            Self::Registry(_) => false,
        }
    }

    /// Opens a file; `blob` is its digest and size, if they are known. Names come from the image's own JSON, and must not lead
    /// out of it.
    #[cfg_attr(
        not(feature = "registry"),
        allow(unused_variables, reason = "files are found by name")
    )]
    pub(super) fn read(
        &self,
        name: &str,
        blob: Option<&(Digest, u64)>,
    ) -> io::Result<Box<dyn Read + '_>> {
        let missing = || io::Error::new(io::ErrorKind::NotFound, format!("{name} is not in it"));
        match self {
            Self::Directory(dir) => {
                let mut parts = Path::new(name).components();
                if !parts.all(|part| matches!(part, Component::Normal(_))) {
                    return Err(missing());
                }
                Ok(Box::new(open_regular(&dir.join(name))?))
            }
            Self::Archive { file, members } => {
                let mut at = name.as_bytes();
                // In the oldest format a layer may be a link to another image's.
                for _ in 0..2 {
                    match members.get(at).ok_or_else(missing)? {
                        Part::Link(target) => at = target,
                        Part::At(offset, length) => {
                            let reader = Positioned {
                                file,
                                at: *offset,
                                left: *length,
                            };
                            return Ok(Box::new(reader));
                        }
                    }
                }
                Err(missing())
            }
            #[cfg(feature = "registry")]
            Self::Registry(repository) => {
                let (digest, size) = blob.ok_or_else(missing)?;
                Ok(Box::new(Blob::new(repository, digest, *size)))
            }
        }
    }

    /// Reads a small file.
    pub(super) fn read_all(&self, name: &str, blob: Option<&(Digest, u64)>) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let reader = self.read(name, blob)?;
        reader.take(MAX_JSON + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_JSON {
            return Err(bad(format!("{name} is longer than 4 MiB")));
        }
        Ok(bytes)
    }
}

/// The files in an archive, whose names and links may have as many bytes.
fn members(file: &File, max_bytes: usize) -> io::Result<BTreeMap<Vec<u8>, Part>> {
    let mut members = BTreeMap::new();
    let mut bytes = 0usize;
    let mut reader = BufReader::new(file);
    reader.rewind()?;
    let mut archive = Archive::seeking(reader);
    while let Some(member) = archive.next()? {
        let name = member.path.strip_prefix(b"./").unwrap_or(&member.path);
        bytes = bytes.saturating_add(name.len() + member.link.len());
        let part = match member.kind {
            Kind::File => Part::At(archive.position(), member.size),
            Kind::HardLink => Part::Link(member.link),
            // "../ID/layer.tar", where there are no deeper directories.
            Kind::Symlink => {
                let target = member.link.strip_prefix(b"../");
                Part::Link(target.unwrap_or(&member.link).to_vec())
            }
            _ => continue,
        };
        members.insert(name.to_vec(), part);
        if members.len() > MAX_MEMBERS {
            return Err(bad("too many files"));
        }
        if bytes > max_bytes {
            let mib = max_bytes >> 20;
            return Err(bad(format!("its names and links take more than {mib} MiB")));
        }
    }
    Ok(members)
}

/// Opens a file that is one: no FIFO, at which the open would wait.
pub(super) fn open_regular(path: &Path) -> io::Result<File> {
    if fs::metadata(path)?.is_file() {
        File::open(path)
    } else {
        Err(io::Error::other("it is not a regular file"))
    }
}

/// Part of a file.
struct Positioned<'a> {
    file: &'a File,
    at: u64,
    left: u64,
}

impl Read for Positioned<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let most = buf.len().min(self.left.try_into().unwrap_or(usize::MAX));
        let count = (self.file).read_at(buf.get_mut(..most).unwrap_or_default(), self.at)?;
        self.at += count as u64;
        self.left -= count as u64;
        Ok(count)
    }
}

/// How a layer is compressed, whatever its media type says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Compression {
    Gzip,
    Zstd,
}

impl Compression {
    fn of(head: &[u8]) -> Option<Self> {
        match head {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            // A frame, or one to be skipped (RFC 8878, 3.1).
            [0x28, 0xb5, 0x2f, 0xfd] | [0x50..=0x5f, 0x2a, 0x4d, 0x18] => Some(Self::Zstd),
            _ => None,
        }
    }
}

fn is_compressed(file: &File) -> io::Result<bool> {
    let mut head = [0; 4];
    let length = file.read_at(&mut head, 0)?;
    Ok(Compression::of(head.get(..length).unwrap_or_default()).is_some())
}

/// What a layer holds, uncompressed.
pub(super) fn unpacked<'a>(mut reader: impl Read + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = Vec::new();
    (&mut reader).take(4).read_to_end(&mut head)?;
    let compression = Compression::of(&head);
    let whole = BufReader::with_capacity(64 << 10, Cursor::new(head).chain(reader));
    Ok(match compression {
        Some(Compression::Gzip) => Box::new(MultiGzDecoder::new(whole)),
        Some(Compression::Zstd) => Box::new(Zstd {
            source: whole,
            decoder: FrameDecoder::new(),
            in_frame: false,
        }),
        None => Box::new(whole),
    })
}

/// Zstandard of several frames.
struct Zstd<R> {
    source: BufReader<R>,
    decoder: FrameDecoder,
    /// Whether the decoder is within a frame.
    in_frame: bool,
}

impl<R: Read> Read for Zstd<R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let damaged = |e: FrameDecoderError| bad(format!("a damaged Zstandard stream: {e}"));
        loop {
            if self.in_frame {
                while self.decoder.can_collect() == 0 && !self.decoder.is_finished() {
                    let one = BlockDecodingStrategy::UptoBlocks(1);
                    let decoded = self.decoder.decode_blocks(&mut self.source, one);
                    decoded.map_err(damaged)?;
                }
                let count = self.decoder.read(buf)?;
                if count > 0 || buf.is_empty() {
                    return Ok(count);
                }
            }
            if self.source.fill_buf()?.is_empty() {
                return Ok(0);
            }
            self.in_frame = match self.decoder.init(&mut self.source) {
                Ok(()) => true,
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let mut skipped = (&mut self.source).take(length.into());
                    io::copy(&mut skipped, &mut io::sink())?;
                    false
                }
                Err(e) => return Err(damaged(e)),
            };
        }
    }
}

/// Counts and hashes what is read.
pub(super) struct Hashing<'a, R> {
    reader: R,
    /// Is told how many bytes have been read.
    progress: &'a dyn Fn(u64),
    hash: Sha256,
    bytes: u64,
}

impl<'a, R: Read> Hashing<'a, R> {
    pub(super) fn new(reader: R, progress: &'a dyn Fn(u64)) -> Self {
        Self {
            reader,
            progress,
            hash: Sha256::new(),
            bytes: 0,
        }
    }

    /// Reads to the end. Returns digest and number of all bytes.
    pub(super) fn finish(mut self) -> io::Result<(Digest, u64)> {
        io::copy(&mut self, &mut io::sink())?;
        Ok((Digest::from(self.hash), self.bytes))
    }
}

impl<R: Read> Read for Hashing<'_, R> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(buf)?;
        self.hash.update(buf.get(..count).unwrap_or_default());
        self.bytes += count as u64;
        (self.progress)(self.bytes);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_links_of_an_archive_are_bounded() {
        let mut builder = tar::Builder::new(tempfile::tempfile().unwrap());
        for name in ["./12345", "1234"] {
            let mut header = tar::Header::new_ustar();
            header.set_entry_type(tar::EntryType::Link);
            header.set_size(0);
            header.set_mode(0o644);
            header.set_uid(0);
            header.set_gid(0);
            header.set_mtime(0);
            builder.append_link(&mut header, name, "target").unwrap();
        }
        let file = builder.into_inner().unwrap();
        assert_eq!(members(&file, 21).unwrap().len(), 2);
        let error = members(&file, 20).err().unwrap().to_string();
        assert_eq!(error, "its names and links take more than 0 MiB");
    }
}
