//! Ring 3: container images as VMs. Where and how it runs, see tests/linux.rs.

mod common;
#[path = "run/debian.rs"]
mod debian;
#[path = "run/init.rs"]
mod init;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::{Command, Stdio};
use std::time::{SystemTime, UNIX_EPOCH};

use common::image::{Image, MANY, both_ways};
use common::linux::kernel;
use common::registry::Registry;
use common::terminal::Terminal;
use common::{Ended, run, run_with_input, signal, wait};
use sha2::{Digest, Sha256};

/// Debian's kernels, whose drivers are modules.
fn cloud() -> String {
    kernel("cloud", "bzImage")
}

#[track_caller]
fn printed(ended: &Ended, wanted: &str) {
    ended.assert_code(0);
    assert_eq!((ended.out().as_str(), ended.stderr.as_str()), (wanted, ""));
}

#[test]
fn the_image_says_what_is_run_and_arguments_go_over_it() {
    both_ways(|image| {
        let script = "pwd; echo $FROM_IMAGE $A $B $PATH; busybox hostname; cat /etc/hostname; id -u; echo $HOME; id -g; ulimit -n; ulimit -Hn";
        printed(&image.run(&cloud(), &[], &[]), "default\n");
        let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
        let options = [
            "-e",
            "A=b",
            "--env",
            "B=c d",
            "-h",
            "box",
            "-w",
            "/made/here",
            "-u",
            "ann",
        ];
        let script = format!("{script}; id -G; busybox pwd >/dev/stdout");
        let wanted = format!(
            "/made/here\n1 b c d {path}\nbox\nbox\n1000\n/home/ann\n1001\n1024\n1048576\n1001 10\n/made/here\n"
        );
        printed(&image.sh(&cloud(), &options, &script), &wanted);
        let ended = image.run(
            &cloud(),
            &["--entrypoint", "/bin/busybox", "-u", "7:8"],
            &["id"],
        );
        printed(&ended, "uid=7 gid=8\n");
    });
}

#[test]
fn statuses_are_those_of_docker() {
    both_ways(|image| {
        let ended = image.sh(&cloud(), &[], "echo out; echo err >&2; exit 42");
        ended.assert_code(42);
        assert_eq!(
            (ended.out().as_str(), ended.stderr.as_str()),
            ("out\n", "err\n")
        );
        image.sh(&cloud(), &[], "kill -9 $$").assert_code(137);
        for (options, command, code, said) in [
            (&[][..], &["none"][..], 127, "cannot run 'none'"),
            (&[], &["/etc/passwd"], 126, "cannot run '/etc/passwd'"),
            (&["-u", "none"], &["id"], 125, "no user 'none'"),
        ] {
            let ended = image.run(&cloud(), options, command);
            ended.assert_code(code);
            ended.assert_said(said);
        }
        let none = run(image
            .command(&cloud(), &[], &[])
            .env("XDG_CACHE_HOME", "relative")
            .env("HOME", "relative"));
        none.assert_code(2);
    });
}

#[test]
fn input_arrives_whole_and_ends() {
    both_ways(|image| {
        let input: Vec<u8> = (0..4_000_000u32)
            .flat_map(|n| [(n % 251) as u8, (n >> 8) as u8])
            .collect();
        let mut command = image.command(&cloud(), &["-i"], &["cat"]);
        let ended = run_with_input(&mut command, &input);
        ended.assert_code(0);
        assert_eq!(
            Sha256::digest(&ended.stdout),
            Sha256::digest(&input),
            "{} bytes",
            ended.stdout.len()
        );
        // A program that reads nothing is not in the way of its end.
        let mut command = image.command(&cloud(), &["-i"], &["sh", "-c", "exit 3"]);
        run_with_input(&mut command, &input).assert_code(3);
        // Without -i there is none.
        let mut command = image.command(&cloud(), &[], &["sh", "-c", "cat; echo end"]);
        printed(&run_with_input(&mut command, b"unseen"), "end\n");
    });
}

#[test]
fn the_root_is_the_merged_layers_and_can_be_written_to() {
    both_ways(|image| {
        let script = "ls /many | wc -l; ls /gone 2>&1; stat -c '%h %u %g' /bin/linked /home/ann
        mkdir /new && echo x >/new/file && rm /etc/group && mv /bin/linked /bin/moved && cat /new/file
        chmod 700 /many/1; stat -c '%a %Y' /many/1; cat /etc/hosts | wc -l; mount | cut -d' ' -f3,5";
        let ended = image.sh(&cloud(), &[], &format!("for i in ls wc stat mkdir rm mv chmod mount cut; do alias $i=\"busybox $i\"; done\n{script}"));
        ended.assert_code(0);
        let wanted = format!(
            "{MANY}\nls: /gone: No such file or directory\n2 0 0\n2 1000 1000\nx\n700 1000000000\n3\n"
        );
        assert!(
            ended.out().starts_with(&wanted),
            "{}\n{}",
            ended.out(),
            ended.stderr
        );
        for mounted in [
            "/ overlay",
            "/proc proc",
            "/sys sysfs",
            "/dev devtmpfs",
            "/dev/pts devpts",
            "/dev/shm tmpfs",
        ] {
            assert!(ended.out().contains(mounted), "{mounted}: {}", ended.out());
        }
        let read_only = image.sh(
            &cloud(),
            &["--read-only"],
            "echo x >/dev/shm/x && echo x >/x",
        );
        assert_ne!(read_only.code(), 0);
        read_only.assert_said("Read-only file system");
    });
}

#[test]
fn what_is_written_to_a_disk_stays_if_it_is_kept() {
    let image = Image::new();
    let disks = image.store().join("data/minivmm/disks");
    let count = || std::fs::read_dir(&disks).unwrap().count();
    let script = "busybox mount | busybox grep -q '^image on / type overlay.*rw' && busybox df -m / | busybox tail -n 1; busybox stat -c '%a %u' /
        busybox dd if=/dev/zero of=/zeroes bs=1M count=200 2>/dev/null && echo written";
    // More than the VM has memory.
    let options = ["--disk-size", "1G", "-m", "192M"];
    let ended = image.sh(&cloud(), &options, script);
    ended.assert_code(0);
    assert!(ended.out().ends_with("755 0\nwritten\n"), "{}", ended.out());
    let size = ended.out().split_whitespace().nth(1).map(str::parse::<u32>);
    assert!(matches!(size, Some(Ok(900..=1024))), "{}", ended.out());
    assert_eq!(count(), 0);
    // However it ends.
    let mut child = image
        .command(
            &cloud(),
            &options,
            &["sh", "-c", "echo x >/file; echo ready; sleep 1000"],
        )
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    common::expect(&mut child, "ready\n");
    assert_eq!(count(), 0);
    signal(&child, "KILL");
    wait(child, common::PATIENCE);

    let keep = ["--keep", "mine"];
    let script = "echo $(( $(cat /count 2>/dev/null || echo 0) + 1 )) >/count; busybox chmod 750 /; cat /count";
    let first = image.sh(&cloud(), &["--keep", "mine", "--disk-size", "1G"], script);
    printed(&first, "1\n");
    printed(&image.sh(&cloud(), &keep, script), "2\n");
    // A VM that is killed leaves what it has synced, and a disk that can be used.
    let script = format!("{script}; busybox sync; echo lost >/unsynced; echo ready; sleep 1000");
    let mut child = image.command(&cloud(), &keep, &["sh", "-c", &script]);
    let mut child = child.stdout(Stdio::piped()).spawn().unwrap();
    common::expect(&mut child, "3\nready\n");
    let taken = image.sh(&cloud(), &keep, "true");
    taken.assert_code(125);
    taken.assert_said("'mine': a VM that runs has it");
    signal(&child, "KILL");
    wait(child, common::PATIENCE);
    printed(
        &image.sh(&cloud(), &keep, "cat /count; busybox stat -c %a /"),
        "3\n750\n",
    );
    let listed = run(&mut image.minivmm(&["disks"]));
    listed.assert_printed(&["mine", "1024.0 MiB"]);
    run(&mut image.minivmm(&["disks", "--remove", "mine"])).assert_code(0);
    assert_eq!(count(), 0);
}

#[test]
fn a_file_has_its_capabilities() {
    both_ways(|image| {
        for (program, wanted) in [
            ("busybox-capable", "0000000000002000"),
            ("busybox", "0000000000000000"),
        ] {
            let script = format!("exec /bin/{program} grep CapEff /proc/self/status");
            let ended = image.sh(&cloud(), &["-u", "ann"], &script);
            printed(&ended, &format!("CapEff:\t{wanted}\n"));
        }
    });
}

#[test]
fn a_terminal_is_the_programs_own() {
    both_ways(|image| {
        let terminal = Terminal::new();
        terminal.resize(33, 99);
        let mut session = terminal.run(&image.command(&cloud(), &["-it"], &["sh"]));
        terminal.wait_for("# ");
        terminal.type_in("stty size; echo $TERM\r");
        terminal.wait_for("33 99\r\nxterm");
        terminal.resize(44, 88);
        // Its SIGWINCH goes to what is in the foreground there.
        session.signal("WINCH");
        terminal.type_in("until stty size | busybox grep 44; do sleep 0.1; done\r");
        terminal.wait_for("\r\n44 88\r\n");
        // While the shell reads a line, or is about to start a program, Ctrl-C ends none: the program itself says that it runs.
        let program =
            "sh -c 'trap \"echo caught; exit\" INT; echo run\"\"ning; while :; do sleep 0.1; done'";
        terminal.type_in(format!("{program}\r"));
        terminal.wait_for("\r\nrunning\r\n");
        terminal.type_in("\x03");
        terminal.wait_for("^Ccaught\r\n");
        terminal.type_in("exit 5\r");
        assert_eq!(session.status(), 5, "{}", terminal.text());
        assert!(!terminal.is_raw());
        let without = image.run(&cloud(), &["-it"], &["sh"]);
        without.assert_code(2);
        without.assert_said("-t needs a terminal");
    });
}

#[test]
fn signals_go_to_the_program() {
    both_ways(|image| {
        let script = "trap 'echo got it; exit 9' TERM; echo ready; while :; do sleep 0.1; done";
        let mut command = image.command(&cloud(), &[], &["sh", "-c", script]);
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        common::expect(&mut child, "ready\n");
        signal(&child, "TERM");
        let output = wait(child, common::PATIENCE);
        assert_eq!(output.status.code(), Some(9));
        assert_eq!(output.stdout, b"got it\n");
    });
}

/// The status of a command whose first line alone is read.
fn read_a_line_of(command: &mut Command) -> Option<i32> {
    let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
    common::expect(&mut child, "y\n");
    drop(child.stdout.take());
    let ended = wait(child, common::PATIENCE);
    assert_eq!(String::from_utf8_lossy(&ended.stderr), "");
    ended.status.code()
}

#[test]
fn a_program_ends_when_nobody_reads_what_it_prints() {
    both_ways(|image| {
        let mut endless = image.command(&cloud(), &[], &["busybox", "yes"]);
        assert_eq!(read_a_line_of(&mut endless), Some(128 + libc::SIGPIPE));
    });
}

#[test]
fn other_programs_run_beside_the_first_and_stop_ends_them_all() {
    both_ways(|image| {
        // The image's stop signal.
        let script = "trap 'echo told; exit 5' QUIT; echo ready; while :; do sleep 0.1; done";
        let options = ["--name", "first", "--network", "none"];
        let mut child = image
            .command(&cloud(), &options, &["sh", "-c", script])
            .spawn()
            .unwrap();
        common::expect(&mut child, "ready\n");
        let listed = run(&mut image.minivmm(&["ps"]));
        assert!(listed.out().contains("first"), "{}", listed.out());
        let exec = |options: &[&str], command: &[&str]| {
            image.minivmm(&[&["exec"], options, &["first"], command].concat())
        };
        let ended = run(&mut exec(
            &["-e", "B=2", "-w", "/bin", "-u", "ann"],
            &[
                "sh",
                "-c",
                "echo $A$B $(pwd) $(id -u); echo err >/dev/stderr; exit 6",
            ],
        ));
        ended.assert_code(6);
        let wrote = (ended.out(), ended.stderr.as_str());
        assert_eq!(wrote, ("image2 /bin 1000\n".to_owned(), "err\n"));
        run(&mut exec(&[], &["none"])).assert_code(127);
        let input: Vec<u8> = (0..400_000u32).map(|n| (n % 251) as u8).collect();
        let ended = run_with_input(&mut exec(&["-i"], &["cat"]), &input);
        assert_eq!(Sha256::digest(&ended.stdout), Sha256::digest(&input));
        let mut endless = exec(&[], &["busybox", "yes"]);
        assert_eq!(read_a_line_of(&mut endless), Some(128 + libc::SIGPIPE));
        // It ends with the VM, however long it would take.
        let mut long = exec(&[], &["sh", "-c", "echo up; exec sleep 1000"])
            .spawn()
            .unwrap();
        common::expect(&mut long, "up\n");
        let taken = image.run(&cloud(), &["--name", "first"], &["true"]);
        taken.assert_code(125);
        taken.assert_said("'first' is running");
        let stopped = run(&mut image.minivmm(&["stop", "-t", "100", "first"]));
        printed(&stopped, "first\n");
        let output = wait(child, common::PATIENCE);
        assert_eq!(output.status.code(), Some(5));
        assert_eq!(output.stdout, b"told\n");
        assert_ne!(wait(long, common::PATIENCE).status.code(), Some(0));
        for gone in [exec(&[], &["true"]), image.minivmm(&["stop", "first"])] {
            let mut gone = gone;
            let ended = run(&mut gone);
            ended.assert_code(125);
            ended.assert_said("no VM with the name");
        }
    });
}

#[test]
fn what_was_run_is_in_the_store() {
    both_ways(|image| {
        printed(&image.run(&cloud(), &[], &[]), "default\n");
        let list = |args: &[&str]| {
            let ended = run(common::minivmm(args).env("XDG_CACHE_HOME", image.store()));
            ended.assert_code(0);
            ended.out()
        };
        let listed = list(&["images"]);
        let digest = listed
            .lines()
            .nth(1)
            .unwrap()
            .split(' ')
            .next()
            .unwrap()
            .to_owned();
        let mut again = image.minivmm(&["run", "--kernel", &cloud(), &digest]);
        printed(
            &run(again.env("XDG_CACHE_HOME", image.store())),
            "default\n",
        );
        list(&["rmi", &digest]);
        assert_eq!(list(&["images"]).lines().count(), 1);
        let gone = run(again.env("XDG_CACHE_HOME", image.store()));
        gone.assert_code(125);
        gone.assert_said("neither a file nor in the store");
    });
}

#[test]
fn a_template_is_made_once_and_again_where_it_cannot_be_used() {
    let image = Image::new();
    let run = |said: &str| {
        let ended = image.sh(&cloud(), &["--verbose"], "echo $A");
        ended.assert_code(0);
        assert_eq!(ended.out(), "image\n");
        ended.assert_said(said);
    };
    // Too large a file is as good as a full disk.
    let mut limited = Command::new("sh");
    let command = image.command(&cloud(), &[], &[]);
    limited.args(["-c", "ulimit -f 100000; exec \"$0\" \"$@\""]);
    limited.arg(command.get_program()).args(command.get_args());
    limited.env("XDG_CACHE_HOME", image.store());
    limited.stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = common::run(&mut limited);
    assert_eq!((ended.code(), ended.out().as_str()), (0, "default\n"));
    ended.assert_said("so the VM boots");
    let templates = image.store().join("minivmm/templates-v1");
    let list = || fs::read_dir(&templates).unwrap().map(|f| f.unwrap().path());
    assert_eq!(list().count(), 0);

    run("made the template");
    // With what that VM has noted of the pages that it touched, and where that is damaged.
    run("going on from the template");
    let is_pages = |path: &std::path::PathBuf| path.extension().is_some();
    let pages = list().find(is_pages).unwrap();
    let noted = fs::read(&pages).unwrap();
    assert!(noted.len() > 4096, "{} bytes", noted.len());
    fs::write(&pages, &noted[1..]).unwrap();
    run("going on from the template");
    assert!(fs::read(&pages).unwrap().len() > 4096, "noted again");
    let template = list().find(|path| !is_pages(path)).unwrap();
    let file = fs::File::options().write(true).open(&template).unwrap();
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);
    let len = file.metadata().unwrap().len();
    file.write_all_at(b"x", len - 1).unwrap();
    run("it was changed since it was made");
    fs::File::options()
        .write(true)
        .open(&template)
        .unwrap()
        .set_len(len / 2)
        .unwrap();
    run("made anew");
    assert_eq!(list().count(), 2);
    fs::remove_dir_all(&templates).unwrap();
    fs::write(&templates, "").unwrap();
    run("so the VM boots");
}

#[test]
fn vms_of_one_template_differ_and_know_the_time() {
    let image = Image::new();
    let script =
        "cat /proc/sys/kernel/random/boot_id; cat /proc/sys/kernel/random/uuid; busybox date +%s";
    let mut words = BTreeSet::new();
    // The first two make one each.
    let mut first = [0, 1].map(|_| image.command(&cloud(), &[], &["sh", "-c", script]));
    let first = first
        .each_mut()
        .map(|command| command.stdout(Stdio::piped()).spawn().unwrap());
    let mut outputs = first
        .map(|child| wait(child, common::PATIENCE).stdout)
        .to_vec();
    outputs.extend((0..2).map(|_| image.sh(&cloud(), &[], script).stdout));
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs();
    for output in outputs {
        let output = String::from_utf8(output).unwrap();
        let mut lines = output.lines();
        words.extend(lines.by_ref().take(2).map(str::to_owned));
        let time: u64 = lines.next().unwrap().parse().unwrap();
        // The first ones are older.
        assert!(
            time <= now + 1 && time + 600 > now,
            "{time}, and it is {now}"
        );
    }
    assert_eq!(words.len(), 8, "{words:?}");
}

#[test]
fn an_image_from_a_registry_runs() {
    let Some(registry) = Registry::start("", "") else {
        return;
    };
    let image = Image::new();
    registry.push(&image.path(), "some/busybox:1.0");
    let name = format!("127.0.0.1:{}/some/busybox:1.0", registry.port);
    let mut command = image.minivmm(&["run", "--kernel", &cloud(), "--network", "none", &name]);
    let script = "echo pulled $FROM_IMAGE; busybox pwd";
    command.args(["sh", "-c", script]);
    printed(&run(&mut command), "pulled 1\n/etc\n");
    run(&mut image.minivmm(&["images"])).assert_printed(&[&name]);
}
