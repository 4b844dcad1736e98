//! Tokens derived from one seed and a sandbox id, so that they survive pause, resume and restart
//! without being stored anywhere. Source: contract section 1.2.

use belljar_domain::{SandboxId, Secret};
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

const SEED_BYTES: usize = 32;

/// The secret all sandbox tokens come from. Lives in the store, made once.
#[derive(Debug, Clone)]
pub(crate) struct TokenSeed(Secret<[u8; SEED_BYTES]>);

impl TokenSeed {
    pub(crate) fn random() -> Self {
        TokenSeed(Secret::new(rand::random()))
    }

    /// The text form kept in the store.
    pub(crate) fn to_stored(&self) -> String {
        hex::encode(self.0.expose())
    }

    pub(crate) fn from_stored(text: &str) -> Option<Self> {
        let mut raw = [0; SEED_BYTES];
        hex::decode_to_slice(text, &mut raw).ok()?;
        Some(TokenSeed(Secret::new(raw)))
    }

    /// The token the guest daemon of `id` asks for: lower-case hex of HMAC-SHA256(seed, id).
    pub(crate) fn envd_access_token(&self, id: &SandboxId) -> Secret<String> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.0.expose())
            .expect("HMAC takes a key of any length");
        mac.update(id.as_str().as_bytes());
        Secret::new(hex::encode(mac.finalize().into_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_stable_and_differ_by_sandbox() {
        let seed = TokenSeed::from_stored(&"00".repeat(32)).expect("64 hex digits");
        let id: SandboxId = "iabc".parse().expect("an id");
        let token = seed.envd_access_token(&id);
        assert_eq!(token, seed.envd_access_token(&id));
        assert_eq!(
            token.expose(),
            // Computed with `printf iabc | openssl dgst -sha256 -mac HMAC -macopt hexkey:00…00`.
            "80e2208807901ba8ed43f90628c28c8a32eb3ffff6f80c9023ea216cec88fa37"
        );
        assert_ne!(token, seed.envd_access_token(&SandboxId::random()));
    }

    #[test]
    fn a_seed_survives_the_store() {
        let seed = TokenSeed::random();
        let id = SandboxId::random();
        let again = TokenSeed::from_stored(&seed.to_stored()).expect("own text");
        assert_eq!(seed.envd_access_token(&id), again.envd_access_token(&id));
        assert!(TokenSeed::from_stored("beef").is_none());
    }
}
