//! Ephemeral disks: what is written goes nowhere.

use super::*;

/// What the queues of an ephemeral disk do at once: each a change of its own sectors, and a look at any.
#[derive(Debug, Clone, Copy)]
struct Change {
    kind: u32,
    sector: u64,
    count: u64,
    value: u8,
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let kind = prop_oneof![
        4 => Just(VIRTIO_BLK_T_OUT),
        1 => Just(VIRTIO_BLK_T_DISCARD),
        1 => Just(VIRTIO_BLK_T_WRITE_ZEROES),
    ];
    let change =
        (kind, 0..SECTORS, 1u64..20, any::<u8>()).prop_map(|(kind, sector, count, value)| Change {
            kind,
            sector,
            count: count.min(SECTORS - sector),
            value,
        });
    proptest::collection::vec(change, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Of changes that go on at once in several queues, in one cluster too, none is lost and none touches what lies beside
    /// it; the base stays as it is.
    #[test]
    fn an_ephemeral_disk_is_a_disk(changes in changes()) {
        let mut file = NamedTempFile::new().unwrap();
        file.write_all(&pattern()).unwrap();
        let mut driver = multi_queue(&file, Engine::Sync, Ephemeral, 4);
        let mut model = pattern();
        let mut changes = &changes[..];
        while !changes.is_empty() {
            // As many as do not overlap, one a queue.
            let mut taken = [false; SECTORS as usize];
            let mut queues = 0;
            while let Some((change, rest)) = changes.split_first().filter(|_| queues < 4) {
                let sectors = change.sector as usize..(change.sector + change.count) as usize;
                if taken[sectors.clone()].contains(&true) {
                    break;
                }
                taken[sectors.clone()].fill(true);
                let bytes = sectors.start * 512..sectors.end * 512;
                driver.queue = queues;
                let buffer = BUFFER + 0x4000 * u64::from(queues);
                let data = if change.kind == VIRTIO_BLK_T_OUT {
                    // Different in every byte's neighbourhood.
                    let bytes_out: Vec<u8> = bytes.clone().map(|n| change.value ^ (n / 3) as u8).collect();
                    driver.write(buffer, &bytes_out);
                    model[bytes].copy_from_slice(&bytes_out);
                    (buffer, bytes_out.len() as u32, 0)
                } else {
                    driver.write(buffer, &segment(change.sector, change.count as u32, 0));
                    model[bytes].fill(0);
                    (buffer, 16, 0)
                };
                submit(&mut driver, change.kind, change.sector, data);
                (queues, changes) = (queues + 1, rest);
            }
            for queue in 0..queues {
                driver.queue = queue;
                prop_assert_eq!(status(&mut driver), OK);
            }
            driver.queue = 0;
            let odd = BUFFER + 0x4000;
            let whole = SECTORS as u32 * 512;
            submit(&mut driver, VIRTIO_BLK_T_IN, 0, (odd, whole, WRITE));
            prop_assert_eq!(status(&mut driver), OK);
            prop_assert!(driver.read(odd, whole as usize) == model);
        }
        drop(driver);
        prop_assert!(fs::read(file.path()).unwrap() == pattern());
    }
}

#[test]
fn many_share_the_base_of_an_ephemeral_disk() {
    let mut file = NamedTempFile::new().unwrap();
    file.write_all(&pattern()).unwrap();
    let mut one = multi_queue(&file, Engine::Sync, Ephemeral, 1);
    let mut other = multi_queue(&file, Engine::Sync, Ephemeral, 1);
    let reader = Disk::open(file.path(), ReadOnly).unwrap();
    assert!(Disk::open(file.path(), ReadWrite).is_err());
    drop(reader);
    assert_eq!(one.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    one.write(BUFFER, &[1; 512]);
    submit(&mut one, VIRTIO_BLK_T_OUT, 66, (BUFFER, 512, 0));
    assert_eq!(status(&mut one), OK);
    submit(&mut other, VIRTIO_BLK_T_IN, 66, (BUFFER, 512, WRITE));
    assert_eq!(status(&mut other), OK);
    assert_eq!(other.read(BUFFER, 512), pattern()[66 * 512..]);
    // A change that needs bytes of a base that has gone fails, and does no more.
    file.as_file().set_len(512).unwrap();
    submit(&mut one, VIRTIO_BLK_T_OUT, 1, (BUFFER, 512, 0));
    assert_eq!(status(&mut one), IOERR);
    submit(&mut one, VIRTIO_BLK_T_OUT, 8, (BUFFER, 4096, 0));
    assert_eq!(status(&mut one), OK);
}

#[test]
fn an_ephemeral_disk_has_limits() {
    let file = NamedTempFile::new().unwrap();
    // Not every file system has files so long.
    if file.as_file().set_len((1 << 44) + 512).is_ok() {
        let error = Disk::open(file.path(), Ephemeral)
            .err()
            .unwrap()
            .to_string();
        assert!(error.contains("16 TiB"), "{error}");
    }
}
