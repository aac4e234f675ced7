//! passt: a process that is a guest's network in user space, and needs no rights (<https://passt.top>).

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Child, ChildStderr, Command, Stdio};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use minivmm_devices::thread::{ThreadKind, ThreadStarter};
use nix::sys::signal::SigSet;
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, geteuid, set_parent_process_death_signal};

use crate::config::{NetConfig, PublishedPort};
use crate::escaped;

/// The program, on the PATH.
pub const PROGRAM: &str = "passt";

/// How to get it.
pub const INSTALL: &str = "install the package passt (apt-get install passt, dnf install passt)";

/// Longest packet in bytes that it takes and gives, and the MTU that it tells the guest by DHCP.
pub const MTU: u16 = 65520;

/// IPv4 address, bits of its network, and gateway of a guest whose address is fixed. What it sends leaves with the host's address.
pub const ADDRESS: (Ipv4Addr, u8, Ipv4Addr) =
    (Ipv4Addr::new(10, 0, 2, 15), 24, Ipv4Addr::new(10, 0, 2, 2));

/// Messages of one passt that are shown, and their longest: a guest can provoke some of them.
const MAX_LINES: usize = 100;
const MAX_LINE: u64 = 1024;

/// How long the end of a VM waits for passt's, so that published ports are free again.
const EXIT_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no passt.
#[derive(Debug, thiserror::Error)]
pub enum PasstError {
    /// It is not installed.
    #[error("{PROGRAM} is not on the PATH; {INSTALL}")]
    Missing,
    /// It cannot be started.
    #[error("cannot start {PROGRAM}")]
    Start(#[source] io::Error),
    /// A port of the host cannot be bound.
    #[error("cannot publish {0} port {1}")]
    Publish(&'static str, SocketAddr, #[source] io::Error),
}

/// A running passt. It ends when its socket is closed, and so with this process, and when this is dropped.
#[derive(Debug)]
pub struct Passt {
    /// To close the connection, whatever else has the socket open.
    socket: UnixStream,
    started: Receiver<io::Result<()>>,
    /// Disconnected at its end, for which is waited where it has published ports. Otherwise nobody needs it to be gone: a VM that ends at
    /// once would wait for it to start.
    ended: Option<Receiver<()>>,
}

impl Passt {
    /// Starts one for this network, on a thread of its own, and gives the socket to it. [`Passt::check_start`] says whether it has started.
    pub fn start(net: &NetConfig, threads: &ThreadStarter) -> Result<(OwnedFd, Self), PasstError> {
        net.publish.iter().try_for_each(check_port)?;
        let (ours, theirs) = UnixStream::pair().map_err(PasstError::Start)?;
        let socket = ours.try_clone().map_err(PasstError::Start)?;
        let mut command = Command::new(PROGRAM);
        let gateway = if net.fixed_address {
            Some(ADDRESS.2)
        } else {
            gateway(&fs::read_to_string("/proc/net/route").unwrap_or_default())
        };
        command.args(arguments(net, &resolvers(), gateway));
        let (start, started) = sync_channel(1);
        let (_end, ended) = sync_channel(1);
        let threads = threads.clone();
        let run = move || {
            let _end = _end;
            run(command, theirs, start, &threads);
        };
        // To start a process takes as long as all else that minivmm does for a VM.
        std::thread::Builder::new()
            .name(PROGRAM.into())
            .stack_size(minivmm_devices::THREAD_STACK)
            .spawn(run)
            .map_err(PasstError::Start)?;
        let passt = Self {
            socket,
            started,
            ended: (!net.publish.is_empty()).then_some(ended),
        };
        Ok((ours.into(), passt))
    }

    /// Waits until the process has started. What goes wrong in it afterwards, it says itself; and the link goes down.
    pub fn check_start(&self) -> Result<(), PasstError> {
        match self.started.recv() {
            Ok(Err(e)) if e.kind() == ErrorKind::NotFound => Err(PasstError::Missing),
            Ok(Err(e)) => Err(PasstError::Start(e)),
            // It was asked before.
            Ok(Ok(())) | Err(_) => Ok(()),
        }
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It fails where passt has closed it already.
        let _ = self.socket.shutdown(Shutdown::Both);
        if let Some(ended) = &self.ended {
            let _ = ended.recv_timeout(EXIT_TIMEOUT);
        }
    }
}

/// Starts the process, shows what it says, and waits for its end.
fn run(
    command: Command,
    socket: UnixStream,
    start: SyncSender<io::Result<()>>,
    threads: &ThreadStarter,
) {
    let spawned = spawn(command, socket);
    threads.adopt(ThreadKind::Net);
    let (mut child, result) = match spawned {
        Ok(child) => (Some(child), Ok(())),
        Err(e) => (None, Err(e)),
    };
    // It fails when there is no VM any more.
    let _ = start.send(result);
    drop(start);
    if let Some(child) = &mut child {
        if let Some(stderr) = child.stderr.take() {
            show(stderr);
        }
        let _ = child.wait();
    }
}

#[allow(unsafe_code, reason = "a step between fork and exec is unsafe")]
fn spawn(mut command: Command, socket: UnixStream) -> io::Result<Child> {
    /// One process at a time inherits a socket: another one would keep it open.
    static INHERITING: Mutex<()> = Mutex::new(());
    command
        .arg(option("fd"))
        .arg(socket.as_raw_fd().to_string())
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C at a terminal is not for it.
        .process_group(0);
    // SAFETY: neither allocates memory nor takes a lock.
    unsafe { command.pre_exec(before_exec) };
    let _guard = INHERITING.lock().unwrap_or_else(PoisonError::into_inner);
    fcntl_setfd(&socket, FdFlags::empty())?;
    let child = command.spawn();
    drop(socket);
    child
}

/// Signals that are blocked here for the event loop are not for passt. It ends when its socket is closed; if it is stuck, it is killed with
/// this thread, but as root, where it drops that with its rights (PR_SET_PDEATHSIG(2const)).
fn before_exec() -> io::Result<()> {
    SigSet::empty().thread_set_mask()?;
    Ok(set_parent_process_death_signal(Some(Signal::KILL))?)
}

fn show(stderr: ChildStderr) {
    let mut reader = BufReader::new(stderr);
    let mut shown = 0;
    let mut line = Vec::new();
    while matches!(reader.by_ref().take(MAX_LINE).read_until(b'\n', &mut line), Ok(count) if count > 0)
    {
        let text = String::from_utf8_lossy(&line);
        let text = text.trim();
        // It says of each line that there is no system log; without IPv4 or IPv6 it goes on with the other; and a resolver that it was
        // given for IPv4 is none for IPv6.
        let is_noise = text.is_empty()
            || text.ends_with("bytes to syslog")
            || text.starts_with("No external routable interface")
            || text == "Couldn't get any nameserver address";
        if !is_noise && shown <= MAX_LINES {
            shown += 1;
            match shown {
                ..=MAX_LINES => log::warn!("{PROGRAM}: {}", escaped(text)),
                _ => log::warn!("{PROGRAM} has said {MAX_LINES} lines; no more are shown"),
            }
        }
        line.clear();
    }
}

/// One of passt's options (passt(1)).
fn option(name: &str) -> String {
    format!("--{name}")
}

fn arguments(net: &NetConfig, resolvers: &[IpAddr], gateway: Option<Ipv4Addr>) -> Vec<String> {
    let mut arguments = vec![option("foreground"), option("quiet")];
    if !net.host_loopback {
        arguments.push(option("no-map-gw"));
    }
    let mut add = |name: &str, value: String| arguments.extend([option(name), value]);
    add("mtu", MTU.to_string());
    if net.fixed_address {
        let (address, bits, gateway) = ADDRESS;
        add("address", address.to_string());
        add("netmask", bits.to_string());
        add("gateway", gateway.to_string());
    }
    if geteuid().is_root() {
        // As it does by itself, but then it says so.
        add("runas", "nobody".into());
    }
    // Without a list for UDP, ports of TCP are published for it too.
    for (name, is_udp) in [("tcp-ports", false), ("udp-ports", true)] {
        let ports = net.publish.iter().filter(|port| port.is_udp == is_udp);
        let mut ports = ports.map(PublishedPort::passt_spec).peekable();
        if ports.peek().is_none() {
            add(name, "none".into());
        }
        ports.for_each(|port| add(name, port));
    }
    // Where the host's resolver is the host's own, on an address such as 127.0.0.53, the guest asks the gateway, and passt passes that on.
    // No other address will do: answers from loopback addresses seem to come from the gateway.
    if !net.host_loopback
        && let (Some(resolver), Some(gateway)) = (resolvers.first(), gateway)
        && resolvers.iter().all(IpAddr::is_loopback)
    {
        add("dns", resolver.to_string());
        add("dns", gateway.to_string());
        add("dns-forward", gateway.to_string());
    }
    arguments
}

/// The host's resolvers for IPv4 (resolv.conf(5)).
fn resolvers() -> Vec<IpAddr> {
    let text = fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let lines = text
        .lines()
        .filter_map(|line| line.strip_prefix("nameserver"));
    let addresses = lines.filter_map(|address| address.trim().parse().ok());
    addresses.filter(IpAddr::is_ipv4).collect()
}

/// The resolvers of a guest whose address is fixed: the host's, or the gateway, where the host's lead to the host itself.
pub fn fixed_resolvers() -> Vec<IpAddr> {
    let mut resolvers = resolvers();
    resolvers.retain(|resolver| !resolver.is_loopback());
    if resolvers.is_empty() {
        resolvers.push(ADDRESS.2.into());
    }
    resolvers
}

/// Whether this host has a network that passt could lead to: without a default route, it gives up.
pub fn has_way_out() -> bool {
    let read = |file| fs::read_to_string(file).unwrap_or_default();
    let v6 = read("/proc/net/ipv6_route");
    gateway(&read("/proc/net/route")).is_some() || v6.lines().any(is_way_out_v6)
}

/// Whether this line of /proc/net/ipv6_route is a default route: destination and length of its prefix come first, the interface last. A
/// host without one has one that refuses all packets, on lo.
fn is_way_out_v6(line: &str) -> bool {
    let is_default = line.starts_with(&format!("{:032x} 00", 0));
    is_default && line.split_whitespace().last() != Some("lo")
}

/// The gateway of the first default route (Linux, net/ipv4/fib_trie.c: addresses are hexadecimal, in the processor's byte order).
fn gateway(routes: &str) -> Option<Ipv4Addr> {
    let mut lines = routes.lines().map(|line| line.split_whitespace().skip(1));
    let default = lines.find(|fields| fields.clone().next() == Some("00000000"));
    let gateway = u32::from_str_radix(default?.nth(1)?, 16).ok()?;
    (gateway != 0).then(|| Ipv4Addr::from(gateway.to_ne_bytes()))
}

/// Whether a port can be bound. passt would say so only when the guest runs.
fn check_port(port: &PublishedPort) -> Result<(), PasstError> {
    let (protocol, bound) = if port.is_udp {
        ("UDP", UdpSocket::bind(port.address).map(drop))
    } else {
        ("TCP", TcpListener::bind(port.address).map(drop))
    };
    bound.map_err(|source| PasstError::Publish(protocol, port.address, source))
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::RecvTimeoutError;

    use super::*;

    fn net(text: &str) -> NetConfig {
        text.parse().unwrap()
    }

    #[test]
    fn a_port_in_use_is_an_error_before_anything_starts() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        for (address, protocol, suffix) in [
            (tcp.local_addr().unwrap(), "TCP", ""),
            (udp.local_addr().unwrap(), "UDP", "/udp"),
        ] {
            let net = net(&format!("passt,publish={}:80{suffix}", address.port()));
            let error = Passt::start(&net, &ThreadStarter::default()).unwrap_err();
            let wanted = format!("cannot publish {protocol} port {address}");
            assert_eq!(error.to_string(), wanted);
        }
    }

    #[test]
    fn ports_are_published_one_by_one_and_no_others() {
        let line = |text: &str| arguments(&net(text), &[], None).join(" ");
        assert!(line("passt").contains("--tcp-ports none --udp-ports none"));
        let one = line("passt,publish=8080:80,publish=0.0.0.0:53:5353/udp,publish=[::1]:22:2222");
        let wanted =
            "--tcp-ports 127.0.0.1/8080:80 --tcp-ports ::1/22:2222 --udp-ports 0.0.0.0/53:5353";
        assert!(one.contains(wanted), "{one}");
    }

    #[test]
    fn the_hosts_own_resolver_is_reached_through_passt() {
        let own: IpAddr = "127.0.0.53".parse().unwrap();
        let other: IpAddr = "192.0.2.1".parse().unwrap();
        let routes = "Iface\tDestination\tGateway\tFlags\n\
            eth0\t000200C0\t00000000\t0001\n\
            eth0\t00000000\t010200C0\t0003\n";
        let line = |text: &str, resolvers: &[IpAddr]| {
            arguments(&net(text), resolvers, gateway(routes)).join(" ")
        };
        let forwarded = "--dns 127.0.0.53 --dns 192.0.2.1 --dns-forward 192.0.2.1";
        assert!(line("passt", &[own]).contains(forwarded));
        assert!(!line("passt", &[own, other]).contains("--dns"));
        assert!(!line("passt", &[]).contains("--dns"));
        assert_eq!(gateway("Iface\tDestination\tGateway\n"), None);
        assert!(
            !arguments(&net("passt"), &[own], None)
                .concat()
                .contains("--dns")
        );
        // There, the gateway's address leads to it.
        let with_host = line("passt,host-loopback", &[own]);
        assert!(!with_host.contains("--dns") && !with_host.contains("--no-map-gw"));
        assert!(line("passt", &[own]).contains("--no-map-gw"));
    }

    #[test]
    fn a_default_route_is_a_way_out() {
        let zeros = "0".repeat(32);
        let line = |length, interface| {
            let (next, counts) = (
                "fd000000000000000000000000000001",
                "00000400 00000003 00000000",
            );
            format!("{zeros} {length} {zeros} 00 {next} {counts} 00000003 {interface:>8}")
        };
        assert!(is_way_out_v6(&line("00", "eth0")));
        assert!(!is_way_out_v6(&line("00", "lo")) && !is_way_out_v6(&line("80", "eth0")));
    }

    #[test]
    fn a_process_that_cannot_start_is_an_error_and_one_that_ends_is_waited_for() {
        let start = |program: &str| {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let (start, started) = sync_channel(1);
            let (end, ended) = sync_channel(1);
            let command = Command::new(program);
            std::thread::spawn(move || {
                run(command, theirs, start, &ThreadStarter::default());
                drop(end);
            });
            Passt {
                socket: ours,
                started,
                ended: Some(ended),
            }
        };
        let missing = start("minivmm-has-no-such-program").check_start();
        assert!(matches!(missing, Err(PasstError::Missing)));
        // It does not know its arguments, says so, and ends.
        let other = start("cat");
        other.check_start().unwrap();
        other.check_start().unwrap();
        let ended = other
            .ended
            .as_ref()
            .unwrap()
            .recv_timeout(Duration::from_secs(60));
        assert_eq!(ended, Err(RecvTimeoutError::Disconnected));
    }
}
