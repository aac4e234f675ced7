//! Which kernel an image runs on, unless one is named.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// There is none.
#[derive(Debug, thiserror::Error)]
#[error(
    "there is no kernel: neither the small one, which `make kernel` in minivmm's source builds into {}, nor this host's /boot/vmlinuz",
    cache.display()
)]
pub struct KernelError {
    /// Where the small kernel would be.
    pub cache: PathBuf,
}

/// The small kernel that was built last, below `cache`; or the host's own.
pub fn find(cache: &Path) -> Result<PathBuf, KernelError> {
    let kernels = cache.join("kernels");
    let small = fs::read_dir(&kernels).into_iter().flatten().flatten();
    let small = small.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"small-"));
    let built = |entry: fs::DirEntry| -> Option<(SystemTime, PathBuf)> {
        let file = entry.path().join("bzImage");
        Some((fs::metadata(&file).ok()?.modified().ok()?, file))
    };
    if let Some((_, file)) = small.filter_map(built).max() {
        return Ok(file);
    }
    let running = rustix::system::uname();
    let release = running.release().to_string_lossy().into_owned();
    let of_host = [
        format!("/boot/vmlinuz-{release}"),
        "/boot/vmlinuz".into(),
        "/vmlinuz".into(),
    ];
    of_host
        .into_iter()
        .map(PathBuf::from)
        .find(|file| file.is_file())
        .ok_or(KernelError { cache: kernels })
}
