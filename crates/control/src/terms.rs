//! A sandbox's terms as text: what its node keeps for this control plane, so that it finds out
//! after a crash of its own whose sandbox that is.
//!
//! JSON with a version. A later version may add fields to version 1, which are passed over here;
//! what cannot be read that way gets another number, and is then nobody's sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD_NO_PAD;
use belljar_domain::Secret;
use serde::{Deserialize, Serialize};

use crate::idempotency::{Digest, Key};
use crate::live::{Lifecycle, OnEnd, Terms};
use crate::team::TeamId;

const VERSION: u32 = 1;
/// How long a sandbox counts as created for whose terms do not say. Source: contract section 9.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(300);

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
    /// Absent: it is killed at its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pause_at_end: Option<PauseText>,
    #[serde(default)]
    auto_resume: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lifetime_ms: Option<u64>,
    /// `NAME=value` and a NUL each, in base64: what its characters cannot grow.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    env: String,
}

/// What an automatic pause keeps.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PauseText {
    Full,
    Filesystem,
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
        pause_at_end: match terms.lifecycle.on_end {
            OnEnd::Kill => None,
            OnEnd::Pause { filesystem_only: false } => Some(PauseText::Full),
            OnEnd::Pause { filesystem_only: true } => Some(PauseText::Filesystem),
        },
        auto_resume: terms.lifecycle.auto_resume,
        lifetime_ms: u64::try_from(terms.lifecycle.lifetime.as_millis()).ok(),
        env: env_text(terms.env_vars.expose()),
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
        lifecycle: Lifecycle {
            on_end: match text.pause_at_end {
                None => OnEnd::Kill,
                Some(PauseText::Full) => OnEnd::Pause { filesystem_only: false },
                Some(PauseText::Filesystem) => OnEnd::Pause { filesystem_only: true },
            },
            auto_resume: text.auto_resume,
            lifetime: text.lifetime_ms.map_or(DEFAULT_LIFETIME, Duration::from_millis),
        },
        env_vars: Arc::new(Secret::new(env_vars(&text.env)?)),
    };
    // A damaged key costs a repeated create, and is no reason to end a sandbox.
    let key =
        text.key.and_then(|key| Some(Key { key: digest(&key.key)?, body: digest(&key.body)? }));
    Some(Written { terms, key })
}

/// The terms of a sandbox whose text says nothing of its end and its environment.
pub(crate) fn plain_lifecycle() -> Lifecycle {
    Lifecycle { on_end: OnEnd::Kill, auto_resume: false, lifetime: DEFAULT_LIFETIME }
}

/// Neither a name nor a value holds a NUL, and no name a `=`: they were checked at the edge.
fn env_text(env_vars: &BTreeMap<String, String>) -> String {
    let line = |(name, value): (&String, &String)| format!("{name}={value}\0");
    STANDARD_NO_PAD.encode(env_vars.iter().map(line).collect::<String>())
}

fn env_vars(text: &str) -> Option<BTreeMap<String, String>> {
    let text = String::from_utf8(STANDARD_NO_PAD.decode(text).ok()?).ok()?;
    let lines = text.split_terminator('\0').map(|line| line.split_once('='));
    lines.map(|line| line.map(|(name, value)| (name.to_owned(), value.to_owned()))).collect()
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
            lifecycle: plain_lifecycle(),
            env_vars: Arc::default(),
        }
    }

    #[test]
    fn what_a_resume_needs_is_kept() {
        let env_vars = [("A", "1=2\n\u{1}"), ("EMPTY", ""), ("Ü", "ß")];
        let env_vars = env_vars.map(|(name, value)| (name.to_owned(), value.to_owned()));
        for filesystem_only in [false, true] {
            let terms = Terms {
                lifecycle: Lifecycle {
                    on_end: OnEnd::Pause { filesystem_only },
                    auto_resume: !filesystem_only,
                    lifetime: Duration::from_secs(3600),
                },
                env_vars: Arc::new(Secret::new(BTreeMap::from(env_vars.clone()))),
                ..terms()
            };
            let text = write(&terms, None);
            assert!(!text.contains("1=2"), "{text}");
            assert_eq!(read(&text), Some(Written { terms, key: None }));
        }
    }

    /// The node keeps 1 MiB of terms at most.
    #[test]
    fn the_largest_environment_fits() {
        let value = "\u{1}".repeat(511 << 10);
        let env_vars = BTreeMap::from([("A".to_owned(), value)]);
        let terms = Terms { env_vars: Arc::new(Secret::new(env_vars)), ..terms() };
        assert!(write(&terms, None).len() < (1 << 20) - (128 << 10));
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
