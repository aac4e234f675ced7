//! bzImages entered at the kernel inside: placed, relocated, cached, and left to themselves where anything is unusual.

use std::collections::BTreeSet;
use std::env;
use std::fs::{self, FileTimes, OpenOptions, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::process::{self, Command};
use std::thread::sleep;
use std::time::Duration;

use super::cache::KernelCache;
use super::hostile::{check_outcome, mutate, mutations};
use super::payload::bzimage_with;
use super::*;
use crate::cli::process::install_fault_handlers;
use crate::config::SandboxMode;
use crate::sandbox::{Paths, Role as SandboxRole, Sandbox};

const ALIGN: u64 = 0x20_0000;
/// Where, from its start, the kernel has a 64-bit address, a 32-bit distance and a 32-bit address.
const PLACES: [u32; 3] = [0x20, 0x30, 0x40];
/// What is there: itself, as it was linked.
const ADDRESS: u64 = 0xffff_ffff_8100_0000;
const DISTANCE: u32 = 0x1234_5678;

fn table(lists: &[&[u32]]) -> Vec<u8> {
    let words = lists.iter().flat_map(|list| [&[0], *list].concat());
    words.flat_map(u32::to_le_bytes).collect()
}

/// The table for [`PLACES`], as kernels before 6.15 have it.
fn whole_table() -> Vec<u8> {
    let [a, b, c] = PLACES.map(|place| ADDRESS as u32 + place);
    table(&[&[a], &[b], &[c]])
}

/// The ELF kernel that is packed.
fn kernel() -> Vec<u8> {
    let mut image = elf64(&[]);
    let len = image.len() as u64;
    // The section headers, of which there are none, end the file.
    put(&mut image, 40, &len.to_le_bytes());
    put(&mut image, 0x220, &ADDRESS.to_le_bytes());
    put(&mut image, 0x230, &DISTANCE.to_le_bytes());
    put(&mut image, 0x240, &(ADDRESS as u32).to_le_bytes());
    image
}

fn gzip(content: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(content).unwrap();
    gzip.finish().unwrap()
}

fn packed(table: &[u8]) -> Vec<u8> {
    bzimage_with(&gzip(&[&kernel(), table].concat()))
}

/// Where a kernel was put, and how far it was moved in virtual memory, which all three places must agree on.
fn placed(mem: &GuestMemory, loaded: &LoadedKernel) -> (u64, u64) {
    let start = loaded.kernel_range.start;
    let at = |place: u32| GuestAddress(start + u64::from(place));
    let [address, distance, low] = PLACES;
    let moved = mem.read_obj::<u64>(at(address)).unwrap() - ADDRESS;
    let distance: u32 = mem.read_obj(at(distance)).unwrap();
    let low: u32 = mem.read_obj(at(low)).unwrap();
    assert_eq!(distance, DISTANCE.wrapping_sub(moved as u32));
    assert_eq!(low, (ADDRESS as u32).wrapping_add(moved as u32));
    assert_eq!(
        loaded.entry,
        Entry::Linux64 {
            rip: start + 0x10,
            boot_params: layout::BOOT_PARAMS_START
        }
    );
    (start, moved)
}

fn loadflags(mem: &GuestMemory) -> u8 {
    let params: boot_params = mem
        .read_obj(GuestAddress(layout::BOOT_PARAMS_START))
        .unwrap();
    params.hdr.loadflags
}

/// Loads an image that must be left to its own decompressor, on memory as if nothing else had been tried.
fn decompresses_itself(image: &[u8], cmdline: &str) {
    let mem = mem(64);
    let file = file(image);
    let loaded = load(
        &mem,
        &BootSource {
            cmdline,
            ..source(file.path())
        },
    )
    .unwrap();
    assert_eq!(loaded.kernel_loading, Loading::Copied);
    let Entry::Linux64 { rip, .. } = loaded.entry else {
        panic!("{:?}", loaded.entry);
    };
    assert_eq!((rip, loadflags(&mem)), (LOAD + 0x200, 1));
    let code = &image[3 * 512..];
    let mut ram = vec![0; (64 * MIB - LOAD) as usize];
    mem.read_slice(&mut ram, GuestAddress(LOAD)).unwrap();
    assert_eq!(&ram[..code.len()], code);
    assert!(ram[code.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn a_kernel_is_placed_at_random() {
    let image = file(&packed(&whole_table()));
    let initrd = file(&vec![1; 20 << 20]);
    let (mut phys, mut virt) = (BTreeSet::new(), BTreeSet::new());
    for _ in 0..60 {
        let mem = mem(64);
        let loaded = load(
            &mem,
            &BootSource {
                initrd: Some(initrd.path()),
                ..source(image.path())
            },
        )
        .unwrap();
        assert_eq!(loaded.kernel_loading, Loading::Decompressed);
        assert_eq!(loaded.format, KernelFormat::BzImage);
        assert_eq!(loadflags(&mem), 0b11);
        let (start, moved) = placed(&mem, &loaded);
        assert!(start.is_multiple_of(ALIGN) && moved.is_multiple_of(ALIGN));
        assert!(start >= LOAD && loaded.kernel_range.end <= 44 * MIB);
        assert!(moved <= (1 << 30) - LOAD - ALIGN);
        assert_eq!(mem.read_obj::<u8>(GuestAddress(44 * MIB)).unwrap(), 1);
        phys.insert(start);
        virt.insert(moved);
    }
    // Of 14 and of 504 places.
    assert!(phys.len() > 5, "{phys:?}");
    assert!(virt.len() > 30, "{virt:?}");
}

#[test]
fn every_place_is_taken_and_no_other() {
    let link = LOAD..LOAD + 3 * MIB;
    let ram_end = LOAD + 9 * MIB;
    let places: BTreeSet<_> = (0..1000)
        .map(|n| kaslr::choose(&link, ALIGN, ram_end, [n, n]))
        .map(|place| (place.phys, place.virt))
        .collect();
    let phys: BTreeSet<_> = places.iter().map(|(phys, _)| phys - LOAD).collect();
    assert_eq!(phys, BTreeSet::from([0, ALIGN, 2 * ALIGN]));
    let virt: BTreeSet<_> = places.iter().map(|(_, virt)| *virt).collect();
    assert_eq!(virt.len(), 503);
    assert_eq!(
        (virt.first(), virt.last()),
        (Some(&LOAD), Some(&((1 << 30) - 2 * ALIGN)))
    );
    // No room to choose from: as it was linked.
    let place = kaslr::choose(&link, ALIGN, LOAD + 3 * MIB, [7, 7]);
    assert_eq!(place.phys, LOAD);
}

#[test]
fn nokaslr_and_kernels_without_a_table_stay_where_they_were_linked() {
    let whole = packed(&whole_table());
    for (image, cmdline) in [
        (&whole, "console=ttyS0 nokaslr"),
        (&whole, "nokaslr\tmem=16M"),
        (&whole, "quiet -- nokaslr"),
        (&packed(&[]), "quiet mem=16M"),
    ] {
        let mem = mem(64);
        let file = file(image);
        let loaded = load(
            &mem,
            &BootSource {
                cmdline,
                ..source(file.path())
            },
        )
        .unwrap();
        assert_eq!(placed(&mem, &loaded), (LOAD, 0), "{cmdline}");
        assert_eq!(
            (loaded.kernel_loading, loadflags(&mem)),
            (Loading::Decompressed, 1)
        );
    }
}

#[test]
fn tables_without_distances_are_read() {
    let [a, b, c] = PLACES.map(|place| ADDRESS as u32 + place);
    let mem = mem(64);
    let loaded = load_bytes(&packed(&table(&[&[a], &[c, b]])), &mem).unwrap();
    let start = loaded.kernel_range.start;
    let at = |place: u32| GuestAddress(start + u64::from(place));
    let moved = mem.read_obj::<u64>(at(PLACES[0])).unwrap() - ADDRESS;
    assert_eq!(
        mem.read_obj::<u32>(at(PLACES[1])).unwrap(),
        DISTANCE.wrapping_add(moved as u32)
    );
    assert_eq!(loadflags(&mem), 0b11);
}

#[test]
fn what_is_unusual_is_left_to_the_kernel() {
    let place = ADDRESS as u32;
    for bad in [
        // Outside the kernel: below, just behind its last byte, far away.
        table(&[&[place - 8], &[], &[]]),
        table(&[&[place], &[], &[place + 0x3ffd]]),
        table(&[&[place + 0x3ff9], &[], &[]]),
        table(&[&[], &[1], &[]]),
        table(&[&[], &[], &[u32::MAX]]),
        // No tables: lists too few or too many, none at all, no words.
        table(&[&[place]]),
        table(&[&[], &[], &[], &[place]]),
        vec![1; 8],
        vec![0; 7],
        vec![0; 17 << 20],
    ] {
        let mut image = packed(&bad);
        // Room for the longest.
        put(&mut image, 0x260, &(20u32 << 20).to_le_bytes());
        decompresses_itself(&image, "");
    }
    let good = packed(&whole_table());
    let with = |at: usize, value: &[u8]| {
        let mut image = good.clone();
        put(&mut image, at, value);
        decompresses_itself(&image, "");
    };
    with(0x230, &0x10_0000u32.to_le_bytes()); // kernel_alignment
    with(0x234, &[0]); // relocatable_kernel
    with(0x24c, &0u32.to_le_bytes()); // payload_length
    for cmdline in ["mem=64M", "a memmap=1M@2M", "quiet hugepages=1"] {
        decompresses_itself(&good, cmdline);
    }
    // Of the kernel inside: its address, its entry, its class.
    for (at, value) in [(64 + 24, LOAD + ALIGN), (24, 0), (4, 1)] {
        let mut kernel = kernel();
        put(
            &mut kernel,
            at,
            &value.to_le_bytes()[..if at == 4 { 1 } else { 8 }],
        );
        decompresses_itself(
            &bzimage_with(&gzip(&[&kernel, whole_table().as_slice()].concat())),
            "",
        );
    }
}

/// Waits until a file that was just written counts as one that stays as it is.
fn settle() {
    sleep(Duration::from_millis(3100));
}

#[test]
fn the_cache_gives_what_was_unpacked_and_nothing_else() {
    let dir = TempDir::new().unwrap();
    let cache = dir.path().join("new/kernels");
    let image = file(&packed(&whole_table()));
    let boot = |cmdline| {
        let mem = mem(64);
        let source = BootSource {
            cmdline,
            cache: Some(&cache),
            ..source(image.path())
        };
        let loaded = load(&mem, &source).unwrap();
        (loaded.kernel_loading, placed(&mem, &loaded))
    };
    settle();
    assert_eq!(boot("").0, Loading::Decompressed);
    assert_eq!(boot("nokaslr"), (Loading::Cached, (LOAD, 0)));
    assert_ne!(boot("").1, boot("").1);
    let entry = || {
        let mut entries: Vec<_> = fs::read_dir(&cache).unwrap().collect();
        assert_eq!(entries.len(), 1);
        entries.remove(0).unwrap().path()
    };
    let whole = [kernel(), whole_table()].concat();
    assert_eq!(fs::read(entry()).unwrap(), whole);

    // Garbage, with the entry's own length and time too if it is no kernel; other modes and kinds. Each is replaced.
    let time = fs::metadata(entry()).unwrap().modified().unwrap();
    let write = |content: &[u8]| fs::write(entry(), content).unwrap();
    let restamp = || {
        let file = OpenOptions::new().write(true).open(entry()).unwrap();
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
    };
    let spoil: [(&str, &dyn Fn()); 9] = [
        ("overwritten", &|| write(&vec![0xcc; whole.len()])),
        ("one byte changed", &|| {
            write(&[&whole[..0x250], &[1], &whole[0x251..]].concat())
        }),
        ("cut", &|| write(&whole[..whole.len() / 2])),
        ("empty", &|| write(b"")),
        ("garbage with the right time", &|| {
            write(&[0xcc; 5000]);
            restamp()
        }),
        ("cut with the right time", &|| {
            write(&whole[..0x320]);
            restamp()
        }),
        ("writable by others", &|| {
            fs::set_permissions(entry(), Permissions::from_mode(0o666)).unwrap()
        }),
        ("a link", &|| {
            let (entry, target) = (entry(), dir.path().join("target"));
            fs::rename(&entry, &target).unwrap();
            symlink(target, entry).unwrap();
        }),
        ("a pipe", &|| {
            let entry = entry();
            fs::remove_file(&entry).unwrap();
            let made = Command::new("mkfifo").arg(entry).status();
            assert!(made.unwrap().success());
        }),
    ];
    for (what, spoil) in spoil {
        spoil();
        assert_eq!(
            boot("nokaslr"),
            (Loading::Decompressed, (LOAD, 0)),
            "{what}"
        );
        assert_eq!(boot("nokaslr"), (Loading::Cached, (LOAD, 0)), "{what}");
        assert_eq!(fs::read(entry()).unwrap(), whole, "{what}");
    }
}

#[test]
fn a_kernel_replaced_in_place_is_another_one_to_the_cache() {
    let dir = TempDir::new().unwrap();
    let cache = dir.path().join("new/kernels");
    let image = file(&packed(&whole_table()));
    let origin_of = |may_cache| {
        let source = BootSource {
            cache: Some(&cache),
            may_cache,
            ..source(image.path())
        };
        load(&mem(64), &source).unwrap().kernel_loading
    };
    let origin = || origin_of(true);
    // A file that may still be written to is not kept.
    assert_eq!(origin(), Loading::Decompressed);
    assert_eq!(fs::read_dir(&cache).unwrap().count(), 0);
    let mode = fs::metadata(&cache).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o700);
    settle();
    // Nor is one by a boot that may only read.
    assert_eq!(origin_of(false), Loading::Decompressed);
    assert_eq!(origin(), Loading::Decompressed);
    assert_eq!(origin_of(false), Loading::Cached);
    assert_eq!(origin(), Loading::Cached);
    // Same length and times.
    let metadata = fs::metadata(image.path()).unwrap();
    let mut other = fs::read(image.path()).unwrap();
    let end = other.len() - 600;
    other[end] ^= 1;
    fs::write(image.path(), &other).unwrap();
    let times = FileTimes::new().set_modified(metadata.modified().unwrap());
    image.as_file().set_times(times).unwrap();
    assert_eq!(fs::metadata(image.path()).unwrap().len(), metadata.len());
    assert_ne!(origin(), Loading::Cached);
}

#[test]
fn a_directory_that_cannot_be_a_cache_stops_no_boot() {
    let dir = TempDir::new().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::write(at("file"), b"").unwrap();
    symlink(dir.path(), at("link")).unwrap();
    for (name, mode) in [("open", 0o777), ("group", 0o770)] {
        fs::create_dir(at(name)).unwrap();
        fs::set_permissions(at(name), Permissions::from_mode(mode)).unwrap();
    }
    let image = file(&packed(&whole_table()));
    settle();
    for cache in [
        at("file"),
        at("file/below"),
        at("link"),
        at("open"),
        at("group"),
        "/proc/none".into(),
    ] {
        let source = BootSource {
            cache: Some(&cache),
            ..source(image.path())
        };
        for _ in 0..2 {
            assert_eq!(
                load(&mem(64), &source).unwrap().kernel_loading,
                Loading::Decompressed,
                "{cache:?}"
            );
        }
    }
    assert_eq!(fs::read_dir(at("open")).unwrap().count(), 0);
}

/// Names a kernel and an empty cache to a process that loads it within the sandbox.
const CONFINED: &str = "MINIVMM_TEST_CONFINED";

#[test]
fn a_restart_unpacks_the_kernel_within_its_sandbox() {
    const NAME: &str = "boot::tests::direct::a_restart_unpacks_the_kernel_within_its_sandbox";
    if let Some(dir) = env::var_os(CONFINED) {
        load_confined(Path::new(&dir));
    }
    let dir = TempDir::new().unwrap();
    fs::write(dir.path().join("kernel"), packed(&whole_table())).unwrap();
    KernelCache::open(&dir.path().join("cache")).unwrap();
    let output = Command::new(env::current_exe().unwrap())
        .args(["--exact", NAME, "--nocapture", "--test-threads=1"])
        .env(CONFINED, dir.path())
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(42), "{stderr}");
}

/// Loads a kernel as the main thread does after a guest's reset, and ends the process with 42.
fn load_confined(dir: &Path) -> ! {
    install_fault_handlers();
    let sandbox = Sandbox::new(SandboxMode::Strict, SandboxRole::Restart).unwrap();
    let paths = || Paths {
        read: vec![dir.to_owned()],
        ..Paths::default()
    };
    sandbox.confine_main(paths).unwrap();
    let (kernel, cache) = (dir.join("kernel"), dir.join("cache"));
    for cache in [None, Some(cache.as_path())] {
        let mem = mem(64);
        let source = BootSource {
            cache,
            may_cache: false,
            ..source(&kernel)
        };
        let loaded = load(&mem, &source).unwrap();
        assert_eq!(loaded.kernel_loading, Loading::Decompressed);
        placed(&mem, &loaded);
    }
    process::exit(42)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_table(words in prop::collection::vec(prop_oneof![Just(0u32), 0x8100_0000u32..0x8100_4010, any::<u32>()], 0..12), odd in 0usize..4) {
        let mut table: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        table.truncate(table.len().saturating_sub(odd));
        check_outcome(&packed(&table), BootProtocol::Auto);
    }

    #[test]
    fn mutated_kernels_inside(changes in mutations(), keep in prop::option::weighted(0.3, any::<prop::sample::Index>())) {
        let mut image = [kernel(), whole_table()].concat();
        mutate(&mut image, 0, &changes, keep);
        check_outcome(&bzimage_with(&gzip(&image)), BootProtocol::Auto);
    }
}
