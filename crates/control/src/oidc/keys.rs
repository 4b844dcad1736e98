//! A provider's public keys, each with the algorithms it may be used with.

use jsonwebtoken::jwk::{AlgorithmParameters, EllipticCurve, Jwk, KeyOperations, PublicKeyUse};
use jsonwebtoken::{Algorithm, DecodingKey};
use serde::Deserialize;
use serde_json::Value;

use super::VerifyError;

/// Keys of one provider. Large ones have about a dozen while they rotate.
pub(crate) const MAX_KEYS: usize = 64;
/// Shorter moduli are within reach of an attacker. Source: RFC 7518 section 3.3.
const MIN_RSA_BITS: usize = 2048;
/// Longer ones the verifying library refuses.
const MAX_RSA_BITS: usize = 4096;

/// A public key.
#[derive(Debug, Clone)]
pub(crate) struct Key {
    id: Option<String>,
    /// What its type, and its `alg` if it has one, allow. Never empty.
    algorithms: Vec<Algorithm>,
    decoding: DecodingKey,
}

/// The keys a provider published.
#[derive(Debug, Default)]
pub(crate) struct KeySet {
    keys: Vec<Key>,
}

/// The document is not a set of keys, or holds too many.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum KeySetError {
    #[error("read the identity provider's keys: the document is not a JSON web key set")]
    Shape,
    #[error("read the identity provider's keys: there are more than {MAX_KEYS}")]
    TooMany,
    #[error("read the identity provider's keys: none of them can verify a signature")]
    NoneUsable,
}

#[derive(Deserialize)]
struct Document {
    keys: Vec<Value>,
}

impl Key {
    pub(crate) fn allows(&self, algorithm: Algorithm) -> bool {
        self.algorithms.contains(&algorithm)
    }

    pub(crate) fn decoding(&self) -> &DecodingKey {
        &self.decoding
    }

    /// `None` for keys of other uses, of types that cannot sign, and of unsafe sizes.
    fn read(value: &Value) -> Option<Key> {
        let jwk = Jwk::deserialize(value).ok()?;
        let signs = match &jwk.common.public_key_use {
            None | Some(PublicKeyUse::Signature) => true,
            Some(_) => false,
        };
        let verifies = jwk
            .common
            .key_operations
            .as_ref()
            .is_none_or(|allowed| allowed.contains(&KeyOperations::Verify));
        let by_type = algorithms_of(&jwk.algorithm);
        let algorithms: Vec<_> = match jwk.common.key_algorithm {
            None => by_type.to_vec(),
            Some(named) => {
                let named = Algorithm::try_from(named).ok()?;
                by_type.iter().copied().filter(|algorithm| *algorithm == named).collect()
            }
        };
        if !signs || !verifies || algorithms.is_empty() {
            return None;
        }
        let decoding = DecodingKey::from_jwk(&jwk).ok()?;
        Some(Key { id: jwk.common.key_id, algorithms, decoding })
    }
}

/// What a key of this type may be used with. Shared secrets have no place among public keys.
fn algorithms_of(parameters: &AlgorithmParameters) -> &'static [Algorithm] {
    use Algorithm::{ES256, ES384, EdDSA, PS256, PS384, PS512, RS256, RS384, RS512};
    match parameters {
        AlgorithmParameters::RSA(key) if is_safe_rsa(&key.n) => {
            &[RS256, RS384, RS512, PS256, PS384, PS512]
        }
        AlgorithmParameters::EllipticCurve(key) => match key.curve {
            EllipticCurve::P256 => &[ES256],
            EllipticCurve::P384 => &[ES384],
            _ => &[],
        },
        AlgorithmParameters::OctetKeyPair(key) if key.curve == EllipticCurve::Ed25519 => &[EdDSA],
        _ => &[],
    }
}

/// `modulus` in base64, of which each character holds 6 bits. Some providers write a leading zero
/// byte, so the length is the value's, not the text's.
fn is_safe_rsa(modulus: &str) -> bool {
    use base64::Engine as _;
    let Ok(bytes) = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(modulus) else {
        return false;
    };
    let mut value = bytes.iter().skip_while(|byte| **byte == 0);
    let Some(first) = value.next() else { return false };
    let bits = value.count() * 8 + 8 - first.leading_zeros() as usize;
    (MIN_RSA_BITS..=MAX_RSA_BITS).contains(&bits)
}

impl KeySet {
    /// Reads a JSON web key set. Keys this server has no use for are left out.
    ///
    /// # Errors
    /// [`KeySetError`] for another document, too many keys, or none of use.
    pub(crate) fn read(document: &[u8]) -> Result<KeySet, KeySetError> {
        let document: Document =
            serde_json::from_slice(document).map_err(|_| KeySetError::Shape)?;
        if document.keys.len() > MAX_KEYS {
            return Err(KeySetError::TooMany);
        }
        let keys: Vec<_> = document.keys.iter().filter_map(Key::read).collect();
        if keys.is_empty() { Err(KeySetError::NoneUsable) } else { Ok(KeySet { keys }) }
    }

    /// The key a token with this head is signed with. A token that names none must leave no choice.
    ///
    /// # Errors
    /// [`VerifyError::Algorithm`] when the named key is for others, [`VerifyError::Key`] when there
    /// is no such key.
    pub(crate) fn find(&self, id: Option<&str>, algorithm: Algorithm) -> Result<&Key, VerifyError> {
        let named = |key: &&Key| id.is_none() || key.id.as_deref() == id;
        let mut fitting = self.keys.iter().filter(named).filter(|key| key.allows(algorithm));
        match (fitting.next(), fitting.next()) {
            (Some(key), None) => Ok(key),
            (None, _) if id.is_some() && self.keys.iter().any(|key| named(&key)) => {
                Err(VerifyError::Algorithm)
            }
            _ => Err(VerifyError::Key),
        }
    }
}
