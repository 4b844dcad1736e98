//! Pages of lists. A cursor is the position of the last item shown, so that items that come and go
//! between two pages neither repeat nor hide others.
//!
//! Cursor text: base64url of `{RFC 3339 time}__{id}`, with `__asc` after it when oldest first.
//! Opaque to clients. Source: contract section 1.1.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use belljar_domain::UnixMillis;
use belljar_wire::rest::Time;
use chrono::SecondsFormat;

use super::error::ApiError;
use super::query::Query;
use super::shapes::time;
use crate::live::Order;

const MAX_LIMIT: u32 = 100;

/// Where an item stands in a list.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Position {
    pub(crate) at: UnixMillis,
    pub(crate) id: String,
}

/// Which part of a list is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Wanted {
    limit: usize,
    order: Order,
    after: Option<Position>,
}

impl Wanted {
    /// Reads `limit`, `order` and `nextToken`.
    pub(crate) fn from_query(query: &Query) -> Result<Wanted, ApiError> {
        let limit = query.number("limit", 1..=MAX_LIMIT)?.unwrap_or(MAX_LIMIT) as usize;
        let order = match query.exact("order") {
            None | Some("desc") => Order::NewestFirst,
            Some("asc") => Order::OldestFirst,
            Some(_) => {
                return Err(ApiError::bad_request("the parameter 'order' must be asc or desc"));
            }
        };
        let after = match query.get("nextToken").map(|text| decode(text, order)) {
            None => None,
            Some(Some(position)) => Some(position),
            Some(None) => return Err(bad_token()),
        };
        Ok(Wanted { limit, order, after })
    }

    /// Items on a page, at most.
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Which end of the list comes first.
    pub(crate) fn order(&self) -> Order {
        self.order
    }

    /// The last item of the page before.
    pub(crate) fn after(&self) -> Option<&Position> {
        self.after.as_ref()
    }

    /// The token of the page after the one that ends at `last`.
    pub(crate) fn token(&self, last: &Position) -> String {
        encode(last, self.order)
    }

    /// The wanted part of `items`, and the token for the next one if there is more.
    pub(crate) fn take<T>(
        &self,
        items: impl IntoIterator<Item = T>,
        position: impl Fn(&T) -> Position,
    ) -> (Vec<T>, Option<String>) {
        let mut sorted: Vec<(Position, T)> =
            items.into_iter().map(|item| (position(&item), item)).collect();
        match self.order {
            Order::OldestFirst => sorted.sort_by(|(a, _), (b, _)| a.cmp(b)),
            Order::NewestFirst => sorted.sort_by(|(a, _), (b, _)| b.cmp(a)),
        }
        if let Some(after) = &self.after {
            sorted.retain(|(position, _)| match self.order {
                Order::OldestFirst => position > after,
                Order::NewestFirst => position < after,
            });
        }
        let more = sorted.len() > self.limit;
        sorted.truncate(self.limit);
        let last = sorted.last().filter(|_| more);
        let token = last.map(|(position, _)| encode(position, self.order));
        (sorted.into_iter().map(|(_, item)| item).collect(), token)
    }
}

/// The token was not made here, or for another list.
pub(crate) fn bad_token() -> ApiError {
    ApiError::bad_request(
        "the parameter 'nextToken' is not valid: send what the header X-Next-Token of the page \
         before held, with the same 'order', or leave it out to begin again",
    )
}

fn encode(position: &Position, order: Order) -> String {
    let at = time(position.at).to_rfc3339_opts(SecondsFormat::Millis, true);
    let suffix = match order {
        Order::OldestFirst => "__asc",
        Order::NewestFirst => "",
    };
    URL_SAFE_NO_PAD.encode(format!("{at}__{}{suffix}", position.id))
}

/// `None` for what [`encode`] never makes, and for a token of the other order.
fn decode(text: &str, order: Order) -> Option<Position> {
    let text = URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok()?;
    let text = String::from_utf8(text).ok()?;
    let (at, rest) = text.split_once("__")?;
    let at: Time = at.parse().ok()?;
    let (id, made_for) = match rest.strip_suffix("__asc") {
        Some(id) => (id, Order::OldestFirst),
        None => (rest, Order::NewestFirst),
    };
    let position = Position { at: UnixMillis(at.timestamp_millis()), id: id.to_owned() };
    (made_for == order).then_some(position)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(query: &str) -> Result<Wanted, ApiError> {
        Wanted::from_query(&Query::parse(Some(query))?)
    }

    fn position(item: &(i64, &str)) -> Position {
        Position { at: UnixMillis(item.0), id: item.1.to_owned() }
    }

    #[test]
    fn pages_cover_a_list_once_in_either_order() {
        // Two items share a time, so the id decides.
        let items = [(1_700_000_000_001, "b"), (1_700_000_000_001, "a"), (5, "c"), (9, "d")];
        for (order, expected) in [("desc", ["b", "a", "d", "c"]), ("asc", ["c", "d", "a", "b"])] {
            let mut seen = Vec::new();
            let mut query = format!("limit=1&order={order}");
            loop {
                let (page, next) = wanted(&query).expect("a page").take(items, position);
                seen.extend(page.iter().map(|item| item.1));
                let Some(next) = next else { break };
                query = format!("limit=1&order={order}&nextToken={next}");
            }
            assert_eq!(seen, expected);
        }
    }

    #[test]
    fn the_last_page_has_no_token() {
        let (page, next) = wanted("limit=2").expect("a page").take([(1, "a"), (2, "b")], position);
        assert_eq!((page.len(), next), (2, None));
    }

    #[test]
    fn what_makes_no_page_is_refused() {
        let asc = encode(&Position { at: UnixMillis(0), id: "a".to_owned() }, Order::OldestFirst);
        let wrong_order = format!("nextToken={asc}");
        for query in [
            "limit=0",
            "limit=101",
            "limit=-1",
            "limit=x",
            "limit=99999999999999999999999",
            "order=up",
            "nextToken=%21",
            "nextToken=AAAA",
            &wrong_order,
        ] {
            assert!(wanted(query).is_err(), "{query} was accepted");
        }
    }
}
