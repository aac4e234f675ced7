//! `images` and `rmi`: what is in the store of images.

use std::io::{self, Write};

use clap::Args;

use super::run::RunError;
use crate::boot;
use crate::image::{ImageError, Store, Stored};
use crate::vmm::error::host;
use crate::{error_chain, escaped, mib};

#[allow(missing_docs, reason = "--help has what stands at the subcommand")]
#[derive(Debug, Args)]
pub struct RmiArgs {
    /// Name of an image, which goes with all of its names, or the beginning of its digest
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

/// The user's store of images.
pub(super) fn store() -> Result<Store, RunError> {
    let cache = boot::cache_dir().ok_or_else(|| {
        RunError::Usage("there is no place for images: set HOME or XDG_CACHE_HOME".to_owned())
    })?;
    let dir = cache.join("images");
    Store::open(&dir)
        .map_err(|e| RunError::File(format!("the store of images {}", dir.display()), e))
}

/// Lists the images, the one that was used last first.
pub fn list(out: &mut dyn Write) -> Result<(), RunError> {
    let images = store()?.list().map_err(host("the store of images"))?;
    print(out, |out| {
        writeln!(out, "{:<14} {:>9}  {:<20} NAME", "DIGEST", "SIZE", "USED")?;
        for image in &images {
            let digest = image.meta.digest.hex();
            let used = humantime::format_rfc3339_seconds(image.used);
            let size = mib(image.bytes);
            let digits = digest.get(..12).unwrap_or(digest);
            writeln!(
                out,
                "{digits:<14} {size:>9}  {used:<20} {}",
                escaped(&image.meta.names.join(", "))
            )?;
        }
        Ok(())
    })
}

/// Prints a list. A reader that has seen enough is no error.
pub(super) fn print(
    out: &mut dyn Write,
    lines: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), RunError> {
    match lines(out) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => Ok(printed.map_err(host("stdout"))?),
    }
}

/// Removes images.
pub fn remove(args: &RmiArgs) -> Result<(), RunError> {
    let store = store()?;
    each(&args.images, |name| {
        let failed = |source| ImageError {
            image: name.to_owned(),
            source,
        };
        let found = store.called(name).map_err(failed)?;
        let digests: Vec<&str> = found.iter().map(|i: &Stored| i.meta.digest.hex()).collect();
        match found.as_slice() {
            [image] => Ok(store.remove(image).map_err(failed)?),
            [] => Err(failed(io::Error::other("it is not in the store")).into()),
            _ => {
                let digests = digests.join(", ");
                let why = format!("several images are called so; give a digest: {digests}");
                Err(failed(io::Error::other(why)).into())
            }
        }
    })
}

/// Does this for each name, also when it has failed for another. The last failure is returned, those before it are said.
pub(super) fn each(
    names: &[String],
    mut act: impl FnMut(&str) -> Result<(), RunError>,
) -> Result<(), RunError> {
    let mut result = Ok(());
    for name in names {
        if let Err(e) = act(name)
            && let Err(earlier) = std::mem::replace(&mut result, Err(e))
        {
            log::error!("{}", error_chain(&earlier));
        }
    }
    result
}
