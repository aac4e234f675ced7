//! Ring 3: Linux guests on a network, by TAP interfaces and by passt. Like tests/linux.rs, it is run by `make test`; each test has a
//! network namespace of its own, and so needs root, which the lab has.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender};

use common::limit::{SLICE, receive, until, watch};
use common::linux::{Saved, boot_command, has_kernel, kernel, rounds};
use common::network::{self, own_network, page};
use common::{PATIENCE, kill, project, sha256, signal};

fn cloud() -> String {
    kernel("cloud", "bzImage")
}

/// minivmm with a guest that runs a case of tests/guest/net.
fn guest_command(kernel: &str, args: &[&str], case: &str) -> Command {
    let initramfs = project("build/net.cpio");
    let args = [&["--initrd", initramfs.to_str().unwrap()], args].concat();
    boot_command(kernel, &args, &format!("net {case}"))
}

/// One that runs, with what it has said.
struct Guest {
    child: Child,
    out: BufReader<ChildStdout>,
    text: String,
    _watch: Sender<()>,
}

impl Guest {
    fn boot(kernel: &str, args: &[&str], case: &str) -> Self {
        let mut command = guest_command(kernel, args, case);
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        Self {
            _watch: watch(&child),
            child,
            out,
            text: String::new(),
        }
    }

    /// Reads its output up to this.
    #[track_caller]
    fn wait_for(&mut self, word: &str) {
        while !self.text.contains(word) {
            if self.out.read_line(&mut self.text).unwrap() == 0 {
                self.fail(word);
            }
        }
    }

    #[track_caller]
    fn fail(&mut self, word: &str) -> ! {
        // What it has said so far; without an end it would say no more.
        _ = self.child.kill();
        _ = self.out.read_to_string(&mut self.text);
        let mut err = String::new();
        _ = self.child.stderr.take().unwrap().read_to_string(&mut err);
        panic!("no {word:?} in: {}{err}", self.text);
    }

    fn go_on(&mut self) {
        let stdin = self.child.stdin.as_mut().unwrap();
        stdin.write_all(b"go on\n").unwrap();
    }

    /// Its output, and what minivmm has said.
    #[track_caller]
    fn finish(mut self) -> (String, String) {
        self.out.read_to_string(&mut self.text).unwrap();
        let output = common::wait(self.child, PATIENCE);
        let err = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(0), "{}{err}", self.text);
        (self.text, err)
    }

    /// Its server for HTTP, at this address, has the page that it has got.
    #[track_caller]
    fn expect_page(&mut self, address: &str) {
        let mut data = Vec::new();
        let done = TcpStream::connect(address).and_then(|mut stream| {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.write_all(b"GET /data HTTP/1.0\r\n\r\n")?;
            stream.read_to_end(&mut data)
        });
        if done.is_err() || !data.ends_with(&page()) {
            self.fail(&format!("page of {address}, but {done:?}"));
        }
    }

    /// The guest's server for datagrams answers. IPv4 not from a loopback address, or the one that the guest has from this host: to those
    /// passt of 2023 passes answers on with host-loopback only.
    #[track_caller]
    fn expect_answer(&mut self, address: &str) {
        let to: SocketAddr = address.parse().unwrap();
        let from = if to.is_ipv4() { "10.9.0.1:0" } else { "[::]:0" };
        let socket = UdpSocket::bind(from).unwrap();
        socket.connect(to).unwrap();
        socket.set_read_timeout(Some(SLICE)).unwrap();
        let mut bytes = [0; 16];
        let answers = until(|| {
            let is_sent = socket.send(b"question").is_ok();
            is_sent && matches!(socket.recv(&mut bytes), Ok(len) if &bytes[..len] == b"question")
        });
        if !answers {
            self.fail(address);
        }
    }
}

#[track_caller]
fn assert_words(text: &str, words: &[&str]) {
    for word in words {
        assert!(text.contains(word), "no {word:?} in: {text}");
    }
}

/// The link's other end is gone: the guest learns of it, minivmm says so and goes on.
#[track_caller]
fn expect_loss(guest: Guest) -> String {
    let (text, err) = guest.finish();
    assert_words(&text, &["carrier-lost", "unreachable"]);
    let warning = "minivmm: warning: a network device has lost its link";
    assert!(
        err.starts_with(warning) && err.lines().count() == 1,
        "{err}"
    );
    text
}

/// A stream of pages to the guest and one from there, each with its sum.
struct Much {
    to_guest: Receiver<String>,
    from_guest: Receiver<String>,
}

impl Much {
    fn serve(pages: usize) -> Self {
        Self {
            to_guest: network::pages_until("10.9.0.1:5007", move |sent| sent + 1 >= pages),
            from_guest: network::sum_of("10.9.0.1:5008", (pages * page().len()) as u64),
        }
    }

    #[track_caller]
    fn expect(&self, text: &str) {
        let sum = receive(&self.to_guest).unwrap_or_else(|| panic!("{text}"));
        assert_words(text, &[&format!("much {sum}")]);
        // The guest has what it sends from here.
        assert_eq!(receive(&self.from_guest), Some(sum), "{text}");
    }
}

/// Pages that make a GiB, where there is time for it.
fn gibibyte() -> usize {
    rounds(1, 512)
}

/// With a pair of queues for each of `cpus`.
fn tap_carries_all(kernel: &str, mtu: u32, cpus: u8, pages: usize) {
    network::own_network_with(mtu, if cpus > 1 { "multi_queue" } else { "" });
    let much = Much::serve(pages);
    let sinks = network::serve(&["10.9.0.1", "[fd09::1]"]);
    network::tcp_echo("10.9.0.1:5003");
    let net = format!("tap=tap,mac=02:00:00:00:00:09,queues={cpus}");
    let args = ["--net", &net, "--cpus", &cpus.to_string()];
    let mut guest = Guest::boot(kernel, &args, &format!("tap 10.9.0.1 fd09::1 {pages}"));
    guest.wait_for("serving");
    much.expect(&guest.text);
    guest.expect_page("10.9.0.2:80");
    guest.expect_page("[fd09::2]:80");
    for sink in sinks {
        assert!(sink.join().unwrap() == page(), "{}", guest.text);
    }
    guest.expect_answer("10.9.0.2:5353");
    guest.expect_answer("[fd09::2]:5353");
    // More than the interface and the receive queue have room for, while nobody takes it: what comes later must come in.
    let flood = UdpSocket::bind("10.9.0.1:0").unwrap();
    for _ in 0..5 {
        signal(&guest.child, "STOP");
        (0..2000).for_each(|_| _ = flood.send_to(&[0; 1000], "10.9.0.2:9"));
        signal(&guest.child, "CONT");
        (0..2000).for_each(|_| _ = flood.send_to(&[0; 1000], "10.9.0.2:9"));
    }
    guest.go_on();
    guest.wait_for("carrier 1");
    network::sh("ip link delete tap");
    let text = expect_loss(guest);
    let ethernet = format!("mac 02:00:00:00:00:09 mtu {mtu} queues {cpus} features ");
    let words = ["echoed", "answer udp-10.9.0.1", "answer udp-fd09::1"];
    assert_words(&text, &words);
    assert_words(&text, &[&ethernet, "many 500", "again"]);
    assert_eq!(text.matches("3 packets received").count(), 3, "{text}");
    // Checksums, and segments longer than the MTU, in both directions (§ 5.1.3): agreed between driver, device and TAP.
    let features = text.split(&ethernet).nth(1).unwrap().as_bytes();
    for bit in [0, 1, 7, 8, 11, 12] {
        assert_eq!(features[bit], b'1', "bit {bit}: {text}");
    }
}

#[test]
fn tap_carries_all_for_debians_kernel() {
    tap_carries_all(&cloud(), 1500, 2, gibibyte());
}

#[test]
fn tap_carries_all_for_the_small_kernel() {
    if has_kernel("small") {
        tap_carries_all(&kernel("small", "bzImage"), 9000, 1, gibibyte());
    }
}

/// A guest whose kernel and initramfs know of nothing but DHCP. With `gateway`, that is an address of this host.
fn passt_carries_all(kernel: &str, net: &str, gateway: &str, pages: usize) {
    own_network(1500);
    let much = Much::serve(pages);
    let sinks = network::serve(&["10.9.0.1", "[fd09::1]"]);
    network::name_server();
    network::web("127.0.0.1:8000");
    let net = format!("{net},publish=8080:80,publish=[::1]:8081:80,publish=0.0.0.0:5300:5353/udp");
    let case = format!("passt 10.9.0.1 fd09::1 {pages} {gateway}");
    let mut guest = Guest::boot(kernel, &["--net", &net], &case);
    guest.wait_for("serving");
    much.expect(&guest.text);
    guest.expect_page("127.0.0.1:8080");
    guest.expect_page("[::1]:8081");
    for sink in sinks {
        assert!(sink.join().unwrap() == page(), "{}", guest.text);
    }
    guest.expect_answer("10.9.0.1:5300");
    // What is not published, or on another address, is not open.
    for closed in ["127.0.0.1:80", "192.0.2.2:8080", "127.0.0.1:8081"] {
        assert!(TcpStream::connect(closed).is_err(), "{closed}");
    }
    guest.go_on();
    guest.wait_for("carrier 1");
    let passt = common::children(guest.child.id());
    assert_eq!(passt.len(), 1);
    assert!(kill(passt[0], "KILL"));
    let text = expect_loss(guest);
    let addresses = ["mtu 65520", "inet 192.0.2.2/24", "nameserver 192.0.2.1"];
    assert_words(&text, &addresses);
    assert_words(&text, &["192.0.2.77", "many 500", "again"]);
    assert_eq!(text.matches("answer udp-").count(), 2, "{text}");
    assert_eq!(
        text.contains("by the gateway"),
        !gateway.is_empty(),
        "{text}"
    );
}

#[test]
fn passt_carries_all_for_debians_kernel() {
    passt_carries_all(&cloud(), "passt,host-loopback", "192.0.2.1", gibibyte());
}

#[test]
fn passt_carries_all_for_the_small_kernel() {
    if has_kernel("small") {
        passt_carries_all(&kernel("small", "bzImage"), "passt", "", gibibyte());
    }
}

/// Frames are on their way in both directions, some of them in part, when the guest resets the machine.
#[test]
fn a_guest_that_resets_under_traffic_has_its_network_again() {
    own_network(1500);
    network::web("10.9.0.1:8000");
    network::name_each_boot("10.9.0.1:5004");
    network::endless("10.9.0.1:5005");
    network::endless("10.9.0.1:5006");
    let args = ["--net", "passt,host-loopback", "--on-reboot", "restart"];
    let guest = Guest::boot(&cloud(), &args, "reset 10.9.0.1 ::");
    let (text, err) = guest.finish();
    let sum = sha256(&page());
    assert_words(&text, &[&format!("page {sum}")]);
    assert_eq!(err, "");
    assert_eq!(text.matches("minivmm-demo: userspace").count(), 2, "{text}");
}

/// What was on its way to a guest that is saved comes to the restored one: the host sends it again.
#[test]
fn a_connection_through_a_tap_survives_save_and_restore() {
    static IS_SAVED: AtomicBool = AtomicBool::new(false);
    own_network(1500);
    let sum = network::pages_until("10.9.0.1:5007", |_| IS_SAVED.load(Ordering::Relaxed));
    let net = ["--net", "tap=tap"];
    let saved = Saved::of(guest_command(&cloud(), &net, "saved 10.9.0.1 ::"));
    IS_SAVED.store(true, Ordering::Relaxed);
    let ended = saved.restore(&net);
    ended.assert_code(0);
    let sum = receive(&sum).unwrap_or_else(|| panic!("{}", ended.out()));
    ended.assert_printed(&[&format!("stream {sum}")]);
}
