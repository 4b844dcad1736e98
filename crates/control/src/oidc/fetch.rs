//! Fetching a provider's documents: small, soon, and from where they belong.

use std::time::Duration;

use belljar_domain::Kind;
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, StatusCode, Url};
use serde::Deserialize;

use super::OidcIssuer;
use super::keys::{KeySet, KeySetError};
use super::provider::Timing;
use crate::outgoing;

/// Either document. Those of large providers have some 10 KiB.
const MAX_DOCUMENT_BYTES: usize = 256 * 1024;
/// Redirects followed, all within one host.
const MAX_REDIRECTS: usize = 3;

/// Why a provider's keys were not fetched.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// It could not be asked, or stopped in mid-answer.
    #[error("ask the identity provider at {url}")]
    Request {
        url: String,
        #[source]
        source: reqwest::Error,
    },
    /// It did not finish in time.
    #[error("ask the identity provider {issuer}: no answer in {limit:?}")]
    Late { issuer: String, limit: Duration },
    /// It answered something else than 200.
    #[error("ask the identity provider at {url}: it answered {status}")]
    Status { url: String, status: StatusCode },
    /// The document is too large to be what was asked for.
    #[error("ask the identity provider at {url}: more than {MAX_DOCUMENT_BYTES} bytes")]
    Size { url: String },
    /// The discovery document is not one, or another issuer's, or keeps keys in an unsafe place.
    #[error("read the discovery document of {issuer}: {problem}")]
    Discovery { issuer: String, problem: &'static str },
    /// The keys cannot be read.
    #[error("read the keys of {issuer}")]
    Keys {
        issuer: String,
        #[source]
        source: KeySetError,
    },
}

impl FetchError {
    /// All of these are the provider's or the network's to mend.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            FetchError::Late { .. }
            | FetchError::Request { .. }
            | FetchError::Status { .. }
            | FetchError::Size { .. }
            | FetchError::Discovery { .. }
            | FetchError::Keys { .. } => Kind::Unavailable,
        }
    }
}

#[derive(Deserialize)]
struct Discovery {
    issuer: String,
    jwks_uri: String,
}

/// A client for [`keys`].
pub(crate) fn client(timing: &Timing) -> Result<Client, rustls::Error> {
    outgoing::client_builder()?
        .redirect(Policy::custom(within_one_host))
        .connect_timeout(timing.fetch_limit)
        // Asked once an hour: there is no connection to keep.
        .pool_max_idle_per_host(0)
        .user_agent(concat!("belljar/", env!("CARGO_PKG_VERSION")))
        .build()
        .map_err(|e| rustls::Error::General(e.to_string()))
}

fn within_one_host(attempt: Attempt<'_>) -> reqwest::redirect::Action {
    let from = attempt.previous().last().map(Url::origin);
    let stays = from.is_some_and(|from| from == attempt.url().origin());
    if stays && attempt.previous().len() <= MAX_REDIRECTS {
        attempt.follow()
    } else {
        // The 3xx itself is the answer, and not the one that was asked for.
        attempt.stop()
    }
}

/// The present keys of `issuer`.
///
/// # Errors
/// [`FetchError`].
pub(crate) async fn keys(
    client: &Client,
    issuer: &OidcIssuer,
    limit: Duration,
) -> Result<KeySet, FetchError> {
    let both = async {
        let place = discover(client, issuer).await?;
        let document = document(client, place).await?;
        KeySet::read(&document)
            .map_err(|source| FetchError::Keys { issuer: issuer.url().to_owned(), source })
    };
    let late = |_| FetchError::Late { issuer: issuer.url().to_owned(), limit };
    tokio::time::timeout(limit, both).await.map_err(late)?
}

async fn discover(client: &Client, issuer: &OidcIssuer) -> Result<Url, FetchError> {
    let wrong = |problem| FetchError::Discovery { issuer: issuer.url().to_owned(), problem };
    let place = Url::parse(&issuer.discovery()).map_err(|_| wrong("its address is not a URL"))?;
    let document = document(client, place).await?;
    let found: Discovery = serde_json::from_slice(&document)
        .map_err(|_| wrong("it has no `issuer` and `jwks_uri`"))?;
    if found.issuer != issuer.url() {
        return Err(wrong("its `issuer` is another one; configure the issuer exactly as it says"));
    }
    let keys = Url::parse(&found.jwks_uri).map_err(|_| wrong("its `jwks_uri` is not a URL"))?;
    if !issuer.may_keep_keys_at(&keys) {
        return Err(wrong("its `jwks_uri` is not https"));
    }
    Ok(keys)
}

async fn document(client: &Client, place: Url) -> Result<Vec<u8>, FetchError> {
    let url = place.to_string();
    let broken = |source: reqwest::Error| FetchError::Request {
        url: url.clone(),
        source: source.without_url(),
    };
    let asked = client.get(place).header(http::header::ACCEPT, "application/json");
    let mut answer = asked.send().await.map_err(broken)?;
    if answer.status() != StatusCode::OK {
        return Err(FetchError::Status { url: url.clone(), status: answer.status() });
    }
    let mut document = Vec::new();
    while let Some(part) = answer.chunk().await.map_err(broken)? {
        if document.len() + part.len() > MAX_DOCUMENT_BYTES {
            return Err(FetchError::Size { url: url.clone() });
        }
        document.extend_from_slice(&part);
    }
    Ok(document)
}
