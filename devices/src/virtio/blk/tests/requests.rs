//! Requests, right and wrong, and what a guest reads of the disk.

use super::*;

#[test]
fn the_configuration_says_what_the_disk_is() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let mut config = [0; 60];
        rig.driver.transport.read(0x100, &mut config);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), SECTORS);
        assert_eq!((word(12), word(20)), (254, 512));
        assert_eq!((config[24], config[26]), (3, 8), "4 KiB physical blocks");
        assert_eq!((word(36), word(40), word(44)), (MAX_DISCARD_SECTORS, 1, 8));
        assert_eq!(
            (word(48), word(52), config[56]),
            (MAX_WRITE_ZEROES_SECTORS, 1, 1)
        );
        let writes = 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES;
        assert_eq!(rig.driver.offered() & writes, writes);
        let mut rig = Rig::new(engine, ReadOnly, 0);
        assert_eq!(rig.driver.offered() & writes, 0);
        assert_ne!(rig.driver.offered() & 1 << VIRTIO_BLK_F_RO, 0);
    }
}

#[test]
fn larger_sectors_leave_offsets_and_capacity_in_units_of_512() {
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let options = DiskOptions {
            block_size: Some(4096),
            ..ReadWrite.into()
        };
        let disk = Disk::open(file.path(), options).unwrap();
        let mut driver = Driver::started(block(disk, engine), 0);
        let mut config = [0; 60];
        driver.transport.read(0x100, &mut config);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(20)), (2048, 4096));
        assert_eq!((config[24], config[26], word(44)), (0, 1, 8));
        assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_BLK_SIZE, 0);
        file.as_file().write_all_at(&[7; 4096], 16 * 512).unwrap();
        submit(&mut driver, VIRTIO_BLK_T_IN, 16, (BUFFER, 4096, WRITE));
        assert_eq!(status(&mut driver), OK);
        assert_eq!(driver.read(BUFFER, 4096), [7; 4096]);
        // To a driver that does not know of it, sectors have 512 bytes (§ 5.2.5).
        submit(&mut driver, VIRTIO_BLK_T_IN, 23, (BUFFER, 512, WRITE));
        assert_eq!(status(&mut driver), OK);
        submit(&mut driver, VIRTIO_BLK_T_IN, 2041, (BUFFER, 4096, WRITE));
        assert_eq!(status(&mut driver), IOERR);
    }
}

#[test]
fn reads_and_writes_move_the_right_bytes() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let data = [(BUFFER, 1024, WRITE)];
        assert_eq!(rig.request(VIRTIO_BLK_T_IN, 3, &data), (OK, 1025));
        assert_eq!(rig.driver.read(BUFFER, 1024), pattern()[3 * 512..5 * 512]);
        // The whole disk into buffers of odd sizes, one of them across two regions and one above the gap.
        let rest = (SECTORS * 512) as u32 - 1000 - 333;
        let data = [
            (SEAM - 10, 1000, WRITE),
            (BUFFER, 333, WRITE),
            (HIGH, rest, WRITE),
        ];
        assert_eq!(
            rig.request(VIRTIO_BLK_T_IN, 0, &data),
            (OK, (SECTORS * 512) as u32 + 1)
        );
        let mut got = rig.driver.read(SEAM - 10, 1000);
        got.extend(rig.driver.read(BUFFER, 333));
        got.extend(rig.driver.read(HIGH, rest as usize));
        assert!(got == pattern());

        let mut wanted = pattern();
        wanted[66 * 512..].fill(0x5a);
        rig.driver.write(END - 200, &[0x5a; 200]);
        rig.driver.write(SEAM - 100, &[0x5a; 312]);
        let data = [(END - 200, 200, 0), (SEAM - 100, 312, 0)];
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 66, &data), (OK, 1));
        assert!(rig.contents() == wanted);
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
    }
}

#[test]
fn a_header_and_a_status_may_lie_anywhere() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        rig.header(VIRTIO_BLK_T_IN, 1);
        // The header in three pieces, the status in the data's last descriptor, and an empty descriptor.
        let chain = [
            (DATA, 5, 0),
            (DATA + 5, 10, 0),
            (DATA + 15, 1, 0),
            (BUFFER, 0, WRITE),
            (STATUS - 512, 513, WRITE),
        ];
        assert_eq!(rig.chain(&chain), (OK, 513));
        assert_eq!(rig.driver.read(STATUS - 512, 512), pattern()[512..1024]);
        // Data that follow the header in its descriptor.
        rig.driver.write(BUFFER, &[0; 16]);
        rig.driver.write(BUFFER, &VIRTIO_BLK_T_OUT.to_le_bytes());
        rig.driver.write(BUFFER + 16, &[7; 512]);
        assert_eq!(rig.chain(&[(BUFFER, 528, 0), (STATUS, 1, WRITE)]), (OK, 1));
        assert_eq!(rig.contents()[..512], [7; 512]);
    }
}

#[test]
fn bad_requests_get_their_status() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let sector = |len| [(BUFFER, len, WRITE)];
        let given = |len| [(BUFFER, len, 0)];
        let (read, write) = (VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT);
        for (case, status, kind, at, data) in [
            ("no data", IOERR, read, 0, &[][..]),
            ("no data to write", IOERR, write, 0, &[]),
            ("half a sector", IOERR, read, 0, &sector(256)),
            ("a sector and a byte", IOERR, read, 0, &sector(513)),
            ("past the end", IOERR, read, SECTORS, &sector(512)),
            ("over the end", IOERR, read, SECTORS - 1, &sector(1024)),
            ("sectors overflow", IOERR, read, u64::MAX, &sector(512)),
            ("bytes overflow", IOERR, read, u64::MAX / 512, &sector(512)),
            ("bytes wrap to 0", IOERR, read, 1 << 55, &sector(512)),
            ("off_t overflows", IOERR, read, 1 << 54, &sector(512)),
            ("write past the end", IOERR, write, SECTORS, &given(512)),
            ("write overflows", IOERR, write, u64::MAX, &given(512)),
            ("read into readable", IOERR, read, 0, &given(512)),
            ("write from writable", IOERR, write, 0, &sector(512)),
            (
                "both ways",
                IOERR,
                read,
                0,
                &[(BUFFER, 512, 0), (BUFFER, 512, WRITE)],
            ),
            (
                "flush with data",
                IOERR,
                VIRTIO_BLK_T_FLUSH,
                0,
                &sector(512),
            ),
            ("short ID", IOERR, VIRTIO_BLK_T_GET_ID, 0, &sector(19)),
            (
                "ID the wrong way",
                IOERR,
                VIRTIO_BLK_T_GET_ID,
                0,
                &given(20),
            ),
            ("unknown", UNSUPP, 77, 0, &sector(512)),
            ("SCSI", UNSUPP, VIRTIO_BLK_T_SCSI_CMD, 0, &sector(512)),
            ("lifetime", UNSUPP, 10, 0, &sector(512)),
            (
                "secure erase",
                UNSUPP,
                VIRTIO_BLK_T_SECURE_ERASE,
                0,
                &given(16),
            ),
            ("all ones", UNSUPP, u32::MAX, 0, &[]),
        ] {
            assert_eq!(rig.request(kind, at, data), (status, 1), "{case}");
        }
        for len in [0, 1, 15] {
            let chain = [(DATA, len, 0), (STATUS, 1, WRITE)];
            assert_eq!(rig.chain(&chain), (IOERR, 1), "a header of {len}");
        }
        assert_eq!(rig.chain(&[(STATUS, 1, WRITE)]), (IOERR, 1), "no header");
        assert!(rig.contents() == pattern());
        let data = [(BUFFER, 20, WRITE)];
        assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &data), (OK, 21));
        assert_eq!(
            rig.driver.read(BUFFER, 20),
            *b"a-serial\0\0\0\0\0\0\0\0\0\0\0\0"
        );
    }
}

/// What a guest can leave in a queue bounds what the host does for it.
#[test]
fn a_request_has_no_more_data_than_the_device_says() {
    const STATUS_IN_HIGH: u64 = HIGH + 0x200;
    for engine in ENGINES {
        let file = NamedTempFile::new().unwrap();
        file.as_file().set_len(64 << 20).unwrap();
        let mut driver = multi_queue(&file, engine, ReadWrite, 1);
        let mut config = [0; 60];
        driver.transport.read(0x100, &mut config);
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        let (size_max, seg_max) = (word(8), word(12));
        assert_eq!((size_max, seg_max), (256 << 10, 254));
        assert_ne!(driver.offered() & 1 << VIRTIO_BLK_F_SIZE_MAX, 0);
        for (more, expected) in [(0, OK), (512, IOERR)] {
            driver.start(0);
            let (table, data) = (HIGH + 0x1000, HIGH + 0x10_0000);
            let last = seg_max as u16 + 1;
            driver.write(HIGH, &header(VIRTIO_BLK_T_IN, 0));
            driver.write(STATUS_IN_HIGH, &[0xee]);
            driver.descriptor_in(table, 0, HIGH, 16, NEXT, 1);
            for index in 1..last {
                let len = size_max + if index == 1 { more } else { 0 };
                driver.descriptor_in(table, index, data, len, NEXT | WRITE, index + 1);
            }
            driver.descriptor_in(table, last, STATUS_IN_HIGH, 1, WRITE, 0);
            driver.descriptor(0, table, 16 * (u32::from(last) + 1), INDIRECT, 0);
            driver.offer(0);
            driver.notify();
            driver.wait_used();
            assert_eq!(driver.read(STATUS_IN_HIGH, 1), [expected], "{more}");
        }
    }
}

#[test]
fn a_request_without_a_status_needs_a_reset() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        for chain in [
            &[(DATA, 16, 0)][..],
            &[(DATA, 16, 0), (BUFFER, 512, 0)],
            &[(DATA, 16, 0), (STATUS, 0, WRITE)],
            &[(DATA, 0, 0)],
        ] {
            rig.driver.start(0);
            rig.header(VIRTIO_BLK_T_OUT, 0);
            rig.driver.chain(0, chain);
            rig.driver.offer(0);
            rig.driver.notify();
            rig.driver.expect_needs_reset("no status");
        }
        assert!(rig.contents() == pattern());
    }
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadOnly, 0);
        let clear = [(BUFFER, 16, 0)];
        rig.driver.write(BUFFER, &segment(0, 8, 0));
        assert_eq!(rig.request(VIRTIO_BLK_T_DISCARD, 0, &clear), (IOERR, 1));
        assert_eq!(
            rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &clear),
            (IOERR, 1)
        );
        assert_eq!(
            rig.request(VIRTIO_BLK_T_OUT, 0, &[(BUFFER, 512, 0)]),
            (IOERR, 1)
        );
        assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]), (OK, 1));
        assert_eq!(
            rig.request(VIRTIO_BLK_T_IN, 0, &[(BUFFER, 512, WRITE)]),
            (OK, 513)
        );
        assert!(rig.contents() == pattern());
    }
}

#[test]
fn discard_and_write_zeroes() {
    for engine in ENGINES {
        let mut rig = Rig::new(engine, ReadWrite, 0);
        let mut run = |kind, sector, count, flags, len| {
            rig.driver.write(BUFFER, &[0; 64]);
            rig.driver.write(BUFFER, &segment(sector, count, flags));
            rig.request(kind, 0, &[(BUFFER, len, 0)]).0
        };
        let (discard, zeroes) = (VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES);
        for (case, status, kind, sector, count, flags, len) in [
            ("no sectors", IOERR, discard, 0, 0, 0, 16),
            (
                "too many sectors",
                IOERR,
                discard,
                0,
                MAX_DISCARD_SECTORS + 1,
                0,
                16,
            ),
            (
                "too many zeroes",
                IOERR,
                zeroes,
                0,
                MAX_WRITE_ZEROES_SECTORS + 1,
                0,
                16,
            ),
            ("u32::MAX", IOERR, zeroes, 0, u32::MAX, 0, 16),
            ("over the end", IOERR, zeroes, SECTORS - 1, 2, 0, 16),
            ("overflow", IOERR, discard, u64::MAX, 1, 0, 16),
            ("discard with a flag", UNSUPP, discard, 0, 1, 1, 16),
            ("an unknown flag", UNSUPP, zeroes, 0, 1, 2, 16),
            ("a short segment", IOERR, zeroes, 0, 1, 0, 15),
            ("a long segment", IOERR, zeroes, 0, 1, 0, 17),
            ("two segments", IOERR, zeroes, 0, 1, 0, 32),
            ("none", IOERR, zeroes, 0, 1, 0, 0),
            ("discard", OK, discard, 8, 8, 0, 16),
            ("zeroes", OK, zeroes, 17, 1, 0, 16),
            ("zeroes, unmapped", OK, zeroes, 65, 2, 1, 16),
        ] {
            assert_eq!(run(kind, sector, count, flags, len), status, "{case}");
        }
        let mut wanted = pattern();
        wanted[8 * 512..16 * 512].fill(0);
        wanted[17 * 512..18 * 512].fill(0);
        wanted[65 * 512..].fill(0);
        assert!(rig.contents() == wanted);
    }
}
