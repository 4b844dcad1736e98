//! Names in a store: of objects and images by their content, of refs by people; and the key of each.

use crate::blobs::BlobKey;

/// Longest ref name, in bytes.
const REF_BYTES_MAX: usize = 200;

/// A text that names no object, image or ref.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("name {what}: {text:?} is not {rule}")]
pub struct InvalidName {
    /// What was to be named.
    pub what: &'static str,
    /// What was given.
    pub text: String,
    /// What it should have been.
    pub rule: &'static str,
}

const HASH_RULE: &str = "64 lower-case hexadecimal digits";

fn parse_hash(what: &'static str, text: &str) -> Result<[u8; 32], InvalidName> {
    let invalid = || InvalidName { what, text: text.to_owned(), rule: HASH_RULE };
    // The hash library reads capitals too; a name has one spelling.
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(invalid());
    }
    blake3::Hash::from_hex(text).map(|hash| *hash.as_bytes()).map_err(|_| invalid())
}

macro_rules! content_id {
    ($(#[doc = $doc:literal])+ $name:ident, $what:literal) => {
        $(#[doc = $doc])+
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; 32]);

        impl $name {
            /// Reads the text form: 64 lower-case hexadecimal digits.
            ///
            /// # Errors
            /// [`InvalidName`].
            pub fn parse(text: &str) -> Result<$name, InvalidName> {
                parse_hash($what, text).map($name)
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(blake3::Hash::from_bytes(self.0).to_hex().as_str())
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                write!(f, concat!($what, " {}"), self)
            }
        }
    };
}

content_id! {
    /// The name of an object: BLAKE3 of its index, which holds the BLAKE3 of everything else in it.
    ObjectId, "object"
}
content_id! {
    /// The name of an image: BLAKE3 of its manifest without the checksum at its end, which it equals.
    ImageId, "image"
}

/// BLAKE3 of `bytes`.
pub(crate) fn hash_of(bytes: &[u8]) -> [u8; 32] {
    *blake3::hash(bytes).as_bytes()
}

/// Every text built here is made of parts that keys allow.
fn key(text: String) -> BlobKey {
    BlobKey::new(text).expect("ids are hexadecimal and ref names were checked")
}

impl ObjectId {
    /// Where it is. 256 folders keep each short where a store is a directory.
    pub fn key(&self) -> BlobKey {
        key(format!("objects/{:02x}/{self}", self.0[0]))
    }
}

impl ImageId {
    /// Where its manifest is.
    pub fn key(&self) -> BlobKey {
        key(format!("manifests/{self}"))
    }
}

pub(crate) fn objects_folder() -> BlobKey {
    key("objects".to_owned())
}

pub(crate) fn manifests_folder() -> BlobKey {
    key("manifests".to_owned())
}

pub(crate) fn refs_folder() -> BlobKey {
    key("refs".to_owned())
}

pub(crate) fn condemned_folder() -> BlobKey {
    key("condemned".to_owned())
}

/// The mark that an object may be deleted soon.
pub(crate) fn condemned_object(id: &ObjectId) -> BlobKey {
    key(format!("condemned/object-{id}"))
}

/// The mark that a manifest may be deleted soon.
pub(crate) fn condemned_image(id: &ImageId) -> BlobKey {
    key(format!("condemned/image-{id}"))
}

/// The object whose key this is.
pub(crate) fn object_of_key(found: &BlobKey) -> Option<ObjectId> {
    ObjectId::parse(found.last_part()).ok().filter(|id| id.key() == *found)
}

/// The image whose manifest's key this is.
pub(crate) fn image_of_key(found: &BlobKey) -> Option<ImageId> {
    ImageId::parse(found.last_part()).ok().filter(|id| id.key() == *found)
}

/// What people call an image: a template and its build, a snapshot, a paused sandbox. An image that no
/// ref names may be collected.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RefName(String);

impl RefName {
    /// Checks a name: 1 to 200 of `a-z`, `0-9`, `.`, `_`, `-`, in parts divided by `/` that begin with a
    /// letter or a digit.
    ///
    /// # Errors
    /// [`InvalidName`].
    pub fn new(text: &str) -> Result<RefName, InvalidName> {
        let is_short = text.len() <= REF_BYTES_MAX;
        match BlobKey::new(format!("refs/{text}")) {
            Ok(_key) if is_short => Ok(RefName(text.to_owned())),
            _ => Err(InvalidName {
                what: "a ref",
                text: text.to_owned(),
                rule: "1 to 200 of a-z, 0-9, '.', '_', '-', in parts divided by '/' that begin with a \
                       letter or a digit",
            }),
        }
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Where it is.
    pub(crate) fn key(&self) -> BlobKey {
        key(format!("refs/{}", self.0))
    }

    /// The ref whose key this is.
    pub(crate) fn of_key(found: &BlobKey) -> Option<RefName> {
        RefName::new(found.as_str().strip_prefix("refs/")?).ok()
    }
}

impl std::fmt::Display for RefName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_have_one_spelling() {
        let text = "ab".repeat(32);
        assert_eq!(ObjectId::parse(&text).expect("an id").to_string(), text);
        for bad in
            ["AB".repeat(32), "ab".repeat(31), "ab".repeat(33), "zz".repeat(32), String::new()]
        {
            assert!(ImageId::parse(&bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn keys_are_read_back_only_where_they_belong() {
        let (object, image) = (ObjectId([0xab; 32]), ImageId([7; 32]));
        assert_eq!(object_of_key(&object.key()), Some(object));
        assert_eq!(image_of_key(&image.key()), Some(image));
        assert_eq!(object_of_key(&image.key()), None);
        assert_eq!(object_of_key(&key(format!("objects/00/{object}"))), None);
        let name = RefName::new("templates/base/1").expect("a name");
        assert_eq!(RefName::of_key(&name.key()), Some(name));
        for bad in ["", "/a", "../a", "A", "a/", &"a".repeat(201)] {
            assert!(RefName::new(bad).is_err(), "{bad:?}");
        }
    }
}
