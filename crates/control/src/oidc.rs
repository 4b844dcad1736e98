//! OpenID Connect: whom a bearer token speaks for, on the word of a configured provider.
//!
//! A provider is named by its issuer URL. Its discovery document says where its keys are; both are
//! fetched when the first token comes and kept:
//!
//! ```text
//!  token ─► shape, issuer, algorithm ─► key known? ─ yes ─► signature ─► audience, times, subject
//!                                           │ no
//!                                           ▼
//!                     fetch keys again (at most every 30 s) ─► known now? ─ no ─► refused
//! ```
//!
//! Nothing of a token is believed before its signature is checked, but which issuer to ask. The
//! algorithm follows from the key's type, never from the token: `none` and the shared-secret
//! algorithms do not exist here. Source: OpenID Connect Core 1.0 section 3.1.3.7, Discovery 1.0
//! sections 3 and 4, RFC 8725.

mod fetch;
mod issuer;
mod keys;
mod provider;
#[cfg(test)]
mod tests;
mod token;

use std::sync::Arc;

use belljar_daemon::{Scope, clock};
use belljar_domain::Kind;

pub use issuer::{OidcIssuer, OidcIssuerError};

use fetch::FetchError;
use provider::{Provider, Timing};

/// Whom a token speaks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subject {
    /// The provider, as configured.
    pub(crate) issuer: String,
    /// The user's id there: unique for this issuer, never given to another user.
    pub(crate) subject: String,
    /// An address the provider says it has verified. To show, never to find a user by: addresses
    /// change hands.
    pub(crate) email: Option<String>,
}

/// Why a token was not accepted. The texts are safe to show to the caller: no part of the token is
/// in them but names it has to spell out anyway.
#[derive(Debug, thiserror::Error)]
pub(crate) enum VerifyError {
    /// It is no JSON web token, or larger than any provider makes one.
    #[error("the bearer token is not a JSON web token")]
    Malformed,
    /// No configured provider made it.
    #[error("the bearer token's issuer is not one this server trusts")]
    Issuer,
    /// It is signed in a way no key of a provider is for.
    #[error("the bearer token's signature algorithm is not accepted")]
    Algorithm,
    /// The provider has no such key, or the token does not say which of several it was.
    #[error("the bearer token's signing key is not one of its issuer's")]
    Key,
    /// The signature is not that of the key.
    #[error("the bearer token's signature is not valid")]
    Signature,
    /// A claim is absent, or no value of its type.
    #[error("the bearer token's claim `{0}` is missing or not valid")]
    Claim(&'static str),
    /// It was made for another service.
    #[error("the bearer token is not meant for this server (`aud`)")]
    Audience,
    /// Its time is over.
    #[error("the bearer token has expired")]
    Expired,
    /// Its time has not come.
    #[error("the bearer token is not valid yet")]
    NotYet,
    /// The provider's keys are not known, and it does not give them.
    #[error("the identity provider does not answer; try again")]
    Provider(#[source] Arc<FetchError>),
}

impl VerifyError {
    /// What a caller should do about it.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            VerifyError::Malformed
            | VerifyError::Issuer
            | VerifyError::Algorithm
            | VerifyError::Key
            | VerifyError::Signature
            | VerifyError::Claim(_)
            | VerifyError::Audience
            | VerifyError::Expired
            | VerifyError::NotYet => Kind::Unauthenticated,
            VerifyError::Provider(failure) => failure.kind(),
        }
    }
}

/// Verifies tokens of the configured issuers.
pub(crate) struct Verifier {
    providers: Vec<Arc<Provider>>,
}

impl Verifier {
    /// Knows `issuers`; nothing is asked of them yet. Their keys are fetched by tasks in `scope`,
    /// so that a caller who leaves does not stop a fetch others wait for.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub(crate) fn new(issuers: &[OidcIssuer], scope: &Scope) -> Result<Verifier, rustls::Error> {
        Verifier::with_timing(issuers, scope, Timing::default())
    }

    fn with_timing(
        issuers: &[OidcIssuer],
        scope: &Scope,
        timing: Timing,
    ) -> Result<Verifier, rustls::Error> {
        if issuers.is_empty() {
            return Ok(Verifier { providers: Vec::new() });
        }
        let client = fetch::client(&timing)?;
        let merged = OidcIssuer::merged(issuers);
        let provider =
            |issuer| Arc::new(Provider::new(issuer, client.clone(), scope.clone(), timing.clone()));
        Ok(Verifier { providers: merged.into_iter().map(provider).collect() })
    }

    /// Whether any issuer is configured.
    pub(crate) fn is_configured(&self) -> bool {
        !self.providers.is_empty()
    }

    /// Whom `token` speaks for. Cancel-safe. Takes at most some seconds, when keys are fetched.
    ///
    /// # Errors
    /// [`VerifyError`]; its kind tells a bad token from a provider that does not answer.
    pub(crate) async fn verify(&self, token: &str) -> Result<Subject, VerifyError> {
        let unverified = token::Unverified::read(token)?;
        let provider = self
            .providers
            .iter()
            .find(|provider| provider.issuer().url() == unverified.issuer())
            .ok_or(VerifyError::Issuer)?;
        let key = provider.key(&unverified).await?;
        let claims = unverified.verify(&key)?;
        claims.check(provider.issuer(), clock::now())
    }
}
