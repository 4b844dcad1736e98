//! Which identity providers are trusted, and for which audience.

use reqwest::Url;

/// Longest URL and audience.
const MAX_CHARS: usize = 2048;

/// A trusted issuer of tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OidcIssuer {
    url: String,
    audiences: Vec<String>,
}

/// An issuer cannot be used as it is written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OidcIssuerError {
    /// It is no absolute URL with a host.
    #[error("read the OIDC issuer {0:?}: it must be a URL such as https://login.example.com")]
    Url(String),
    /// Keys that come over an open network could be anybody's.
    #[error("use the OIDC issuer {0:?}: it must be https, or http on this machine (localhost)")]
    Insecure(String),
    /// An issuer has neither. Source: OpenID Connect Discovery 1.0 section 3.
    #[error("use the OIDC issuer {0:?}: it must have no user, query or fragment")]
    Extras(String),
    /// Any token of the issuer would do, also those made for other services.
    #[error("use the OIDC issuer {0:?}: its audience is empty or too long")]
    Audience(String),
}

impl OidcIssuer {
    /// The issuer at `url` (exactly as its tokens spell it), trusted with tokens for `audience`.
    ///
    /// # Errors
    /// [`OidcIssuerError`] when `url` is not https (http is accepted for loopback hosts), carries
    /// what an issuer must not, or `audience` is empty; both have at most 2048 characters.
    pub fn parse(url: &str, audience: &str) -> Result<OidcIssuer, OidcIssuerError> {
        let text = || url.chars().take(MAX_CHARS).collect::<String>();
        if url.len() > MAX_CHARS {
            return Err(OidcIssuerError::Url(text()));
        }
        let parsed = Url::parse(url).map_err(|_| OidcIssuerError::Url(text()))?;
        if parsed.host_str().is_none_or(str::is_empty) {
            return Err(OidcIssuerError::Url(text()));
        }
        if !is_safe(&parsed) {
            return Err(OidcIssuerError::Insecure(text()));
        }
        let has_user = !parsed.username().is_empty() || parsed.password().is_some();
        if has_user || parsed.query().is_some() || parsed.fragment().is_some() {
            return Err(OidcIssuerError::Extras(text()));
        }
        if audience.trim().is_empty() || audience.len() > MAX_CHARS {
            return Err(OidcIssuerError::Audience(text()));
        }
        Ok(OidcIssuer { url: url.to_owned(), audiences: vec![audience.to_owned()] })
    }

    /// The issuer as its tokens spell it.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Whether a token for `audience` is meant for this server.
    pub(crate) fn is_for(&self, audience: &str) -> bool {
        self.audiences.iter().any(|known| known == audience)
    }

    /// `issuers` with those of the same URL made one that has all their audiences.
    pub(crate) fn merged(issuers: &[OidcIssuer]) -> Vec<OidcIssuer> {
        let mut merged: Vec<OidcIssuer> = Vec::new();
        for issuer in issuers {
            match merged.iter_mut().find(|known| known.url == issuer.url) {
                Some(known) => known.audiences.extend(issuer.audiences.iter().cloned()),
                None => merged.push(issuer.clone()),
            }
        }
        merged
    }

    /// Where the discovery document is. Source: OpenID Connect Discovery 1.0 section 4.
    pub(crate) fn discovery(&self) -> String {
        format!("{}/.well-known/openid-configuration", self.url.trim_end_matches('/'))
    }

    /// Whether keys may be fetched from `url`. An issuer on the open network cannot send this
    /// server to its own loopback.
    pub(crate) fn may_keep_keys_at(&self, url: &Url) -> bool {
        url.scheme() == "https" || (is_safe(url) && self.url.starts_with("http://"))
    }
}

/// Nobody between this process and the host can change what it answers.
fn is_safe(url: &Url) -> bool {
    match url.scheme() {
        "https" => true,
        "http" => url.host_str().is_some_and(|host| {
            let host = host.trim_start_matches('[').trim_end_matches(']');
            let address = host.parse::<std::net::IpAddr>();
            host == "localhost" || address.is_ok_and(|address| address.is_loopback())
        }),
        _ => false,
    }
}
