//! A file's user metadata: extended attributes `user.e2b.*`, headers `X-Metadata-*`.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::path::Path;

use http::{HeaderMap, HeaderName, HeaderValue};
use xattr::FileExt as _;

/// Header prefix, in the lower case HTTP libraries use.
const HEADER_PREFIX: &str = "x-metadata-";

/// Attribute prefix.
const ATTRIBUTE_PREFIX: &str = "user.e2b.";

/// Longest key, bytes: an attribute name has at most 255, prefix included.
const KEY_MAX_BYTES: usize = 255 - ATTRIBUTE_PREFIX.len();

/// All keys and values of a file, bytes: one block of an ext4 inode holds them.
const TOTAL_MAX_BYTES: usize = 4096;

/// Why metadata was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum MetadataError {
    /// A key is empty or too long.
    #[error("metadata key '{0}' must have 1 to {KEY_MAX_BYTES} bytes")]
    Key(String),
    /// A value is not printable US-ASCII.
    #[error("metadata value of '{0}' must be printable US-ASCII")]
    Value(String),
    /// All of it together is too long.
    #[error("metadata has {0} bytes, more than {TOTAL_MAX_BYTES}")]
    Total(usize),
}

/// The metadata an upload's headers ask for.
///
/// # Errors
/// [`MetadataError`] names the key that is wrong.
pub(super) fn from_headers(headers: &HeaderMap) -> Result<BTreeMap<String, String>, MetadataError> {
    let mut metadata = BTreeMap::new();
    let mut total = 0;
    for (name, value) in headers {
        let Some(key) = name.as_str().strip_prefix(HEADER_PREFIX) else { continue };
        if key.is_empty() || key.len() > KEY_MAX_BYTES {
            return Err(MetadataError::Key(key.to_owned()));
        }
        let printable = value.as_bytes().iter().all(|byte| matches!(byte, b' '..=b'~'));
        let Some(value) = value.to_str().ok().filter(|_| printable) else {
            return Err(MetadataError::Value(key.to_owned()));
        };
        total += key.len() + value.len();
        metadata.insert(key.to_owned(), value.to_owned());
    }
    if total > TOTAL_MAX_BYTES { Err(MetadataError::Total(total)) } else { Ok(metadata) }
}

/// The headers a download answers with; what no header can carry is left out.
pub(super) fn to_headers(metadata: &BTreeMap<String, String>, headers: &mut HeaderMap) {
    for (key, value) in metadata {
        let name = HeaderName::from_bytes(format!("{HEADER_PREFIX}{key}").as_bytes());
        if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(value)) {
            headers.insert(name, value);
        }
    }
}

/// Reads an open file's metadata. A file system without attributes has none.
pub(super) fn read(file: &File) -> BTreeMap<String, String> {
    let names = file.list_xattr().into_iter().flatten();
    collect(names, |name| file.get_xattr(name))
}

/// As [`read`], of what a path leads to.
pub(super) fn read_at(path: &Path) -> BTreeMap<String, String> {
    let names = xattr::list_deref(path).into_iter().flatten();
    collect(names, |name| xattr::get_deref(path, name))
}

fn collect(
    names: impl Iterator<Item = OsString>,
    read: impl Fn(&OsStr) -> io::Result<Option<Vec<u8>>>,
) -> BTreeMap<String, String> {
    let mut metadata = BTreeMap::new();
    for name in names {
        if let Some(key) = key(&name)
            && let Ok(Some(value)) = read(&name)
        {
            metadata.insert(key.to_owned(), String::from_utf8_lossy(&value).into_owned());
        }
    }
    metadata
}

/// The metadata key an attribute holds; `None` for attributes of others.
pub(super) fn key(attribute: &OsStr) -> Option<&str> {
    attribute.to_str()?.strip_prefix(ATTRIBUTE_PREFIX).filter(|key| !key.is_empty())
}

/// Makes an open file's metadata be exactly this.
///
/// # Errors
/// As `fsetxattr(2)`; the file system may not have attributes.
pub(super) fn replace(file: &File, metadata: &BTreeMap<String, String>) -> io::Result<()> {
    for key in read(file).keys().filter(|key| !metadata.contains_key(*key)) {
        file.remove_xattr(format!("{ATTRIBUTE_PREFIX}{key}"))?;
    }
    for (key, value) in metadata {
        file.set_xattr(format!("{ATTRIBUTE_PREFIX}{key}"), value.as_bytes())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| {
                (
                    HeaderName::from_bytes(name.as_bytes()).expect("a name"),
                    HeaderValue::from_bytes(value.as_bytes()).expect("a value"),
                )
            })
            .collect()
    }

    #[test]
    fn headers_become_metadata_and_back() {
        let given = headers(&[("X-Metadata-Author", "me"), ("X-Other", "1")]);
        let metadata = from_headers(&given).expect("valid");
        assert_eq!(metadata, BTreeMap::from([("author".to_owned(), "me".to_owned())]));
        let mut answer = HeaderMap::new();
        to_headers(&metadata, &mut answer);
        assert_eq!(answer["x-metadata-author"], "me");
    }

    #[test]
    fn limits_hold() {
        let key = format!("x-metadata-{}", "k".repeat(247));
        assert!(matches!(from_headers(&headers(&[(&key, "v")])), Err(MetadataError::Key(_))));
        assert!(matches!(
            from_headers(&headers(&[("x-metadata-k", "\u{e9}")])),
            Err(MetadataError::Value(_))
        ));
        assert!(matches!(
            from_headers(&headers(&[("x-metadata-k", &"v".repeat(4096))])),
            Err(MetadataError::Total(4097))
        ));
    }

    #[test]
    fn any_headers_become_metadata_within_limits_and_back() {
        crate::fuzz::run("metadata", &["=", "\n", "user.e2b."], |input| {
            let text = String::from_utf8_lossy(input);
            let _ = key(OsStr::new(text.as_ref()));
            let given: HeaderMap = text
                .lines()
                .filter_map(|line| {
                    let (name, value) = line.split_once('=')?;
                    let name = HeaderName::from_bytes(format!("x-metadata-{name}").as_bytes());
                    Some((name.ok()?, HeaderValue::from_bytes(value.as_bytes()).ok()?))
                })
                .collect();
            let Ok(metadata) = from_headers(&given) else { return 0 };
            let total: usize = metadata.iter().map(|(key, value)| key.len() + value.len()).sum();
            assert!(total <= TOTAL_MAX_BYTES);
            let mut answer = HeaderMap::new();
            to_headers(&metadata, &mut answer);
            assert_eq!(from_headers(&answer), Ok(metadata.clone()));
            crate::fuzz::outcome((metadata.len(), total.checked_ilog2()))
        });
    }
}
