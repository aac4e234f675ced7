use super::*;
use minivmm_devices::block::Engine;
use std::io::Write;
use std::time::Duration;

fn parse(json: &str) -> Result<VmConfig, ConfigError> {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(json.as_bytes()).unwrap();
    VmConfig::from_file(file.path())
}

#[test]
fn json_has_the_fields_of_the_command_line() {
    let config = parse(
        r#"{"kernel": "k", "memory": "1G", "cpus": 2, "append": "-- sh", "deadline": "1m 30s",
            "on_reboot": "restart", "boot_protocol": "pvh", "serial": "file=/tmp/x"}"#,
    )
    .unwrap();
    assert_eq!((config.cpus, config.memory.bytes), (2, 1 << 30));
    assert_eq!(config.deadline, Some(Span(Duration::from_secs(90))));
    assert_eq!(config.kernel_cmdline(), format!("{DEFAULT_CMDLINE} -- sh"));
    config.validate().unwrap();
    let again: VmConfig = serde_json::from_str(&serde_json::to_string(&config).unwrap()).unwrap();
    assert_eq!(again, config);
}

#[test]
fn what_is_wrong_is_named() {
    let chain = |json: &str| {
        let error = parse(json).unwrap_err();
        format!("{error}: {}", std::error::Error::source(&error).unwrap())
    };
    assert!(chain(r#"{"kernel": "k", "memroy": "1G"}"#).contains("memroy"));
    assert!(chain(r#"{"kernel": "k", "memory": "1Q"}"#).contains("512M or 2G"));
    assert!(chain(r#"{"kernel": "k", "#).contains("EOF"));
    assert!(chain(r#"{"cpus": -1}"#).contains("-1"));
    assert!(chain(r#"["k"]"#).contains("a VM is written as an object"));
    assert!(chain("[]").contains("a VM is written as an object"));
    assert!(chain(r#"{"kernel": "k", "disks": [{"path": "a"}, ["b"]]}"#).contains("a disk is"));
    assert!(chain(r#"{"kernel": "k", "nets": [["tap0"]]}"#).contains("a network device is"));
    assert!(chain(r#"{"kernel": "k", "vsock": ["v", 3]}"#).contains("a socket device is"));
    parse(r#"{"kernel": "k", "nets": [{"passt": true}], "vsock": null}"#).unwrap();
    assert!(matches!(
        parse(&" ".repeat(1 << 21)),
        Err(ConfigError::File(..))
    ));
}

#[test]
fn limits_hold() {
    let config = |cpus, bytes| VmConfig {
        kernel: "k".into(),
        cpus,
        memory: MemorySize { bytes },
        ..VmConfig::default()
    };
    assert!(config(1, 16 << 20).validate().is_ok());
    assert!(matches!(
        config(0, 16 << 20).validate(),
        Err(ConfigError::Cpus(0))
    ));
    assert!(matches!(
        config(65, 16 << 20).validate(),
        Err(ConfigError::Cpus(65))
    ));
    assert!(config(1, 4 << 40).validate().is_ok());
    for bytes in [512, 1 << 20, (16 << 20) + 1, u64::MAX, (4 << 40) + 4096] {
        assert!(
            matches!(config(1, bytes).validate(), Err(ConfigError::Memory(..))),
            "{bytes}"
        );
    }
    let error = config(1, 512).validate().unwrap_err().to_string();
    assert!(error.contains("512B") && error.contains("unit"), "{error}");
    assert!(matches!(
        VmConfig::default().validate(),
        Err(ConfigError::NoKernel)
    ));
}

#[test]
fn a_disk_is_written_as_its_help_says() {
    let disk = |text: &str| text.parse::<DiskConfig>();
    assert_eq!(
        disk("path=/a/b.img,ro,id=root"),
        Ok(DiskConfig {
            path: "/a/b.img".into(),
            read_only: true,
            id: Some("root".into()),
            ..DiskConfig::default()
        })
    );
    assert!(!disk("path=x").unwrap().read_only);
    let raw = disk("path=x,format=raw,sector=4096").unwrap();
    assert_eq!(
        (raw.format, raw.sector),
        (Some(DiskFormat::Raw), Some(4096))
    );
    let all = disk("engine=sync,queues=8,ephemeral,path=x").unwrap();
    assert!(all.ephemeral);
    assert_eq!((all.queues, all.engine), (Some(8), Some(Engine::Sync)));
    // An equals sign may be in a path.
    assert_eq!(disk("path=a=b").unwrap().path, PathBuf::from("a=b"));
    for (text, word) in [
        ("", "path=FILE"),
        ("disk.img", "path=FILE"),
        ("ro", "no file"),
        ("path=", "no file"),
        ("path=x,", "not known"),
        ("path=x,rw", "'rw'"),
        ("path=x,ro=1", "'ro=1'"),
        ("path=x,format=qcow2", "qemu-img convert"),
        ("path=x,format", "format=raw"),
        ("path=x,sector=1024", "512 or 4096"),
        ("path=x,sector=4k", "'sector=4k'"),
        ("path=x,sector", "'sector'"),
        ("path=x,queues=0", "1 to 8"),
        ("path=x,queues=9", "1 to 8"),
        ("path=x,queues=", "'queues='"),
        ("path=x,queues=-1", "'queues=-1'"),
        ("path=x,queues", "'queues'"),
        ("path=x,engine=aio", "engine=io_uring or"),
        ("path=x,engine", "engine=io_uring or"),
        ("path=x,ephemeral=1", "'ephemeral=1'"),
        ("path=x,ephemeral,ro", "ephemeral and ro"),
        ("path=x,engine=io_uring,ephemeral", "engine=sync"),
        ("path=x,path=y", "twice"),
        ("path=x,ro,ro", "twice"),
        ("path=x,id=", "1 to 20"),
        ("path=x,id=123456789012345678901", "1 to 20"),
        ("path=x,id=a b", "letters"),
        ("path=x,id=\u{e9}", "letters"),
    ] {
        let error = disk(text).unwrap_err();
        assert!(error.contains(word), "{text}: {error}");
    }
    let config = parse(
        r#"{"kernel": "k", "rng": true, "mergeable": true, "disks": [{"path": "a,b", "engine": "io_uring", "queues": 2},
            {"path": "c", "ro": true, "id": "x", "format": "raw", "sector": 512}]}"#,
    )
    .unwrap();
    config.validate().unwrap();
    assert_eq!(config.disks[0].path, PathBuf::from("a,b"));
    assert!(config.rng && config.mergeable && config.disks[1].read_only);
    assert_eq!(config.disks[0].engine, Some(Engine::IoUring));
    assert_eq!(config.disks[1].format, Some(DiskFormat::Raw));
    assert_eq!(config.disks[1].sector, Some(512));
    for field in [
        r#""format": "qcow2""#,
        r#""engine": "aio""#,
        r#""queues": -1"#,
    ] {
        let json = format!(r#"{{"disks": [{{"path": "a", {field}}}]}}"#);
        assert!(matches!(parse(&json), Err(ConfigError::File(..))));
    }
}

#[test]
fn disks_have_limits() {
    let config = |id: &str| VmConfig {
        kernel: "k".into(),
        disks: vec![DiskConfig {
            path: "d".into(),
            id: Some(id.into()),
            ..DiskConfig::default()
        }],
        ..VmConfig::default()
    };
    config("x").validate().unwrap();
    let error = config("").validate().unwrap_err().to_string();
    assert!(error.contains("disk d: id ''"), "{error}");
}

#[test]
fn a_virtio_console_has_its_own_command_line() {
    let config = parse(r#"{"kernel": "k", "console": "virtio", "append": "x"}"#).unwrap();
    assert_eq!(config.kernel_cmdline(), format!("{VIRTIO_CMDLINE} x"));
    assert!(VIRTIO_CMDLINE.contains(config.console.parameter()));
    assert!(DEFAULT_CMDLINE.contains(ConsoleKind::default().parameter()));
    assert!(parse(r#"{"kernel": "k", "console": "hvc0"}"#).is_err());
}

#[test]
fn sizes_print_as_they_are_written() {
    for text in ["16M", "2G", "1T", "20K", "1B"] {
        assert_eq!(text.parse::<MemorySize>().unwrap().to_string(), text);
    }
    assert_eq!("1GiB".parse::<MemorySize>().unwrap().bytes, 1 << 30);
    assert_eq!("0.5G".parse::<MemorySize>().unwrap().bytes, 1 << 29);
}
