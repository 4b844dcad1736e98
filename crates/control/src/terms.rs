//! A sandbox's terms as text: what its node keeps for this control plane, so that it finds out
//! after a crash of its own whose sandbox that is.
//!
//! JSON with a version. A later version may add fields to version 1, which are passed over here;
//! what cannot be read that way gets another number, and is then nobody's sandbox.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::idempotency::{Digest, Key};
use crate::live::Terms;
use crate::team::TeamId;

const VERSION: u32 = 1;

/// Terms, and the key the sandbox was asked for with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Written {
    pub(crate) terms: Terms,
    pub(crate) key: Option<Key>,
}

#[derive(Serialize, Deserialize)]
struct Version {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct Text {
    version: u32,
    team: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    alias: Option<String>,
    #[serde(default)]
    metadata: BTreeMap<String, String>,
    secure: bool,
    allow_internet: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key: Option<KeyText>,
}

/// Two digests in hex.
#[derive(Serialize, Deserialize)]
struct KeyText {
    key: String,
    body: String,
}

/// The text of `terms`.
pub(crate) fn write(terms: &Terms, key: Option<&Key>) -> String {
    let text = Text {
        version: VERSION,
        team: terms.team.to_string(),
        alias: terms.alias.clone(),
        metadata: terms.metadata.to_map(),
        secure: terms.secure,
        allow_internet: terms.allow_internet,
        key: key.map(|key| KeyText { key: hex::encode(key.key), body: hex::encode(key.body) }),
    };
    serde_json::to_string(&text).expect("texts and flags have a JSON form")
}

/// The terms `text` holds. `None` when it was not written here.
pub(crate) fn read(text: &str) -> Option<Written> {
    let Version { version } = serde_json::from_str(text).ok()?;
    if version != VERSION {
        return None;
    }
    let text: Text = serde_json::from_str(text).ok()?;
    let terms = Terms {
        team: TeamId::parse(&text.team)?,
        alias: text.alias,
        metadata: text.metadata.into(),
        secure: text.secure,
        allow_internet: text.allow_internet,
    };
    // A damaged key costs a repeated create, and is no reason to end a sandbox.
    let key =
        text.key.and_then(|key| Some(Key { key: digest(&key.key)?, body: digest(&key.body)? }));
    Some(Written { terms, key })
}

fn digest(text: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    hex::decode_to_slice(text, &mut digest).ok()?;
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn terms() -> Terms {
        Terms {
            team: TeamId::parse("6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11").expect("a UUID"),
            alias: Some("base".to_owned()),
            metadata: BTreeMap::from([("user".to_owned(), "a \"quoted\" ü".to_owned())]).into(),
            secure: true,
            allow_internet: false,
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let key = Key::new("key", b"body");
        for key in [None, Some(key)] {
            let written = Written { terms: terms(), key };
            assert_eq!(read(&write(&written.terms, key.as_ref())), Some(written));
        }
    }

    /// Sandboxes that run over an update carry this text: it must stay readable.
    #[test]
    fn version_1_is_frozen() {
        let digest = "00".repeat(32);
        let text = format!(
            r#"{{"version":1,"team":"6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11","alias":"base",
            "metadata":{{"user":"a \"quoted\" ü"}},"secure":true,"allow_internet":false,
            "key":{{"key":"{digest}","body":"{digest}"}},"future":[1]}}"#
        );
        let zero = Key { key: [0; 32], body: [0; 32] };
        assert_eq!(read(&text), Some(Written { terms: terms(), key: Some(zero) }));
    }

    #[test]
    fn what_was_not_written_here_is_not_read() {
        let good = write(&terms(), None);
        for text in [
            "",
            "{}",
            "null",
            "[1]",
            &good[1..],
            &good.replace("\"version\":1", "\"version\":2"),
            &good.replace("6f2b8a52-", ""),
            &good.replace("true", "1"),
        ] {
            assert_eq!(read(text), None, "{text}");
        }
        let key = Key::new("key", b"body");
        let damaged = write(&terms(), Some(&key)).replace(&hex::encode(key.body), "xx");
        assert_eq!(read(&damaged), Some(Written { terms: terms(), key: None }));
    }
}
