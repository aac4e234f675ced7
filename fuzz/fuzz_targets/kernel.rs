//! Whatever is in a kernel file, and however large its initrd, loading ends, in a kernel or an error. The input is the file,
//! but for its last bytes, which say how it is loaded.
#![no_main]

use libfuzzer_sys::fuzz_target;
use minivmm::boot::{self, BootSource};
use minivmm::config::BootProtocol;
use minivmm::vmm::memory;
use minivmm_fuzz::{file, path};

fuzz_target!(|input: &[u8]| {
    let Some((kernel, [how, mem, initrd @ ..])) = input.split_last_chunk::<4>() else {
        return;
    };
    let kernel = file(kernel);
    let initrd = u16::from_le_bytes(*initrd);
    let initrd = (initrd != 0).then(|| {
        let initrd_file = file(&[]);
        initrd_file.set_len(u64::from(initrd) << 6).unwrap();
        initrd_file
    });
    let initrd = initrd.as_ref().map(path);
    let protocols = [BootProtocol::Auto, BootProtocol::Linux64, BootProtocol::Pvh];
    let source = BootSource {
        kernel: &path(&kernel),
        initrd: initrd.as_deref(),
        cmdline: "console=ttyS0",
        protocol: protocols[usize::from(*how) % protocols.len()],
        cache: None,
        may_cache: false,
    };
    let mem = memory::create(u64::from(*mem % 64 + 16) << 20).unwrap();
    let _ = boot::load(&mem, &source).map_err(|e| e.to_string());
});
