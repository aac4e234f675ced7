//! Names of images in registries, by docker's rules: `[HOST[:PORT]/]PATH[:TAG][@DIGEST]`.

use std::fmt;
use std::str::FromStr;

use super::digest::Digest;

/// The registry of names without a host, as names have it.
const DEFAULT_HOST: &str = "docker.io";
/// An older name of it.
const OLD_DEFAULT_HOST: &str = "index.docker.io";
/// What the default registry has names without a slash below.
const LIBRARY: &str = "library/";
/// The tag that is meant where neither a tag nor a digest is given.
const DEFAULT_TAG: &str = "latest";
/// Bytes of host and path, and of a tag.
const MAX_NAME: usize = 255;
const MAX_TAG: usize = 128;

/// An image in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Reference {
    /// Host and perhaps port of the registry.
    pub(super) host: String,
    /// The repository.
    pub(super) path: String,
    /// A name for one of its images, which may be another one tomorrow.
    pub(super) tag: Option<String>,
    /// What the image has to be.
    pub(super) digest: Option<Digest>,
}

impl Reference {
    /// Whether the registry is the one of names without a host.
    pub(super) fn is_default_host(&self) -> bool {
        self.host == DEFAULT_HOST
    }
}

impl FromStr for Reference {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |why: &str| format!("'{text}' is no name of an image: {why}");
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse()?)),
            None => (text, None),
        };
        // A colon in front of a slash is one of a port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        let is_host = |host: &str| {
            host == "localhost"
                || host.contains(['.', ':'])
                || host.contains(|c: char| c.is_ascii_uppercase())
        };
        let (host, path) = match name.split_once('/') {
            Some((host, path)) if is_host(host) => (host, path),
            _ => (DEFAULT_HOST, name),
        };
        let host = match host {
            OLD_DEFAULT_HOST => DEFAULT_HOST,
            host => host,
        };
        let path = match host {
            DEFAULT_HOST if !path.contains('/') => format!("{LIBRARY}{path}"),
            _ => path.to_owned(),
        };
        if !is_authority(host) {
            return Err(wrong(&format!("'{host}' is no host")));
        }
        if host.len() + path.len() >= MAX_NAME {
            return Err(wrong("it is too long"));
        }
        if !path.split('/').all(is_component) {
            let rule =
                "paths have lower-case letters and digits, with '.', '_', '__' or '-' between them";
            return Err(wrong(rule));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(wrong("the tag is none"));
        }
        Ok(Self {
            host: host.to_owned(),
            path,
            tag: match (tag, &digest) {
                (None, None) => Some(DEFAULT_TAG.to_owned()),
                (tag, _) => tag.map(str::to_owned),
            },
            digest,
        })
    }
}

/// Whether two texts name the same image: they are equal, or differ in what may be left out of a name.
pub(super) fn same_image(one: &str, other: &str) -> bool {
    let reference = |text: &str| text.parse::<Reference>();
    one == other || reference(one).is_ok_and(|one| reference(other).as_ref() == Ok(&one))
}

/// As people write it: without what is the default.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_default_host() {
            f.write_str(self.path.strip_prefix(LIBRARY).unwrap_or(&self.path))?;
        } else {
            write!(f, "{}/{}", self.host, self.path)?;
        }
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        match &self.digest {
            Some(digest) => write!(f, "@{digest}"),
            None => Ok(()),
        }
    }
}

/// A host's name or address, the latter in brackets if it is one of IPv6, and its port.
pub(super) fn name_and_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((name, port)) if !port.contains(']') => (name, Some(port)),
        _ => (authority, None),
    }
}

/// A name or an address, perhaps with a port. It goes into a URL, so that nothing else may be in it.
fn is_authority(host: &str) -> bool {
    let (name, port) = name_and_port(host);
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || c == '-';
        !label.is_empty()
            && label.chars().all(inner)
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let address = name.strip_prefix('[').and_then(|n| n.strip_suffix(']'));
    let is_name = match address {
        Some(address) => address.parse::<std::net::Ipv6Addr>().is_ok(),
        None => name.split('.').all(label),
    };
    is_name && port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port > 0))
}

/// Lower-case letters and digits, with separators between them.
fn is_component(text: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let between = |separator: &str| {
        matches!(separator, "" | "." | "_" | "__") || separator.bytes().all(|b| b == b'-')
    };
    text.starts_with(is_plain) && text.ends_with(is_plain) && text.split(is_plain).all(between)
}

fn is_tag(tag: &str) -> bool {
    let is_word = |c: char| c.is_ascii_alphanumeric() || c == '_';
    (1..=MAX_TAG).contains(&tag.len())
        && tag.starts_with(is_word)
        && tag.chars().all(|c| is_word(c) || c == '.' || c == '-')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_follow_dockers_rules() {
        let digest = format!("sha256:{}", "0123456789abcdef".repeat(4));
        // Name, host, path, tag, and how it is shown.
        for line in [
            "debian docker.io library/debian latest debian:latest",
            "debian:12 docker.io library/debian 12 debian:12",
            "docker.io/debian docker.io library/debian latest debian:latest",
            "index.docker.io/library/a docker.io library/a latest a:latest",
            "me/app:V_1.x-y docker.io me/app V_1.x-y me/app:V_1.x-y",
            "h.example/a h.example a latest h.example/a:latest",
            "localhost/a/b localhost a/b latest localhost/a/b:latest",
            "h:5000/a--b/c__d:e h:5000 a--b/c__d e h:5000/a--b/c__d:e",
            "[::1]:5000/a [::1]:5000 a latest [::1]:5000/a:latest",
            "Host/a Host a latest Host/a:latest",
            "a@DIGEST docker.io library/a - a@DIGEST",
            "localhost/a:1@DIGEST localhost a 1 localhost/a:1@DIGEST",
        ] {
            let line = line.replace("DIGEST", &digest);
            let words: Vec<&str> = line.split(' ').collect();
            let reference: Reference = words[0].parse().unwrap();
            let tag = reference.tag.as_deref().unwrap_or("-");
            let shown = reference.to_string();
            let found = [&reference.host, &reference.path, tag, &shown];
            assert_eq!(found, words[1..], "{line}");
            assert_eq!(shown.parse::<Reference>().unwrap(), reference);
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let long = "a".repeat(256);
        for text in [
            "",
            ":",
            "a:",
            "/a",
            "a/",
            "a//b",
            "A",
            "a b",
            "a/B",
            "-a",
            "a-",
            "a___b",
            "a._b",
            "a:-x",
            "a:x/y?z",
            "a@sha256:12",
            "a@md5:x",
            "h.x:99999/a",
            "h.x:0/a",
            "u@h.x/a",
            "h.x/../a",
            "h.x%2f/a",
            "[::g]:1/a",
            "-h.x/a",
            "h..x/a",
            "https://h.x/a",
            &long,
        ] {
            assert!(text.parse::<Reference>().is_err(), "{text}");
        }
    }
}
