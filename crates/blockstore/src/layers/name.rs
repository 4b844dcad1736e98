//! What a layer is called: its path below the data folder.

use std::fmt;
use std::path::Path;

/// Longest name, in bytes. A name is written into every map that uses the layer.
pub(crate) const NAME_MAX_BYTES: usize = 255;

/// Where sealed layers lie, below the data folder.
pub(super) const FOLDER: &str = "layers";

/// Why a text is no layer's name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("use {name:?} as a layer's name: {problem}")]
pub struct BadLayerName {
    /// The text, cut after 255 bytes.
    pub name: String,
    /// The rule it breaks.
    pub problem: &'static str,
}

/// A layer's path relative to the data folder, such as `layers/<32 hex>` or
/// `templates/<build id>/rootfs.ext4`.
///
/// Maps come from other machines, so a name can only point down: at most 255 bytes of ASCII letters,
/// digits, `.`, `_`, `-`, in parts between single slashes, none of them `.` or `..`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LayerName(String);

impl LayerName {
    /// Checks a name.
    ///
    /// # Errors
    /// [`BadLayerName`] with the rule that it breaks.
    pub fn new(name: &str) -> Result<LayerName, BadLayerName> {
        let bad = |problem| {
            let shown = name.char_indices().take_while(|(at, _)| *at < NAME_MAX_BYTES);
            Err(BadLayerName { name: shown.map(|(_, c)| c).collect(), problem })
        };
        if name.len() > NAME_MAX_BYTES {
            return bad("it is longer than 255 bytes");
        }
        for part in name.split('/') {
            if part.is_empty() || part == "." || part == ".." {
                return bad("it is no plain path below the data folder");
            }
            if !part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-')) {
                return bad("only ASCII letters, digits, '.', '_' and '-' may stand in it");
            }
        }
        Ok(LayerName(name.to_owned()))
    }

    /// The name of the file `path` below `root`.
    pub(crate) fn of_path(root: &Path, path: &Path) -> Result<LayerName, BadLayerName> {
        let below = path.strip_prefix(root).ok().and_then(Path::to_str);
        match below {
            Some(below) => LayerName::new(below),
            None => Err(BadLayerName {
                name: path.display().to_string(),
                problem: "it does not lie below the data folder",
            }),
        }
    }

    /// True for what a store sealed, false for templates.
    pub(crate) fn is_sealed(&self) -> bool {
        self.0.strip_prefix(FOLDER).is_some_and(|rest| rest.starts_with('/'))
    }

    /// True for what a map may name. A map may come from elsewhere: it must not make a disk of another
    /// file of the data folder, such as a database.
    pub(crate) fn is_for_maps(&self) -> bool {
        self.is_sealed() || self.0.starts_with("templates/")
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for LayerName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_stay_below_the_data_folder() {
        for good in ["layers/0123456789abcdef0123456789abcdef", "templates/b-1_x/rootfs.ext4", "a"]
        {
            assert_eq!(LayerName::new(good).expect("a good name").as_str(), good);
        }
        let long = "a".repeat(256);
        for bad in [
            "",
            "/",
            "/etc/passwd",
            "a//b",
            "a/",
            "../a",
            "a/../b",
            "./a",
            "a b",
            "a\0b",
            "ä",
            &long,
        ] {
            let e = LayerName::new(bad).expect_err(bad);
            assert!(e.name.len() <= NAME_MAX_BYTES);
        }
        let root = Path::new("/data");
        let name = LayerName::of_path(root, Path::new("/data/templates/x/memory")).expect("below");
        assert_eq!(name.as_str(), "templates/x/memory");
        assert!(LayerName::of_path(root, Path::new("/other/x")).is_err());
    }

    proptest! {
        #[test]
        fn no_accepted_name_leaves_its_folder(name in "[a/.\\-_ ]{0,12}") {
            if let Ok(name) = LayerName::new(&name) {
                let path = Path::new(name.as_str());
                prop_assert!(path.components().all(|c| matches!(c, std::path::Component::Normal(_))));
                prop_assert_eq!(path.components().count(), name.as_str().split('/').count());
            }
        }
    }
}
