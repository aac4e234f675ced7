//! Logins that docker or podman have left: `~/.docker/config.json`, and the helpers that it names.

use std::collections::BTreeMap;
use std::env;
use std::fs::File;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde::Deserialize;

use super::{MAX_JSON, Reference};
use crate::about;

/// What the default registry is called there.
const DEFAULT_KEY: &str = "index.docker.io";
/// The name that stands for a token instead of a password.
const TOKEN_USER: &str = "<token>";

/// How a registry knows its user.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Login {
    /// The header for name and password.
    Basic(String),
    /// A token that others can be had for.
    Identity(String),
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct ConfigFile {
    auths: BTreeMap<String, Auth>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Auth {
    /// NAME:PASSWORD in Base64.
    auth: String,
    identitytoken: String,
}

/// What a helper prints.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

/// The files in which logins are looked for: docker's, and podman's.
fn files() -> Vec<PathBuf> {
    let home = env::var_os("HOME").map(|home| Path::new(&home).join(".docker"));
    let docker = env::var_os("DOCKER_CONFIG").map(PathBuf::from).or(home);
    let runtime = env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let docker = docker.map(|dir| dir.join("config.json"));
    let podman = runtime.map(|dir| dir.join("containers/auth.json"));
    docker.into_iter().chain(podman).collect()
}

/// The login for an image's registry, if there is one.
pub(super) fn find(reference: &Reference) -> io::Result<Option<Login>> {
    for path in files() {
        let found = find_in(&path, reference).map_err(about(path.display()))?;
        if found.is_some() {
            return Ok(found);
        }
    }
    Ok(None)
}

fn find_in(path: &Path, reference: &Reference) -> io::Result<Option<Login>> {
    let file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        file => file?,
    };
    let mut text = Vec::new();
    file.take(MAX_JSON).read_to_end(&mut text)?;
    let config: ConfigFile = serde_json::from_slice(&text)?;
    let names = if reference.is_default_host() {
        [DEFAULT_KEY, &reference.host]
    } else {
        [reference.host.as_str(); 2]
    };
    let is_it = |key: &str| names.contains(&host_of(key));
    let helper = config.cred_helpers.iter().find(|(key, _)| is_it(key));
    let store = Some(config.creds_store.as_str()).filter(|name| !name.is_empty());
    let auth = config.auths.iter().find(|(key, _)| is_it(key));
    // The helper knows the registry by the key that docker login had.
    let key = helper.map(|(key, _)| key).or(auth.map(|(key, _)| key));
    let key = key.map_or(names[0], String::as_str);
    if let Some(name) = helper.map(|(_, name)| name.as_str()).or(store)
        && let Some(login) = ask_helper(name, key)?
    {
        return Ok(Some(login));
    }
    Ok(auth.and_then(|(_, auth)| {
        if !auth.identitytoken.is_empty() {
            Some(Login::Identity(auth.identitytoken.clone()))
        } else if !auth.auth.is_empty() {
            Some(Login::Basic(format!("Basic {}", auth.auth)))
        } else {
            None
        }
    }))
}

/// The host in a key, which may be a URL.
fn host_of(key: &str) -> &str {
    let url = key.strip_prefix("https://").or(key.strip_prefix("http://"));
    match url {
        Some(url) => url.split('/').next().unwrap_or_default(),
        None => key,
    }
}

/// Runs a credential helper, a program of the user's.
fn ask_helper(name: &str, key: &str) -> io::Result<Option<Login>> {
    let program = format!("docker-credential-{name}");
    let shown = about(&program);
    let mut child = Command::new(&program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(&shown)?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that reads nothing says below what it wants.
        _ = stdin.write_all(key.as_bytes());
    }
    let output = child.wait_with_output().map_err(&shown)?;
    // That is how it says that it has none.
    if !output.status.success() {
        return Ok(None);
    }
    let answer: HelperAnswer =
        serde_json::from_slice(&output.stdout).map_err(|e| shown(e.into()))?;
    Ok(Some(if answer.username == TOKEN_USER {
        Login::Identity(answer.secret)
    } else {
        let text = format!("{}:{}", answer.username, answer.secret);
        Login::Basic(format!("Basic {}", BASE64_STANDARD.encode(text)))
    }))
}
