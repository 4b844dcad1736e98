//! Names of blobs: the same in every store, so the strictest store decides what they may be.

/// Longest key, in bytes. S3 takes 1,024 with its prefix; a file name 255.
const KEY_BYTES_MAX: usize = 240;

/// Why a text is no key.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "name a blob {text:?}: a key is 1 to {KEY_BYTES_MAX} of a-z, 0-9, '.', '_', '-', in parts divided by \
     '/' that begin with a letter or a digit"
)]
pub struct KeyError {
    /// What was given.
    pub text: String,
}

/// The name of a blob, such as `objects/ab/ab…`. No part begins with a dot, so that no key leaves
/// its store and a directory can keep files of its own beside the blobs.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobKey(String);

impl BlobKey {
    /// Checks a name.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn new(text: impl Into<String>) -> Result<BlobKey, KeyError> {
        let text = text.into();
        let is_part = |part: &str| {
            part.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
                && part.bytes().all(|b| {
                    b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'.' | b'_' | b'-')
                })
        };
        if text.len() > KEY_BYTES_MAX || !text.split('/').all(is_part) {
            return Err(KeyError { text });
        }
        Ok(BlobKey(text))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The part after the last slash.
    pub fn last_part(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl std::fmt::Display for BlobKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_stay_inside_their_store() {
        for good in ["a", "objects/ab/abcd", "refs/v1.2_x-y"] {
            assert_eq!(BlobKey::new(good).map(|key| key.as_str().to_owned()), Ok(good.to_owned()));
        }
        let long = "a".repeat(KEY_BYTES_MAX + 1);
        for bad in ["", "/a", "a/", "a//b", "../a", "a/..", "a/.b", "A", "a b", "a\n", &long] {
            assert!(BlobKey::new(bad).is_err(), "{bad:?}");
        }
    }
}
