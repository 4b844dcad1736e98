//! What callers write on a sandbox.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Names and values, in the order of the names. Most sandboxes have one or two, which a map keeps
/// half a kilobyte for; here they cost what they hold, and a clone costs nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Metadata(Arc<[(Box<str>, Box<str>)]>);

impl Metadata {
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.0.binary_search_by(|(known, _)| (**known).cmp(name));
        found.ok().map(|at| &*self.0[at].1)
    }

    pub(crate) fn to_map(&self) -> BTreeMap<String, String> {
        let pairs = self.0.iter();
        pairs.map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }
}

impl From<BTreeMap<String, String>> for Metadata {
    fn from(map: BTreeMap<String, String>) -> Metadata {
        // A map gives its entries in their order, which `get` counts on.
        Metadata(map.into_iter().map(|(name, value)| (name.into(), value.into())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_goes_in_is_found_and_comes_out() {
        let map = ["b", "", "a", "ü", "aa"].map(|name| (name.to_owned(), format!("of {name}")));
        let map = BTreeMap::from(map);
        let metadata = Metadata::from(map.clone());
        for (name, value) in &map {
            assert_eq!(metadata.get(name), Some(value.as_str()));
        }
        assert_eq!((metadata.get("c"), Metadata::default().get("a")), (None, None));
        assert_eq!(metadata.to_map(), map);
    }
}
