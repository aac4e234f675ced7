//! Who asks: a token, which another server gives for this repository, or name and password.

use std::io;

use http_auth::parser::ChallengeParser;
use serde::Deserialize;
use ureq::http::HeaderMap;
use ureq::http::header::{AUTHORIZATION, WWW_AUTHENTICATE};

use super::credentials::{Login, find};
use super::{MAX_ERROR, Repository, bad, read_limited};

/// A token server's answer (distribution's token.md).
#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

/// What a registry wants.
enum Challenge {
    Basic,
    Bearer {
        realm: String,
        service: Option<String>,
        scope: Option<String>,
    },
}

impl Challenge {
    /// The first of `headers` that is known here.
    fn of(headers: &HeaderMap) -> Option<Self> {
        let values = headers.get_all(WWW_AUTHENTICATE).iter();
        let mut challenges = values
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| ChallengeParser::new(value).map_while(Result::ok));
        challenges.find_map(|challenge| {
            let param = |name: &str| {
                let found = challenge.params.iter();
                let mut found = found.filter(|(key, _)| key.eq_ignore_ascii_case(name));
                found.next().map(|(_, value)| value.to_unescaped())
            };
            if challenge.scheme.eq_ignore_ascii_case("basic") {
                Some(Self::Basic)
            } else if challenge.scheme.eq_ignore_ascii_case("bearer") {
                Some(Self::Bearer {
                    realm: param("realm")?,
                    service: param("service"),
                    scope: param("scope"),
                })
            } else {
                None
            }
        })
    }
}

impl Repository {
    /// The header that answers the registry's challenge.
    pub(super) fn log_in(&self, headers: &HeaderMap) -> io::Result<String> {
        let host = &self.reference.host;
        let challenge = Challenge::of(headers);
        let challenge = challenge.ok_or_else(|| {
            bad(format!(
                "{host} wants a login of a kind that is not known here"
            ))
        })?;
        let login = find(&self.reference)?;
        match (challenge, login) {
            (Challenge::Basic, Some(Login::Basic(login))) => Ok(login),
            (Challenge::Basic, _) => Err(io::Error::new(
                io::ErrorKind::PermissionDenied,
                format!(
                    "{host} wants name and password: docker login {host} leaves them in ~/.docker/config.json"
                ),
            )),
            (
                Challenge::Bearer {
                    realm,
                    service,
                    scope,
                },
                login,
            ) => {
                let scope =
                    scope.unwrap_or_else(|| format!("repository:{}:pull", self.reference.path));
                self.token(&realm, service.as_deref(), &scope, login)
            }
        }
    }

    fn token(
        &self,
        realm: &str,
        service: Option<&str>,
        scope: &str,
        login: Option<Login>,
    ) -> io::Result<String> {
        let response = match login {
            Some(Login::Identity(token)) => self.agent.post(realm).send_form([
                ("grant_type", "refresh_token"),
                ("refresh_token", token.as_str()),
                ("client_id", "minivmm"),
                ("service", service.unwrap_or_default()),
                ("scope", scope),
            ]),
            login => {
                let mut request = self.agent.get(realm).query("scope", scope);
                if let Some(service) = service {
                    request = request.query("service", service);
                }
                if let Some(Login::Basic(login)) = login {
                    request = request.header(AUTHORIZATION, login);
                }
                request.call()
            }
        };
        let response = self.good(response.map_err(|e| self.failed(e))?)?;
        let answer: Token = serde_json::from_slice(&read_limited(response, MAX_ERROR)?)
            .map_err(|e| bad(format!("the token server's answer: {e}")))?;
        let token = answer.token.or(answer.access_token);
        let token = token.ok_or_else(|| bad("the token server's answer has no token"))?;
        Ok(format!("Bearer {token}"))
    }
}
