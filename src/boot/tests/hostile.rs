//! Arbitrary bytes in place of kernels: nothing may panic.

use proptest::prelude::*;

use super::*;

/// What every outcome of a load must satisfy.
pub(super) fn check_outcome(bytes: &[u8], protocol: BootProtocol) {
    let mem = mem(64);
    let kernel = file(bytes);
    match load(
        &mem,
        &BootSource {
            protocol,
            ..source(kernel.path())
        },
    ) {
        Ok(loaded) => {
            let range = loaded.kernel_range;
            assert!(range.start >= layout::HIGH_RAM_START && range.end <= 64 * MIB);
            let entry = match loaded.entry {
                Entry::Linux64 { rip, .. } => rip,
                Entry::Pvh { eip, .. } => eip.into(),
            };
            assert!(range.contains(&entry));
            assert!(loaded.kernel_bytes <= bytes.len() as u64);
        }
        Err(error) => assert!(error.to_string().len() < 1000),
    }
}

pub(super) fn mutations() -> impl Strategy<Value = Vec<(usize, Vec<u8>)>> {
    let value = prop_oneof![
            prop::collection::vec(any::<u8>(), 1..9),
            prop::sample::select(vec![
                0u64,
                1,
                u64::MAX,
                1 << 31,
                u32::MAX as u64,
                LOAD,
                0x7000,
                0xc000_0000
            ])
            .prop_flat_map(
                |value| (1usize..9).prop_map(move |len| value.to_le_bytes()[..len].to_vec())
            ),
        ];
    prop::collection::vec((0usize..0x280, value), 0..6)
}

pub(super) fn mutate(
    image: &mut Vec<u8>,
    start: usize,
    mutations: &[(usize, Vec<u8>)],
    keep: Option<prop::sample::Index>,
) {
    for (at, value) in mutations {
        let at = start + at;
        if at + value.len() <= image.len() {
            put(image, at, value);
        }
    }
    if let Some(keep) = keep {
        image.truncate(keep.index(image.len()));
    }
}

fn protocols() -> impl Strategy<Value = BootProtocol> {
    prop::sample::select(vec![
        BootProtocol::Auto,
        BootProtocol::Linux64,
        BootProtocol::Pvh,
    ])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_bzimages(changes in mutations(), keep in prop::option::weighted(0.3, any::<prop::sample::Index>()), protocol in protocols()) {
        let mut image = bzimage();
        // The header alone: a quarter of a KiB of the 5.5.
        let changes: Vec<_> = changes.into_iter().map(|(at, value)| (at % 0x80, value)).collect();
        mutate(&mut image, 0x1f0, &changes, keep);
        check_outcome(&image, protocol);
    }

    #[test]
    fn mutated_elf_kernels(changes in mutations(), with_note: bool, wide: bool, keep in prop::option::weighted(0.3, any::<prop::sample::Index>()), protocol in protocols()) {
        let notes = if with_note { notes(&(LOAD as u32).to_le_bytes()) } else { vec![] };
        let mut image = if wide { elf64(&notes) } else { elf32(&notes) };
        mutate(&mut image, 4, &changes, keep);
        check_outcome(&image, protocol);
    }

    #[test]
    fn mutated_notes(bytes in prop::collection::vec(any::<u8>(), 0..6), at in 0usize..60) {
        let mut notes = notes(&(LOAD as u32).to_le_bytes());
        let end = (at + bytes.len()).min(notes.len());
        if at < end {
            notes[at..end].copy_from_slice(&bytes[..end - at]);
        }
        check_outcome(&elf64(&notes), BootProtocol::Auto);
    }

    #[test]
    fn any_bytes(bytes in prop::collection::vec(any::<u8>(), 0..700)) {
        check_outcome(&bytes, BootProtocol::Auto);
    }
}
