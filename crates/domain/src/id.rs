//! Every kind of id is its own type, so one can never pass for another.
//!
//! Shapes: sandbox `i` + 20 of `[a-z0-9]`, template 20 of `[a-z0-9]`, build and execution UUIDs.
//! Source: `contract/e2b-wire.md` section 1.1.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use rand::RngExt as _;

const ALPHABET: &[u8; 36] = b"abcdefghijklmnopqrstuvwxyz0123456789";
const RANDOM_LEN: usize = 20;

/// The text is not an id of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("parse a {what} id: {reason}")]
pub struct IdError {
    what: &'static str,
    reason: &'static str,
}

fn random_text() -> String {
    let mut rng = rand::rng();
    (0..RANDOM_LEN).map(|_| char::from(ALPHABET[rng.random_range(0..ALPHABET.len())])).collect()
}

fn is_lower_alphanumeric(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        // Shared, because one id is the key of many tables: a clone costs no memory.
        pub struct $name(Arc<str>);

        impl $name {
            /// The text form.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id! {
    /// What a user sees and keeps: stays the same over pause and resume.
    SandboxId
}
text_id! {
    /// A template: a name for a line of builds.
    TemplateId
}
text_id! {
    /// One build of a template; what a sandbox is started from. A UUID.
    BuildId
}
text_id! {
    /// One run of a sandbox: changes at each resume. A UUID.
    ExecutionId
}

/// Longest id accepted, in bytes: more than any id made here, little enough to log.
const ID_MAX_BYTES: usize = 64;

impl SandboxId {
    /// A new random id.
    pub fn random() -> Self {
        SandboxId(format!("i{}", random_text()).into())
    }
}

impl FromStr for SandboxId {
    type Err = IdError;

    /// Accepts `[a-z0-9]+`, and strips the `-<clientID>` suffix that old clients send.
    fn from_str(text: &str) -> Result<Self, IdError> {
        let id = text.split_once('-').map_or(text, |(id, _)| id);
        if id.len() > ID_MAX_BYTES {
            return Err(IdError { what: "sandbox", reason: "it is longer than 64 characters" });
        }
        if !is_lower_alphanumeric(id) {
            return Err(IdError { what: "sandbox", reason: "only a-z and 0-9 are allowed" });
        }
        Ok(SandboxId(id.into()))
    }
}

impl TemplateId {
    /// A new random id.
    pub fn random() -> Self {
        TemplateId(random_text().into())
    }
}

impl FromStr for TemplateId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        if text.len() > ID_MAX_BYTES {
            return Err(IdError { what: "template", reason: "it is longer than 64 characters" });
        }
        if !is_lower_alphanumeric(text) {
            return Err(IdError { what: "template", reason: "only a-z and 0-9 are allowed" });
        }
        Ok(TemplateId(text.into()))
    }
}

fn hyphenated(id: uuid::Uuid) -> Arc<str> {
    let mut text = uuid::Uuid::encode_buffer();
    Arc::from(&*id.hyphenated().encode_lower(&mut text))
}

macro_rules! uuid_id {
    ($name:ident, $what:literal) => {
        impl $name {
            /// A new random id.
            pub fn random() -> Self {
                $name(hyphenated(uuid::Uuid::new_v4()))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let id = uuid::Uuid::try_parse(text)
                    .map_err(|_| IdError { what: $what, reason: "it is not a UUID" })?;
                Ok($name(hyphenated(id)))
            }
        }
    };
}

uuid_id!(BuildId, "build");
uuid_id!(ExecutionId, "execution");

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sandbox_ids_have_the_contract_shape() {
        let id = SandboxId::random();
        assert_eq!(id.as_str().len(), 21);
        assert!(id.as_str().starts_with('i'));
        assert_eq!(id.as_str().parse::<SandboxId>(), Ok(id));
    }

    #[test]
    fn legacy_client_suffix_is_stripped() {
        let id: SandboxId = "iabc-6532622b".parse().expect("legacy form");
        assert_eq!(id.as_str(), "iabc");
    }

    #[test]
    fn hostile_ids_are_refused() {
        for text in ["", "-", "I1", "i/../x", "i\u{0}", "ï", &"a".repeat(65)] {
            assert!(text.parse::<SandboxId>().is_err(), "{text:?} was accepted");
            assert!(text.parse::<TemplateId>().is_err(), "{text:?} was accepted");
            assert!(text.parse::<BuildId>().is_err(), "{text:?} was accepted");
        }
    }
}
