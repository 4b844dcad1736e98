//! What a team may set a webhook up with.

use belljar_domain::{Kind, Secret};
use belljar_wire::rest::{self, EventType};
use reqwest::Url;

use super::guard::{Guard, NotPublic};
use crate::store::{WebhookChange, WebhookTerms};

const MAX_NAME_CHARS: usize = 128;
const MAX_URL_BYTES: usize = 2048;
const SECRET_BYTES: std::ops::RangeInclusive<usize> = 16..=256;

/// Why a webhook cannot be set up like that. Every text names the field.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TermsError {
    #[error(
        "the field 'name' must have 1 to {MAX_NAME_CHARS} characters, and no control characters"
    )]
    Name,
    #[error("the field 'url' may have at most {MAX_URL_BYTES} bytes")]
    UrlTooLong,
    #[error("the field 'url' must be a whole http:// or https:// URL without spaces")]
    Url,
    #[error("the field 'url' must not hold a user name or password: the URL is shown to the team")]
    UrlWithCredentials,
    #[error("the field 'url' is refused: {0}")]
    UrlNotPublic(NotPublic),
    #[error("the field 'events' must name at least one event type")]
    NoEvents,
    #[error(
        "the field 'signatureSecret' must have {} to {} bytes, and no control characters",
        SECRET_BYTES.start(),
        SECRET_BYTES.end()
    )]
    Secret,
}

impl TermsError {
    /// What a caller should do about it.
    pub(crate) fn kind(&self) -> Kind {
        match self {
            TermsError::Name
            | TermsError::UrlTooLong
            | TermsError::Url
            | TermsError::UrlWithCredentials
            | TermsError::UrlNotPublic(_)
            | TermsError::NoEvents
            | TermsError::Secret => Kind::Invalid,
        }
    }
}

/// The terms of a new webhook.
pub(crate) fn of_new(
    body: rest::NewWebhook,
    allow_private: bool,
) -> Result<WebhookTerms, TermsError> {
    Ok(WebhookTerms {
        name: name(body.name)?,
        url: url(body.url, allow_private)?,
        enabled: body.enabled.unwrap_or(true),
        kinds: kinds(body.events)?,
        secret: secret(body.signature_secret)?,
    })
}

/// A change of terms.
pub(crate) fn of_change(
    body: rest::UpdateWebhook,
    allow_private: bool,
) -> Result<WebhookChange, TermsError> {
    Ok(WebhookChange {
        name: body.name.map(name).transpose()?,
        url: body.url.map(|text| url(text, allow_private)).transpose()?,
        enabled: body.enabled,
        kinds: body.events.map(kinds).transpose()?,
        secret: body.signature_secret.map(secret).transpose()?,
    })
}

fn name(text: String) -> Result<String, TermsError> {
    let has_control = text.chars().any(char::is_control);
    let is_blank = text.trim().is_empty();
    let fits = text.chars().count() <= MAX_NAME_CHARS;
    if fits && !is_blank && !has_control { Ok(text) } else { Err(TermsError::Name) }
}

fn url(text: String, allow_private: bool) -> Result<String, TermsError> {
    if text.len() > MAX_URL_BYTES {
        return Err(TermsError::UrlTooLong);
    }
    // The parser would drop some of these silently.
    if text.chars().any(|c| c.is_control() || c.is_whitespace()) {
        return Err(TermsError::Url);
    }
    let url: Url = text.parse().map_err(|_| TermsError::Url)?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(TermsError::Url);
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(TermsError::UrlWithCredentials);
    }
    // What a name means is checked at every delivery; an address can be told now.
    Guard { allow_private }.check(&url).map_err(TermsError::UrlNotPublic)?;
    Ok(text)
}

fn kinds(mut kinds: Vec<EventType>) -> Result<Vec<EventType>, TermsError> {
    kinds.sort_unstable();
    kinds.dedup();
    if kinds.is_empty() { Err(TermsError::NoEvents) } else { Ok(kinds) }
}

fn secret(secret: Secret<String>) -> Result<Secret<String>, TermsError> {
    let text = secret.expose();
    let has_control = text.chars().any(char::is_control);
    let fits = SECRET_BYTES.contains(&text.len());
    if fits && !has_control { Ok(secret) } else { Err(TermsError::Secret) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(url_text: &str) -> Result<String, TermsError> {
        url(url_text.to_owned(), false)
    }

    #[test]
    fn only_whole_public_urls_pass() {
        let at_limit = format!("https://example.com/{}", "a".repeat(MAX_URL_BYTES - 20));
        for good in ["http://example.com", "https://example.com:8443/a?b=c", &at_limit] {
            assert_eq!(check(good).as_deref(), Ok(good));
        }
        for bad in [
            "",
            "example.com",
            "/hook",
            "ftp://example.com",
            "file:///etc/passwd",
            "https://",
            "http://exa mple.com",
            "http://example.com/\r\nX: y",
            "http://example.com/\0",
            "javascript:alert(1)",
            "http://:80/",
            "https://example.com:99999/",
        ] {
            assert_eq!(check(bad), Err(TermsError::Url), "{bad:?}");
        }
        assert_eq!(check(&format!("{at_limit}a")), Err(TermsError::UrlTooLong));
        for bad in ["http://ann@example.com/", "http://ann:pw@example.com/", "http://:p@e.com/"] {
            assert_eq!(check(bad), Err(TermsError::UrlWithCredentials), "{bad:?}");
        }
        assert_eq!(check("http://127.0.0.1/"), Err(TermsError::UrlNotPublic(NotPublic)));
        assert!(url("http://127.0.0.1/".to_owned(), true).is_ok());
    }

    #[test]
    fn names_events_and_secrets_have_bounds() {
        assert!(name("\u{fc}".repeat(128)).is_ok());
        for bad in [String::new(), "  ".to_owned(), "a".repeat(129), "a\nb".to_owned()] {
            assert_eq!(name(bad.clone()), Err(TermsError::Name), "{bad:?}");
        }
        let twice = vec![EventType::Killed, EventType::Created, EventType::Killed];
        assert_eq!(kinds(twice), Ok(vec![EventType::Created, EventType::Killed]));
        assert_eq!(kinds(Vec::new()), Err(TermsError::NoEvents));
        for (bytes, is_good) in [(15, false), (16, true), (256, true), (257, false)] {
            assert_eq!(secret(Secret::new("x".repeat(bytes))).is_ok(), is_good, "{bytes}");
        }
        assert!(secret(Secret::new("0123456789abcde\0".to_owned())).is_err());
    }

    #[test]
    fn every_refusal_names_its_field() {
        for (error, field) in [
            (TermsError::Name, "'name'"),
            (TermsError::Url, "'url'"),
            (TermsError::UrlNotPublic(NotPublic), "'url'"),
            (TermsError::NoEvents, "'events'"),
            (TermsError::Secret, "'signatureSecret' must have 16 to 256 bytes"),
        ] {
            assert!(error.to_string().contains(field), "{error}");
        }
    }
}
