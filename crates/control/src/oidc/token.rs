//! A token before and after its signature was checked.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use belljar_domain::UnixMillis;
use jsonwebtoken::{Algorithm, Validation};
use serde::Deserialize;
use serde_json::Value;

use super::keys::Key;
use super::{OidcIssuer, Subject, VerifyError};

/// Tokens of providers that put groups into them have a few KiB; headers end at about 16.
const MAX_TOKEN_BYTES: usize = 16 * 1024;
/// How far this host's clock and the provider's may be apart.
const LEEWAY_SECONDS: f64 = 60.0;
/// Longest subject. Source: OpenID Connect Core 1.0 section 2.
const MAX_SUBJECT_BYTES: usize = 255;
/// Longest address. Source: RFC 5321 section 4.5.3.1.
const MAX_EMAIL_BYTES: usize = 254;
/// Audiences looked at.
const MAX_AUDIENCES: usize = 64;

/// A token whose signature was not looked at.
pub(crate) struct Unverified<'a> {
    text: &'a str,
    algorithm: Algorithm,
    key_id: Option<String>,
    issuer: String,
}

/// What a token says, once its signature is good.
#[derive(Debug, Deserialize)]
pub(crate) struct Claims {
    #[serde(default)]
    iss: Value,
    #[serde(default)]
    sub: Value,
    #[serde(default)]
    aud: Value,
    #[serde(default)]
    exp: Value,
    #[serde(default)]
    nbf: Value,
    #[serde(default)]
    iat: Value,
    #[serde(default)]
    email: Value,
    #[serde(default)]
    email_verified: Value,
}

/// The one field of a token that is read before its signature is checked.
#[derive(Deserialize)]
struct Issued {
    iss: String,
}

impl<'a> Unverified<'a> {
    /// Reads the token's outside.
    ///
    /// # Errors
    /// [`VerifyError::Malformed`], and [`VerifyError::Algorithm`] for `none`, shared secrets and
    /// what nobody knows.
    pub(crate) fn read(text: &'a str) -> Result<Self, VerifyError> {
        if text.len() > MAX_TOKEN_BYTES {
            return Err(VerifyError::Malformed);
        }
        let mut parts = text.split('.');
        let (Some(head), Some(body), Some(_signature), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(VerifyError::Malformed);
        };
        let head: Value = json(head)?;
        let algorithm = head.get("alg").and_then(Value::as_str).ok_or(VerifyError::Malformed)?;
        let algorithm: Algorithm = algorithm.parse().map_err(|_| VerifyError::Algorithm)?;
        // Extensions this server would have to understand, and it knows none.
        if head.get("crit").is_some() || !has_known_type(&head) {
            return Err(VerifyError::Malformed);
        }
        let key_id = head.get("kid").and_then(Value::as_str).map(str::to_owned);
        let issuer = json::<Issued>(body)?.iss;
        Ok(Unverified { text, algorithm, key_id, issuer })
    }

    pub(crate) fn issuer(&self) -> &str {
        &self.issuer
    }

    pub(crate) fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    pub(crate) fn key_id(&self) -> Option<&str> {
        self.key_id.as_deref()
    }

    /// What the token says, if `key` signed it.
    ///
    /// # Errors
    /// [`VerifyError::Algorithm`] when the key is for another algorithm,
    /// [`VerifyError::Signature`] when it did not sign.
    pub(crate) fn verify(&self, key: &Key) -> Result<Claims, VerifyError> {
        if !key.allows(self.algorithm) {
            return Err(VerifyError::Algorithm);
        }
        // Times and audience are checked below, by this server's clock and with its own errors.
        let mut validation = Validation::new(self.algorithm);
        validation.required_spec_claims.clear();
        validation.validate_exp = false;
        validation.validate_nbf = false;
        validation.validate_aud = false;
        jsonwebtoken::decode::<Claims>(self.text, key.decoding(), &validation)
            .map(|data| data.claims)
            .map_err(|_| VerifyError::Signature)
    }
}

/// Identity and access tokens. A provider signs others with the same keys (logout tokens, say),
/// and those give no rights. Source: RFC 8725 section 3.11, RFC 9068 section 2.1.
fn has_known_type(head: &Value) -> bool {
    match head.get("typ") {
        None => true,
        Some(Value::String(name)) => {
            let name = name.to_ascii_lowercase();
            matches!(name.strip_prefix("application/").unwrap_or(&name), "jwt" | "at+jwt")
        }
        Some(_) => false,
    }
}

fn json<T: for<'de> Deserialize<'de>>(part: &str) -> Result<T, VerifyError> {
    let bytes = URL_SAFE_NO_PAD.decode(part).map_err(|_| VerifyError::Malformed)?;
    serde_json::from_slice(&bytes).map_err(|_| VerifyError::Malformed)
}

impl Claims {
    /// Whom the token speaks for, if it is for this server and for now.
    ///
    /// # Errors
    /// The first of the claims that is not right.
    pub(crate) fn check(
        &self,
        issuer: &OidcIssuer,
        now: UnixMillis,
    ) -> Result<Subject, VerifyError> {
        if self.iss.as_str() != Some(issuer.url()) {
            return Err(VerifyError::Issuer);
        }
        self.check_audience(issuer)?;
        self.check_times(now)?;
        let subject = self.sub.as_str().filter(|sub| is_printable(sub, MAX_SUBJECT_BYTES));
        let subject = subject.ok_or(VerifyError::Claim("sub"))?.to_owned();
        Ok(Subject { issuer: issuer.url().to_owned(), subject, email: self.verified_email() })
    }

    fn check_audience(&self, issuer: &OidcIssuer) -> Result<(), VerifyError> {
        let is_for_us = match &self.aud {
            Value::String(one) => issuer.is_for(one),
            Value::Array(all) => all
                .iter()
                .take(MAX_AUDIENCES)
                .filter_map(Value::as_str)
                .any(|audience| issuer.is_for(audience)),
            _ => return Err(VerifyError::Claim("aud")),
        };
        if is_for_us { Ok(()) } else { Err(VerifyError::Audience) }
    }

    fn check_times(&self, now: UnixMillis) -> Result<(), VerifyError> {
        // Exact: a double holds milliseconds far beyond the year 9999.
        #[expect(clippy::cast_precision_loss, reason = "see above")]
        let now = now.0 as f64 / 1000.0;
        let expires = self.exp.as_f64().ok_or(VerifyError::Claim("exp"))?;
        if now - LEEWAY_SECONDS >= expires {
            return Err(VerifyError::Expired);
        }
        for (name, claim) in [("nbf", &self.nbf), ("iat", &self.iat)] {
            match claim {
                Value::Null => {}
                claim => {
                    let from = claim.as_f64().ok_or(VerifyError::Claim(name))?;
                    if from > now + LEEWAY_SECONDS {
                        return Err(VerifyError::NotYet);
                    }
                }
            }
        }
        Ok(())
    }

    /// Some providers write the flag as text.
    fn verified_email(&self) -> Option<String> {
        let is_verified = match &self.email_verified {
            Value::Bool(is_verified) => *is_verified,
            Value::String(text) => text == "true",
            _ => false,
        };
        let email = self.email.as_str().filter(|email| is_printable(email, MAX_EMAIL_BYTES));
        email.filter(|_| is_verified).map(str::to_owned)
    }
}

/// Can stand in a log line and in a database column as it is.
fn is_printable(text: &str, max_bytes: usize) -> bool {
    !text.is_empty() && text.len() <= max_bytes && !text.chars().any(char::is_control)
}
