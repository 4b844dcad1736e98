//! Query parameters. Unknown ones are ignored: clients send what later servers understand.

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use axum::extract::FromRequestParts;
use http::request::Parts;

use super::error::ApiError;

/// The decoded `name=value` pairs of a query, in order.
#[derive(Debug, Default)]
pub(crate) struct Query {
    pairs: Vec<(String, String)>,
}

impl<S: Sync> FromRequestParts<S> for Query {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _state: &S) -> Result<Self, ApiError> {
        Query::parse(parts.uri.query())
    }
}

impl Query {
    pub(crate) fn parse(text: Option<&str>) -> Result<Query, ApiError> {
        let text = text.unwrap_or_default();
        // The decoder below would put question marks in place of such bytes.
        if String::from_utf8(percent_decoded_bytes(text)).is_err() {
            return Err(ApiError::bad_request("the query is not valid: it is not UTF-8"));
        }
        let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
            .map_err(|e| ApiError::bad_request(format!("the query is not valid: {e}")))?;
        // No value means anything with a NUL in it, and a database may refuse to look for one.
        if let Some((name, _)) = pairs.iter().find(|(_, value)| value.contains('\0')) {
            return Err(ApiError::bad_request(format!(
                "the parameter '{name}' must not contain a NUL character"
            )));
        }
        Ok(Query { pairs })
    }

    /// The value of `name` as a number within `range`.
    pub(crate) fn number(
        &self,
        name: &str,
        range: RangeInclusive<u32>,
    ) -> Result<Option<u32>, ApiError> {
        match self.exact(name).map(str::parse) {
            None => Ok(None),
            Some(Ok(number)) if range.contains(&number) => Ok(Some(number)),
            Some(_) => Err(ApiError::bad_request(format!(
                "the parameter '{name}' must be a number from {} to {}",
                range.start(),
                range.end()
            ))),
        }
    }

    /// The value of `name`; `None` when it is absent or empty.
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        let found = self.pairs.iter().find(|(n, value)| n == name && !value.is_empty());
        found.map(|(_, value)| value.as_str())
    }

    /// The value of `name` where only some texts mean anything. Unlike with free text, an empty one
    /// is there, and is none of them.
    pub(crate) fn exact(&self, name: &str) -> Option<&str> {
        let found = self.pairs.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str())
    }

    /// The items of a comma-separated parameter, which may also be repeated.
    pub(crate) fn list<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        let named = self.pairs.iter().filter(move |(n, _)| n == name);
        let items = named.flat_map(|(_, value)| value.split(','));
        items.map(str::trim).filter(|item| !item.is_empty())
    }
}

/// Decodes the `metadata` filter: `k=v&k2=v2`, form-encoded, inside of which the SDKs have
/// percent-encoded every key and value once more. Plain values survive both steps unchanged.
///
/// Source: contract section 1.2; the second step as the released Python SDK does it.
pub(crate) fn metadata_filter(text: &str) -> Result<BTreeMap<String, String>, ApiError> {
    let pairs: Vec<(String, String)> = serde_urlencoded::from_str(text)
        .map_err(|e| ApiError::bad_request(format!("the metadata filter is not valid: {e}")))?;
    Ok(pairs.into_iter().map(|(k, v)| (percent_decoded(&k), percent_decoded(&v))).collect())
}

/// `text` with its `%XX` decoded; what is not valid that way is left as it is.
fn percent_decoded(text: &str) -> String {
    String::from_utf8(percent_decoded_bytes(text)).unwrap_or_else(|_| text.to_owned())
}

fn percent_decoded_bytes(text: &str) -> Vec<u8> {
    let mut decoded = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((&byte, after)) = rest.split_first() {
        let digits = if byte == b'%' { after.get(..2) } else { None };
        let mut value = [0];
        match digits.map(|digits| hex::decode_to_slice(digits, &mut value)) {
            Some(Ok(())) => {
                decoded.push(value[0]);
                rest = &after[2..];
            }
            _ => {
                decoded.push(byte);
                rest = after;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(query: &str) -> BTreeMap<String, String> {
        let query = Query::parse(Some(query)).expect("a query");
        metadata_filter(query.get("metadata").expect("the filter")).expect("a filter")
    }

    fn one(key: &str, value: &str) -> BTreeMap<String, String> {
        BTreeMap::from([(key.to_owned(), value.to_owned())])
    }

    #[test]
    fn a_filter_by_hand_is_understood() {
        assert_eq!(filter("metadata=user%3Dalice"), one("user", "alice"));
        assert_eq!(filter("metadata=user=alice"), one("user", "alice"));
        assert_eq!(filter("metadata=note%3Da%2Bb"), one("note", "a b"));
        assert_eq!(filter("metadata=a%3D100%2525"), one("a", "100%"));
        let two = filter("metadata=a%3D1%26b%3D2");
        assert_eq!(two, [one("a", "1"), one("b", "2")].into_iter().flatten().collect());
    }

    #[test]
    fn a_filter_of_the_sdks_is_understood() {
        // {"k y": "a=b&c/ü+%"}: quoted, form-encoded, then encoded as a query value.
        let query = "metadata=k%252520y%3Da%25253Db%252526c%2F%2525C3%2525BC%25252B%252525";
        assert_eq!(filter(query), one("k y", "a=b&c/ü+%"));
    }

    #[test]
    fn lists_may_be_joined_or_repeated() {
        let query = Query::parse(Some("state=running,%20paused&state=&state=x")).expect("a query");
        assert_eq!(query.list("state").collect::<Vec<_>>(), ["running", "paused", "x"]);
        assert_eq!(query.get("absent"), None);
    }

    #[test]
    fn numbers_have_a_range_and_a_name() {
        let query = Query::parse(Some("a=7&b=8&c=-1&d=x&e=&f=99999999999")).expect("a query");
        assert_eq!(query.number("a", 1..=7), Ok(Some(7)));
        assert_eq!(query.number("nope", 1..=7), Ok(None));
        for name in ["b", "c", "d", "e", "f"] {
            let text = format!("the parameter '{name}' must be a number from 1 to 7");
            assert_eq!(query.number(name, 1..=7), Err(ApiError::bad_request(text)));
        }
    }

    #[test]
    fn what_no_text_can_be_is_refused() {
        for query in ["a=%ff", "%c3=1", "a=%ed%a0%80", "limit=%00", "a=b%00c"] {
            assert!(Query::parse(Some(query)).is_err(), "{query} was accepted");
        }
        for query in ["", "&", "=", "a", "a=%C3%BC", "a=%", "a=%zz", "&&a=1=2"] {
            assert!(Query::parse(Some(query)).is_ok(), "{query} was refused");
        }
    }

    #[test]
    fn odd_percent_signs_are_kept() {
        for text in ["%", "%4", "%zz", "%ff"] {
            assert_eq!(percent_decoded(text), text);
        }
    }
}
