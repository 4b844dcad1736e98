//! API keys and access tokens: their text, and what of them is stored.
//!
//! An API key is `e2b_` and 40 hex digits and acts for a team; an access token is `sk_e2b_` and
//! 40 hex digits and acts for a user. Stored is `$sha256$` and the unpadded base64 of the SHA-256
//! of the 20 raw bytes the hex stands for. Source: contract section 1.1.
//!
//! Both are found by that hash, so no comparison in this process takes longer for a better guess.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use belljar_domain::Secret;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq as _;

const RAW_BYTES: usize = 20;
/// Characters shown of a masked value, at each end.
const MASK_HEAD_CHARS: usize = 2;
const MASK_TAIL_CHARS: usize = 4;
/// Shortest admin token, in characters: as many as 16 random bytes have in hex.
const ADMIN_MIN_CHARS: usize = 32;
/// Longest admin token, in characters; it has to fit into a header.
const ADMIN_MAX_CHARS: usize = 1024;

/// Which credentials a [`Credential`] is one of.
pub trait CredentialKind: Send + Sync + 'static {
    /// What the text of each of them begins with.
    const PREFIX: &'static str;
}

/// Acts for a team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfTeam;

/// Acts for a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfUser;

impl CredentialKind for OfTeam {
    const PREFIX: &'static str = "e2b_";
}

impl CredentialKind for OfUser {
    const PREFIX: &'static str = "sk_e2b_";
}

/// An API key in the clear: made once, shown to its owner, stored only as a hash.
pub type ApiKey = Credential<OfTeam>;

/// An access token in the clear: made once, shown to its owner, stored only as a hash.
pub type AccessToken = Credential<OfUser>;

/// The text is no credential of the kind asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read a credential: it must be `{prefix}` and 40 hex digits")]
pub struct CredentialError {
    prefix: &'static str,
}

/// A credential in the clear.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential<K> {
    raw: Secret<[u8; RAW_BYTES]>,
    kind: PhantomData<K>,
}

/// What is stored of a credential.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct KeyHash(String);

/// How a credential is shown after it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyMask {
    pub(crate) prefix: String,
    pub(crate) value_length: u32,
    pub(crate) head: String,
    pub(crate) tail: String,
}

impl<K: CredentialKind> Credential<K> {
    /// A new one from the system's random numbers.
    pub fn random() -> Self {
        Credential { raw: Secret::new(rand::random()), kind: PhantomData }
    }

    /// The text to give to its owner. Every call is a place to review.
    pub fn expose(&self) -> String {
        format!("{}{}", K::PREFIX, hex::encode(self.raw.expose()))
    }

    pub(crate) fn hash(&self) -> KeyHash {
        let digest = Sha256::digest(self.raw.expose());
        KeyHash(format!("$sha256${}", STANDARD_NO_PAD.encode(digest)))
    }

    pub(crate) fn mask(&self) -> KeyMask {
        let value = hex::encode(self.raw.expose());
        KeyMask {
            prefix: K::PREFIX.to_owned(),
            value_length: u32::try_from(value.len()).unwrap_or(u32::MAX),
            head: value[..MASK_HEAD_CHARS].to_owned(),
            tail: value[value.len() - MASK_TAIL_CHARS..].to_owned(),
        }
    }
}

impl<K> fmt::Debug for Credential<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Credential(***)")
    }
}

impl<K: CredentialKind> FromStr for Credential<K> {
    type Err = CredentialError;

    fn from_str(text: &str) -> Result<Self, CredentialError> {
        let error = CredentialError { prefix: K::PREFIX };
        let Some(digits) = text.strip_prefix(K::PREFIX) else { return Err(error) };
        let mut raw = [0; RAW_BYTES];
        hex::decode_to_slice(digits, &mut raw).map_err(|_| error)?;
        Ok(Credential { raw: Secret::new(raw), kind: PhantomData })
    }
}

impl KeyHash {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The text is no admin token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "read the admin token: it must have {ADMIN_MIN_CHARS} to {ADMIN_MAX_CHARS} visible ASCII \
     characters without spaces"
)]
pub struct AdminTokenError;

/// What the operator shows in `X-Admin-Token`. Only its hash is in memory.
#[derive(Clone)]
pub struct AdminToken(Secret<[u8; 32]>);

impl AdminToken {
    /// A new token's text, from the system's random numbers.
    pub fn random_text() -> Secret<String> {
        Secret::new(hex::encode(rand::random::<[u8; 32]>()))
    }

    /// Whether `text` is the token. Takes as long for any text of the same length.
    pub(crate) fn is(&self, text: &[u8]) -> bool {
        let digest: [u8; 32] = Sha256::digest(text).into();
        digest.ct_eq(self.0.expose()).into()
    }
}

impl fmt::Debug for AdminToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AdminToken(***)")
    }
}

impl FromStr for AdminToken {
    type Err = AdminTokenError;

    fn from_str(text: &str) -> Result<Self, AdminTokenError> {
        let fits = (ADMIN_MIN_CHARS..=ADMIN_MAX_CHARS).contains(&text.len());
        if !fits || !text.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(AdminTokenError);
        }
        Ok(AdminToken(Secret::new(Sha256::digest(text.as_bytes()).into())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_survives_its_text_form() {
        let key = ApiKey::random();
        let text = key.expose();
        assert_eq!(text.len(), 44);
        assert_eq!(text.parse::<ApiKey>(), Ok(key.clone()));
        assert_ne!(ApiKey::random(), key);
    }

    #[test]
    fn the_stored_form_is_the_hash_of_the_raw_bytes() {
        let key: ApiKey = "e2b_0000000000000000000000000000000000000000".parse().expect("valid");
        // Computed with `printf '\0%.0s' $(seq 20) | openssl dgst -sha256 -binary | base64`.
        assert_eq!(key.hash().as_str(), "$sha256$3kfJsn640wDbtfLDU+Yyw5MmLPBjQMT6fxtAxMvTb5A");
    }

    #[test]
    fn what_is_not_a_key_is_refused() {
        let long = format!("e2b_{}", "a".repeat(42));
        for text in ["", "e2b_", "e2b_zz", "sk_e2b_00", "e2b_é", &"a".repeat(44), &long] {
            assert!(text.parse::<ApiKey>().is_err(), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_key_is_never_printed_by_accident() {
        let key = ApiKey::random();
        assert!(!format!("{key:?}").contains(&key.expose()[4..]));
        assert_eq!(key.mask().value_length, 40);
    }

    #[test]
    fn a_token_is_no_key_and_a_key_no_token() {
        let (key, token) = (ApiKey::random(), AccessToken::random());
        assert_eq!(token.expose().len(), 47);
        assert_eq!(token.expose().parse::<AccessToken>(), Ok(token.clone()));
        assert!(token.expose().parse::<ApiKey>().is_err());
        assert!(key.expose().parse::<AccessToken>().is_err());
        assert_eq!(token.mask().prefix, "sk_e2b_");
    }

    #[test]
    fn an_admin_token_is_itself_only() {
        let text = AdminToken::random_text();
        let token: AdminToken = text.expose().parse().expect("a token of our own");
        assert!(token.is(text.expose().as_bytes()));
        for other in ["", &text.expose()[1..], AdminToken::random_text().expose()] {
            assert!(!token.is(other.as_bytes()));
        }
        assert!(!format!("{token:?}").contains(text.expose().as_str()));
    }

    #[test]
    fn weak_admin_tokens_are_refused() {
        let (spaced, long) = (format!("{} {}", "a".repeat(20), "b".repeat(20)), "a".repeat(1025));
        for text in ["", "secret", &"a".repeat(31), &spaced, &long, &"ü".repeat(20)] {
            assert!(text.parse::<AdminToken>().is_err(), "{text:?} was accepted");
        }
    }
}
