//! Users and groups of the image, by name or number (OCI image specification, config.md, "User").

use std::fs::File;
use std::io::{self, Read};

/// Longest /etc/passwd or /etc/group in bytes.
const MAX_FILE: u64 = 16 << 20;

/// Who a program runs as.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Supplementary groups.
    pub(super) groups: Vec<u32>,
    pub(super) home: String,
}

/// A file of the image's; if it is not there, it is empty.
pub(super) fn read(path: &str) -> io::Result<String> {
    let mut bytes = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(MAX_FILE).read_to_end(&mut bytes)?,
        Err(e) if e.kind() == io::ErrorKind::NotFound => 0,
        Err(e) => return Err(e),
    };
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The lines of such a file, as their fields.
fn records(file: &str) -> impl Iterator<Item = Vec<&str>> {
    file.lines().map(|line| line.split(':').collect())
}

impl User {
    /// Whom `text` names: USER or USER:GROUP.
    pub(super) fn find(text: &str, passwd: &str, group: &str) -> Result<Self, String> {
        let (user, wanted_group) = match text.split_once(':') {
            Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
            None => (text, None),
        };
        let user = if user.is_empty() { "0" } else { user };
        let number: Option<u32> = user.parse().ok();
        let entry = records(passwd).find_map(|fields| match fields.as_slice() {
            [name, _, uid, gid, _, home, ..] => {
                let (uid, gid): (u32, u32) = (uid.parse().ok()?, gid.parse().ok()?);
                let same = number.map_or(*name == user, |number| number == uid);
                same.then(|| (name.to_string(), uid, gid, home.to_string()))
            }
            _ => None,
        });
        let mut found = match (&entry, number) {
            (Some((_, uid, gid, home)), _) => Self {
                uid: *uid,
                gid: *gid,
                groups: Vec::new(),
                home: home.clone(),
            },
            (None, Some(uid)) => Self {
                uid,
                gid: 0,
                groups: Vec::new(),
                home: String::new(),
            },
            (None, None) => return Err(format!("there is no user '{user}' in the image")),
        };
        if found.home.is_empty() {
            found.home = "/".to_owned();
        }
        match (wanted_group, entry) {
            (Some(wanted), _) => {
                let by_name = records(group).find_map(|fields| match fields.as_slice() {
                    [name, _, gid, ..] if *name == wanted => gid.parse().ok(),
                    _ => None,
                });
                let gid = wanted.parse().ok().or(by_name);
                found.gid = gid.ok_or(format!("there is no group '{wanted}' in the image"))?;
            }
            (None, Some((name, ..))) => {
                let groups = records(group).filter_map(|fields| match fields.as_slice() {
                    [_, _, gid, members, ..] if members.split(',').any(|member| member == name) => {
                        gid.parse().ok()
                    }
                    _ => None,
                });
                found.groups = groups.collect();
            }
            (None, None) => {}
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nbad line\nann:x:1000:1001::/home/ann:\nnoh:x:7:8:::\n";
    const GROUP: &str =
        "root:x:0:\nann:x:1001:\nwheel:x:10:ann,root\nvideo:x:44:bob\ndisk:x:6:ann\n";

    fn find(text: &str) -> (u32, u32, Vec<u32>, String) {
        let user = User::find(text, PASSWD, GROUP).unwrap();
        (user.uid, user.gid, user.groups, user.home)
    }

    #[test]
    fn names_and_numbers() {
        assert_eq!(find(""), (0, 0, vec![10], "/root".into()));
        assert_eq!(find("ann"), (1000, 1001, vec![10, 6], "/home/ann".into()));
        assert_eq!(find("1000"), find("ann"));
        assert_eq!(find("ann:video"), (1000, 44, vec![], "/home/ann".into()));
        assert_eq!(find("ann:"), find("ann"));
        assert_eq!(find("noh"), (7, 8, vec![], "/".into()));
        assert_eq!(find("4000000000:5"), (4_000_000_000, 5, vec![], "/".into()));
        assert_eq!(find("77"), (77, 0, vec![], "/".into()));
        for unknown in ["bob", "-1", "4294967296", "ann:bob", "bad line"] {
            assert!(User::find(unknown, PASSWD, GROUP).is_err(), "{unknown}");
        }
    }
}
