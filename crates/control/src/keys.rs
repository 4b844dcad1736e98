//! API keys: their text, and what of them is stored.
//!
//! A key is `e2b_` and 40 hex digits. Stored is `$sha256$` and the unpadded base64 of the SHA-256
//! of the 20 raw bytes the hex stands for. Source: contract section 1.1.
//!
//! Keys are found by that hash, so no comparison in this process takes longer for a better guess.

use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use belljar_domain::Secret;
use sha2::{Digest as _, Sha256};

/// What every key begins with.
pub(crate) const PREFIX: &str = "e2b_";
const RAW_BYTES: usize = 20;
/// Characters shown of a masked key's value, at each end.
const MASK_HEAD_CHARS: usize = 2;
const MASK_TAIL_CHARS: usize = 4;

/// The text is not an API key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read an API key: it must be `e2b_` and 40 hex digits")]
pub struct ApiKeyError;

/// An API key in the clear: made once, shown to its owner, stored only as a hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey(Secret<[u8; RAW_BYTES]>);

/// What is stored of a key.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct KeyHash(String);

/// How a key is shown after it was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct KeyMask {
    pub(crate) value_length: usize,
    pub(crate) head: String,
    pub(crate) tail: String,
}

impl ApiKey {
    /// A new key from the system's random numbers.
    pub fn random() -> Self {
        ApiKey(Secret::new(rand::random()))
    }

    /// The text to give to the key's owner. Every call is a place to review.
    pub fn expose(&self) -> String {
        format!("{PREFIX}{}", hex::encode(self.0.expose()))
    }

    pub(crate) fn hash(&self) -> KeyHash {
        let digest = Sha256::digest(self.0.expose());
        KeyHash(format!("$sha256${}", STANDARD_NO_PAD.encode(digest)))
    }

    pub(crate) fn mask(&self) -> KeyMask {
        let value = hex::encode(self.0.expose());
        KeyMask {
            value_length: value.len(),
            head: value[..MASK_HEAD_CHARS].to_owned(),
            tail: value[value.len() - MASK_TAIL_CHARS..].to_owned(),
        }
    }
}

impl FromStr for ApiKey {
    type Err = ApiKeyError;

    fn from_str(text: &str) -> Result<Self, ApiKeyError> {
        let digits = text.strip_prefix(PREFIX).ok_or(ApiKeyError)?;
        let mut raw = [0; RAW_BYTES];
        hex::decode_to_slice(digits, &mut raw).map_err(|_| ApiKeyError)?;
        Ok(ApiKey(Secret::new(raw)))
    }
}

impl KeyHash {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
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
            assert_eq!(text.parse::<ApiKey>(), Err(ApiKeyError), "{text:?} was accepted");
        }
    }

    #[test]
    fn a_key_is_never_printed_by_accident() {
        let key = ApiKey::random();
        assert!(!format!("{key:?}").contains(&key.expose()[4..]));
        assert_eq!(key.mask().value_length, 40);
    }
}
