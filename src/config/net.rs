//! A network device: the value of `--net`.

use std::fmt;
use std::net::{Ipv4Addr, SocketAddr};
use std::str::FromStr;

use super::list::{for_each_key, number};
use minivmm_devices::virtio::net::MAX_PAIRS;
use serde::{Deserialize, Serialize};

/// How a network device is written on the command line.
const NET_SYNTAX: &str = "passt[,mac=M][,publish=[IP:]HOST:GUEST[/tcp|/udp]]...[,host-loopback] or tap=NAME[,queues=N]|fd=N[,mac=M]";

/// A network device. Written as its help says. Without a network, as after a restore that names none, its link is down.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetConfig {
    /// A TAP interface of the host.
    pub tap: Option<String>,
    /// An open descriptor of one, which the process has inherited.
    pub fd: Option<i32>,
    /// With a TAP interface by its name: pairs of queues, 1 to [`MAX_PAIRS`]; without it, one.
    pub queues: Option<u16>,
    /// passt, started for this device.
    pub passt: bool,
    /// With passt: ports of the host that lead to the guest.
    pub publish: Vec<PublishedPort>,
    /// With passt: whether the address of the guest's gateway leads to the host itself.
    pub host_loopback: bool,
    /// The guest's address; without it, one that follows from the VM.
    pub mac: Option<MacAddress>,
    /// With passt: whether the guest's IPv4 address is a fixed one, which it need not ask for.
    #[serde(skip)]
    pub fixed_address: bool,
}

/// Checks the network devices of a VM, and that no two want the same of the host.
pub(super) fn validate_all(nets: &[NetConfig]) -> Result<(), String> {
    nets.iter().try_for_each(NetConfig::validate)?;
    if let Some(name) = repeated(nets.iter().filter_map(|net| net.tap.as_ref())) {
        return Err(format!("two devices have tap={name}"));
    }
    if let Some(fd) = repeated(nets.iter().filter_map(|net| net.fd)) {
        return Err(format!("two devices have fd={fd}"));
    }
    let ports = nets.iter().enumerate();
    let ports = ports.flat_map(|(index, net)| net.publish.iter().map(move |port| (index, port)));
    let ports: Vec<_> = ports.collect();
    for (place, (net, port)) in ports.iter().enumerate() {
        for (other_net, other) in ports.iter().take(place) {
            let both = || format!("publish={other} and publish={port}");
            if port.overlaps(other) {
                return Err(format!("{} are one port of the host", both()));
            }
            if net == other_net && port.has_number_of(other) && port.guest != other.guest {
                let number = port.address.port();
                return Err(format!(
                    "{}: with one passt, port {number} of all of the host's addresses leads to one port of the guest",
                    both()
                ));
            }
        }
    }
    Ok(())
}

fn repeated<T: PartialEq>(items: impl Iterator<Item = T> + Clone) -> Option<T> {
    let mut rest = items.clone().enumerate();
    let repeated =
        rest.find(|(place, item)| items.clone().take(*place).any(|other| other == *item));
    repeated.map(|(_, item)| item)
}

impl NetConfig {
    pub(super) fn validate(&self) -> Result<(), String> {
        if !self.passt && (!self.publish.is_empty() || self.host_loopback) {
            return Err("publish and host-loopback are for passt".into());
        }
        if !(1..=MAX_PAIRS).contains(&self.pairs()) {
            let queues = self.pairs();
            return Err(format!(
                "queues={queues}: a network device has 1 to {MAX_PAIRS} pairs of queues"
            ));
        }
        if self.pairs() > 1 && (self.passt || self.fd.is_some()) {
            return Err(
                "several queues are for a TAP interface by its name: write tap=NAME".into(),
            );
        }
        match (&self.tap, self.fd, self.passt) {
            (Some(name), None, false) if !name.is_empty() => Ok(()),
            (None, Some(fd), false) if fd > 2 => Ok(()),
            (None, Some(fd), false) => {
                Err(format!("fd={fd}: file descriptors from 3 on are inherited"))
            }
            (None, None, _) => Ok(()),
            (Some(_), None, false) => Err(format!("no network: write {NET_SYNTAX}")),
            _ => Err("passt, tap and fd exclude one another".into()),
        }
    }

    /// How many pairs of queues it has.
    pub fn pairs(&self) -> u16 {
        self.queues.unwrap_or(1)
    }

    /// Whether its link is down.
    pub fn is_unplugged(&self) -> bool {
        self.tap.is_none() && self.fd.is_none() && !self.passt
    }

    /// The guest's address: the one that is configured, or one that stays the same for this device, the place `index` of a VM that
    /// `vm` tells from others, with its TAP interface.
    pub fn mac_address(&self, vm: &[u8], index: usize, interface: Option<&str>) -> [u8; 6] {
        if let Some(MacAddress(mac)) = self.mac {
            return mac;
        }
        // "None" stands for a descriptor: its number, which many VMs have in common, was once part of it.
        let words = format!("{interface:?} None {index}");
        // FNV-1a: https://www.rfc-editor.org/rfc/rfc9923
        let hash = vm.iter().chain(words.as_bytes());
        let hash = hash.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x100_0000_01b3)
        });
        let [a, b, c, d, e, ..] = hash.to_le_bytes();
        // Locally administered, of one interface (IEEE 802 § 8.2.2).
        [0x02, a, b, c, d, e]
    }
}

impl FromStr for NetConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut config = Self::default();
        for_each_key(text, &["publish"], |part, key, value| {
            let value = value.unwrap_or_default();
            match key {
                "tap" => config.tap = Some(value.into()),
                "fd" => config.fd = Some(number(part, value)?),
                "queues" => config.queues = Some(number(part, value)?),
                "mac" => config.mac = Some(value.parse()?),
                "passt" if part == key => config.passt = true,
                "host-loopback" if part == key => config.host_loopback = true,
                "publish" => config.publish.push(value.parse()?),
                _ => return Err(format!("'{part}' is not known; write {NET_SYNTAX}")),
            }
            Ok(())
        })?;
        if config.is_unplugged() {
            config.tap = Some(String::new());
        }
        config.validate()?;
        Ok(config)
    }
}

/// A port of the host that leads to one of the guest. Written as `[IP:]HOST:GUEST[/tcp|/udp]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishedPort {
    /// Where the host listens.
    pub address: SocketAddr,
    /// The guest's port.
    pub guest: u16,
    /// Whether it is one of UDP and not of TCP.
    pub is_udp: bool,
}

impl PublishedPort {
    /// As passt wants it (passt(1), --tcp-ports).
    pub fn passt_spec(&self) -> String {
        let (ip, host, guest) = (self.address.ip(), self.address.port(), self.guest);
        format!("{ip}/{host}:{guest}")
    }

    fn has_number_of(&self, other: &Self) -> bool {
        self.is_udp == other.is_udp && self.address.port() == other.address.port()
    }

    /// Whether both listen at one port of one address.
    fn overlaps(&self, other: &Self) -> bool {
        let (ip, other_ip) = (self.address.ip(), other.address.ip());
        let any = ip.is_unspecified() || other_ip.is_unspecified();
        let overlap = ip == other_ip || any && ip.is_ipv4() == other_ip.is_ipv4();
        self.has_number_of(other) && overlap
    }
}

impl FromStr for PublishedPort {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'publish={text}': write [IP:]HOST:GUEST[/tcp|/udp], as in 8080:80");
        let (ports, is_udp) = match text.strip_suffix("/udp") {
            Some(ports) => (ports, true),
            None => (text.strip_suffix("/tcp").unwrap_or(text), false),
        };
        let (address, guest) = ports.rsplit_once(':').ok_or_else(wrong)?;
        let address = match address.parse() {
            Ok(port) => SocketAddr::from((Ipv4Addr::LOCALHOST, port)),
            Err(_) => address.parse().map_err(|_| wrong())?,
        };
        let guest = guest.parse().map_err(|_| wrong())?;
        if guest == 0 || address.port() == 0 {
            return Err(wrong());
        }
        Ok(Self {
            address,
            guest,
            is_udp,
        })
    }
}

impl fmt::Display for PublishedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let suffix = if self.is_udp { "/udp" } else { "" };
        write!(f, "{}:{}{suffix}", self.address, self.guest)
    }
}

/// The address of one network interface. Written as six bytes in hexadecimal, with colons.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl FromStr for MacAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("'{text}' is no MAC address of one interface, as 02:00:00:00:00:01 is");
        let mut mac = [0; 6];
        let mut bytes = text.split(':');
        for place in &mut mac {
            let digits = bytes.next().filter(|digits| {
                digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
            });
            let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
            *place = byte.ok_or_else(wrong)?;
        }
        let [first, ..] = mac;
        if bytes.next().is_some() || first & 1 != 0 || mac == [0; 6] {
            return Err(wrong());
        }
        Ok(Self(mac))
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_is_written_as_its_help_says() {
        let net = |text: &str| text.parse::<NetConfig>();
        let tap = net("tap=tap0,mac=02:00:00:00:0A:01").unwrap();
        assert_eq!(tap.tap.as_deref(), Some("tap0"));
        assert_eq!(tap.mac.unwrap().to_string(), "02:00:00:00:0a:01");
        assert_eq!(net("fd=3").unwrap().fd, Some(3));
        assert_eq!(
            (tap.pairs(), net("tap=a,queues=8").unwrap().pairs()),
            (1, 8)
        );
        let text =
            "passt,publish=8080:80,publish=[::1]:53:5353/udp,publish=22:22/tcp,host-loopback";
        let passt = net(text).unwrap();
        assert!(passt.passt && passt.host_loopback);
        let ports = passt.publish.iter().map(ToString::to_string);
        let ports: Vec<_> = ports.collect();
        let wanted = ["127.0.0.1:8080:80", "[::1]:53:5353/udp", "127.0.0.1:22:22"];
        assert_eq!(ports, wanted);
        NetConfig::default().validate().unwrap();
        let json = serde_json::to_string(&passt).unwrap();
        assert_eq!(serde_json::from_str::<NetConfig>(&json).unwrap(), passt);
        for (text, word) in [
            ("", "tap=NAME"),
            ("tap", "no network"),
            ("tap=", "no network"),
            ("mac=02:00:00:00:00:01", "no network"),
            ("tap=a,fd=4", "exclude"),
            ("passt,tap=a", "exclude"),
            ("passt=1", "not known"),
            ("passt,passt", "twice"),
            ("tap=a,publish=80:80", "for passt"),
            ("tap=a,host-loopback", "for passt"),
            ("passt,publish=80", "HOST:GUEST"),
            ("passt,publish=0:80", "HOST:GUEST"),
            ("passt,publish=80:0", "HOST:GUEST"),
            ("passt,publish=80:65536", "HOST:GUEST"),
            ("passt,publish=localhost:80:80", "HOST:GUEST"),
            ("passt,publish=80:80/tcp/udp", "HOST:GUEST"),
            ("passt,publish=80:80/sctp", "HOST:GUEST"),
            ("fd=2", "from 3 on"),
            ("fd=-1", "from 3 on"),
            ("fd=x", "'fd=x'"),
            ("tap=a,tap=b", "twice"),
            ("tap=a,queues=0", "1 to 8"),
            ("tap=a,queues=9", "1 to 8"),
            ("tap=a,queues=", "'queues='"),
            ("fd=3,queues=2", "tap=NAME"),
            ("passt,queues=2", "tap=NAME"),
            ("tap=a,mac=01:00:00:00:00:01", "one interface"),
            ("tap=a,mac=00:00:00:00:00:00", "one interface"),
            ("tap=a,mac=02:00:00:00:00", "one interface"),
            ("tap=a,mac=02:00:00:00:00:01:02", "one interface"),
            ("tap=a,mac=+2:00:00:00:00:01", "one interface"),
        ] {
            let error = net(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn no_two_networks_want_the_same_of_the_host() {
        let check = |texts: &[&str]| {
            let nets: Vec<NetConfig> = texts.iter().map(|text| text.parse().unwrap()).collect();
            validate_all(&nets)
        };
        for texts in [
            &["tap=a", "tap=b", "fd=3", "fd=4", "passt", "passt"][..],
            &["passt,publish=1:1,publish=1:1/udp,publish=[::1]:1:1,publish=127.0.0.2:1:1"],
            &["passt,publish=1:1", "passt,publish=127.0.0.2:1:2"],
            &["passt,publish=0.0.0.0:1:1,publish=[::]:1:1,publish=2:1"],
        ] {
            check(texts).unwrap();
        }
        for (texts, words) in [
            (&["tap=a", "passt", "tap=a,queues=2"][..], "tap=a"),
            (&["fd=3", "fd=4", "fd=4"], "fd=4"),
            (&["passt,publish=1:1,publish=1:1"], "one port of the host"),
            (&["passt,publish=1:1,publish=1:2"], "one port of the host"),
            (
                &["passt,publish=1:1,publish=0.0.0.0:1:1"],
                "one port of the host",
            ),
            (
                &["passt,publish=[::]:1:1", "passt,publish=[::1]:1:1"],
                "one port of the host",
            ),
            (
                &["passt,publish=1:1/udp", "passt,publish=1:2/udp"],
                "one port of the host",
            ),
            (
                &["passt,publish=1:1,publish=[::1]:1:2"],
                "one port of the guest",
            ),
        ] {
            let error = check(texts).unwrap_err();
            assert!(error.contains(words), "{texts:?}: {error}");
        }
    }

    #[test]
    fn addresses_follow_from_the_vm() {
        let net: NetConfig = "fd=3".parse().unwrap();
        let mac = net.mac_address(b"vm", 0, Some("tap0"));
        assert_eq!(mac, net.mac_address(b"vm", 0, Some("tap0")));
        assert_eq!(mac[0], 2, "locally administered, unicast");
        for other in [
            net.mac_address(b"vm", 1, Some("tap0")),
            net.mac_address(b"wm", 0, Some("tap0")),
            net.mac_address(b"vm", 0, Some("tap1")),
            net.mac_address(b"vm", 0, None),
        ] {
            assert_ne!(mac, other);
        }
    }
}
