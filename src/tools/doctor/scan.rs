//! A search through an uncompressed kernel image, in one pass and bounded memory: the version banner and the embedded
//! configuration.

use std::io::{self, Read};

use flate2::read::GzDecoder;
use memchr::memmem;

use super::config::{KernelConfig, MAX_CONFIG_LEN};
use crate::printable;

/// Bytes searched at a time.
const CHUNK: usize = 1 << 20;
/// Bytes kept from one chunk to the next, so that nothing is cut: the longest banner that is read.
const OVERLAP: usize = 512;
/// Most bytes of an image that are searched.
pub(crate) const MAX_IMAGE_LEN: u64 = 512 << 20;
/// Longest compressed configuration; Debian's would have 60 KB.
const MAX_PACKED_CONFIG: usize = CHUNK;

/// Begins the banner (init/version.c, linux_banner).
const BANNER: &[u8] = b"Linux version ";
/// Begins the embedded configuration, a gzip file (kernel/configs.c).
const CONFIG_START: &[u8] = b"IKCFG_ST\x1f\x8b";

/// What was found.
#[derive(Debug, Default)]
pub(crate) struct Found {
    /// What follows "Linux version ".
    pub(crate) version: Option<String>,
    /// The embedded configuration.
    pub(crate) config: Option<KernelConfig>,
}

/// Searches `image` for banner and configuration, up to [`MAX_IMAGE_LEN`] bytes.
pub(crate) fn scan(image: impl Read) -> io::Result<Found> {
    let mut image = image.take(MAX_IMAGE_LEN);
    let mut found = Found::default();
    let mut window = Vec::with_capacity(CHUNK + OVERLAP);
    while found.version.is_none() || found.config.is_none() {
        let kept = window.len();
        // An error, as at the damaged end of a compressed image, ends the search; what was found before counts.
        let result = image.by_ref().take(CHUNK as u64).read_to_end(&mut window);
        let at_end = result.is_err() || window.len() == kept;
        if found.version.is_none() {
            found.version = find_version(&window);
        }
        if found.config.is_none()
            && let Some(at) = memmem::find(&window, CONFIG_START)
        {
            let mut packed = window.get(at + 8..).unwrap_or_default().to_vec();
            let missing = MAX_PACKED_CONFIG.saturating_sub(packed.len()) as u64;
            // What is read here is not searched for the banner, which stands in .rodata before the configuration.
            image.by_ref().take(missing).read_to_end(&mut packed)?;
            found.config = unpack_config(&packed);
            window.clear();
            if found.config.is_some() {
                continue;
            }
        }
        if at_end {
            break;
        }
        let cut = window.len().saturating_sub(OVERLAP);
        window.drain(..cut);
    }
    Ok(found)
}

fn find_version(window: &[u8]) -> Option<String> {
    memmem::find_iter(window, BANNER)
        .filter_map(|at| window.get(at + BANNER.len()..))
        .map(|text| text.get(..OVERLAP - BANNER.len()).unwrap_or(text))
        .filter(|text| text.first().is_some_and(u8::is_ascii_digit))
        .find_map(printable)
}

fn unpack_config(packed: &[u8]) -> Option<KernelConfig> {
    let mut text = Vec::new();
    GzDecoder::new(packed)
        .take(MAX_CONFIG_LEN)
        .read_to_end(&mut text)
        .ok()?;
    KernelConfig::parse(
        "embedded (CONFIG_IKCONFIG)",
        &String::from_utf8_lossy(&text),
    )
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    use super::super::config::Setting;
    use super::*;

    #[test]
    fn banner_and_configuration_are_found_across_chunks() {
        let mut packed = GzEncoder::new(Vec::new(), Compression::default());
        packed.write_all(b"CONFIG_ACPI=y\nCONFIG_PVH=m\n").unwrap();
        let packed = packed.finish().unwrap();
        for (before, between) in [
            (0, 0),
            (CHUNK - 7, 10),
            (100, 2 * CHUNK - 120),
            (3 * CHUNK - 20, CHUNK),
        ] {
            let mut image = vec![0; before];
            image.extend(b"Linux version %s\0Linux version 6.12.1 (me) #1\n\0");
            image.extend(vec![0; between]);
            image.extend(b"IKCFG_ST");
            image.extend(&packed);
            image.extend(b"IKCFG_ED");
            let found = scan(image.as_slice()).unwrap();
            assert_eq!(
                found.version.as_deref(),
                Some("6.12.1 (me) #1"),
                "{before} {between}"
            );
            assert_eq!(found.config.unwrap().get("PVH"), Setting::Module);
        }
    }

    #[test]
    fn zeroes_and_garbage_yield_nothing() {
        let found = scan([0; 5000].as_slice()).unwrap();
        assert!(found.version.is_none() && found.config.is_none());
        let found = scan(b"IKCFG_ST\x1f\x8b\x08 this is no gzip file".as_slice()).unwrap();
        assert!(found.config.is_none());
    }
}
