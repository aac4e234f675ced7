//! Images in a registry, by HTTP (OCI distribution specification 1.1).
//!
//! What a registry sends is hostile until its digest is verified: answers have a limit, and so have waiting and retries.
//! Nothing of this is left when the VM is made: the connections end with [`Repository`].

mod auth;
pub(super) mod blob;
mod credentials;

use std::cell::{Cell, RefCell};
use std::io::{self, Read};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use ureq::http::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, RANGE};
use ureq::http::{HeaderMap, HeaderName, Response, StatusCode};
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use ureq::{Agent, Body};

use super::digest::Digest;
use super::limits::MAX_JSON;
use super::limits::bad;
use super::reference::{Reference, name_and_port};

/// Host of the default registry.
const DEFAULT_API_HOST: &str = "registry-1.docker.io";
/// How long a registry may take for the next bytes, and for a connection.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of an error's text.
const MAX_ERROR: u64 = 64 << 10;
/// Media types of manifests and indexes.
pub(super) const MANIFESTS: &str = "application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json, application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json";

/// A repository of a registry.
pub(super) struct Repository {
    agent: Agent,
    reference: Reference,
    /// `https://HOST/v2/PATH`.
    base: String,
    /// The header that says who asks, once the registry has wanted one.
    authorization: RefCell<Option<String>>,
    /// Attempts that have failed since much arrived.
    failures: Cell<u32>,
}

/// An answer to a request for a manifest.
pub(super) struct Manifest {
    pub(super) digest: Digest,
    pub(super) media_type: String,
    pub(super) bytes: Vec<u8>,
}

impl Repository {
    /// Makes no connection yet. HTTP without TLS is for this host, and for others where `insecure` says so.
    pub(super) fn new(reference: Reference, insecure: bool) -> io::Result<Self> {
        let host = if reference.is_default_host() {
            DEFAULT_API_HOST
        } else {
            &reference.host
        };
        let local = is_loopback(host);
        let plain = insecure || local;
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .https_only(!plain)
            .user_agent(concat!("minivmm/", env!("CARGO_PKG_VERSION")))
            .timeout_resolve(Some(TIMEOUT))
            .timeout_connect(Some(TIMEOUT))
            .timeout_recv_response(Some(TIMEOUT))
            .timeout_per_read(Some(TIMEOUT))
            .timeout_per_write(Some(TIMEOUT));
        let config = if local { config.proxy(None) } else { config };
        let tls = if plain { None } else { Some(tls()?) };
        let config = match tls {
            Some(tls) => config.tls_config(tls),
            None => config,
        };
        let scheme = if plain { "http" } else { "https" };
        Ok(Self {
            agent: config.build().new_agent(),
            base: format!("{scheme}://{host}/v2/{}", reference.path),
            reference,
            authorization: RefCell::new(None),
            failures: Cell::new(0),
        })
    }

    /// The manifest or index that the reference names, or the one with this digest.
    pub(super) fn manifest(&self, digest: Option<&Digest>) -> io::Result<Manifest> {
        let digest = digest.or(self.reference.digest.as_ref());
        let name = match digest {
            Some(digest) => digest.to_string(),
            None => self.reference.tag.clone().unwrap_or_default(),
        };
        let response = self.get(&format!("manifests/{name}"), &[(ACCEPT, MANIFESTS)])?;
        let response = self.good(response)?;
        let media_type = header(response.headers(), &CONTENT_TYPE);
        let media_type = media_type.split(';').next().unwrap_or_default().trim();
        let media_type = media_type.to_owned();
        if !MANIFESTS.split(", ").any(|known| known == media_type) {
            return Err(bad(format!(
                "{name} is no image but of type '{media_type}'"
            )));
        }
        let bytes = read_limited(response, MAX_JSON)?;
        let found = Digest::of(&bytes);
        if digest.is_some_and(|wanted| *wanted != found) {
            return Err(bad(format!(
                "the registry sent another manifest than {name}"
            )));
        }
        Ok(Manifest {
            digest: found,
            media_type,
            bytes,
        })
    }

    /// Asks for something of the repository, and logs in if the registry wants that.
    fn get(&self, path: &str, headers: &[(HeaderName, &str)]) -> io::Result<Response<Body>> {
        let url = format!("{}/{path}", self.base);
        let ask = || {
            let mut request = self.agent.get(&url);
            for (name, value) in headers {
                request = request.header(name, *value);
            }
            if let Some(authorization) = &*self.authorization.borrow() {
                request = request.header(AUTHORIZATION, authorization);
            }
            request.call().map_err(|e| self.failed(e))
        };
        let response = ask()?;
        // A token may have run out as well.
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let authorization = self.log_in(response.headers())?;
        self.authorization.replace(Some(authorization));
        ask()
    }

    /// The answer, unless it is an error.
    fn good(&self, response: Response<Body>) -> io::Result<Response<Body>> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let said = read_limited(response, MAX_ERROR).unwrap_or_default();
        let said: Value = serde_json::from_slice(&said).unwrap_or_default();
        let said = said.pointer("/errors/0").map_or(String::new(), |error| {
            let part = |name| error.get(name).and_then(Value::as_str).unwrap_or_default();
            format!(" ({}: {})", part("code"), part("message"))
        });
        let host = &self.reference.host;
        let text = match status {
            StatusCode::NOT_FOUND => format!("{host} has no such image{said}"),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => format!(
                "{host} gives it to nobody who is not logged in, or has no such repository; docker login {host} leaves a \
                 login in ~/.docker/config.json{said}"
            ),
            StatusCode::TOO_MANY_REQUESTS => {
                format!("{host} allows no more requests for now; a login often allows more{said}")
            }
            _ => format!("{host} answered {status}{said}"),
        };
        let kind = match status {
            StatusCode::NOT_FOUND => io::ErrorKind::NotFound,
            _ if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                io::ErrorKind::ConnectionReset
            }
            _ => io::ErrorKind::PermissionDenied,
        };
        Err(io::Error::new(kind, text))
    }

    /// What a request failed of.
    fn failed(&self, error: ureq::Error) -> io::Error {
        let (kind, why) = match &error {
            ureq::Error::HostNotFound => {
                (io::ErrorKind::NotFound, "there is no such host".to_owned())
            }
            ureq::Error::Timeout(_) => (io::ErrorKind::TimedOut, "no answer in time".to_owned()),
            ureq::Error::Io(e) => match e.get_ref().and_then(|e| e.downcast_ref()) {
                // What a server without TLS answers to its first message.
                Some(rustls::Error::InvalidMessage(_)) => (
                    io::ErrorKind::InvalidData,
                    "it does not speak TLS; plain HTTP has to be allowed".to_owned(),
                ),
                Some(e) => (io::ErrorKind::InvalidData, e.to_string()),
                None => (e.kind(), e.to_string()),
            },
            ureq::Error::RequireHttpsOnly(url) => (
                io::ErrorKind::PermissionDenied,
                format!("it leads to {url}, which has no TLS"),
            ),
            _ => (io::ErrorKind::InvalidData, error.to_string()),
        };
        io::Error::new(kind, format!("{}: {why}", self.reference.host))
    }
}

/// Whether a host is this one. What resolves to it does not count: a name may lead anywhere tomorrow.
fn is_loopback(authority: &str) -> bool {
    let (host, _) = name_and_port(authority);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost"
        || host
            .parse()
            .is_ok_and(|address: IpAddr| address.is_loopback())
}

/// TLS with the root certificates of this host.
fn tls() -> io::Result<TlsConfig> {
    let found = rustls_native_certs::load_native_certs();
    if found.certs.is_empty() {
        let why = found.errors.first().map(|e| format!(": {e}"));
        return Err(io::Error::other(format!(
            "this host has no root certificates, such as the package ca-certificates brings{}",
            why.unwrap_or_default()
        )));
    }
    let certificates = found
        .certs
        .iter()
        .map(|c| Certificate::from_der(c).to_owned());
    let certificates: Vec<_> = certificates.collect();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&certificates))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build())
}

/// A header's value; empty if it is not there or not readable.
fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> &'a str {
    let value = headers.get(name).and_then(|value| value.to_str().ok());
    value.unwrap_or_default()
}

/// A body of at most `limit` bytes.
fn read_limited(response: Response<Body>, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let body = response.into_body().into_with_config().limit(u64::MAX);
    body.reader().take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        return Err(bad(format!("the answer has more than {} KiB", limit >> 10)));
    }
    Ok(bytes)
}
