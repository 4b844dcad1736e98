//! Ranges of time in queries.

use belljar_domain::UnixMillis;

use super::error::ApiError;
use super::query::Query;

/// The last second of the year 9999: what follows no client can read.
const LAST_SECOND: i64 = 253_402_300_799;

/// Reads `start` and `end`, in seconds since 1970. Either may be absent.
pub(crate) fn range(query: &Query) -> Result<(Option<UnixMillis>, Option<UnixMillis>), ApiError> {
    let (start, end) = (seconds(query, "start")?, seconds(query, "end")?);
    if let (Some(start), Some(end)) = (start, end)
        && start > end
    {
        return Err(ApiError::bad_request("the parameter 'start' must not be later than 'end'"));
    }
    // The second `end` names is a whole one.
    let end = end.map(|seconds| UnixMillis(seconds * 1000 + 999));
    Ok((start.map(|seconds| UnixMillis(seconds * 1000)), end))
}

fn seconds(query: &Query, name: &str) -> Result<Option<i64>, ApiError> {
    let Some(text) = query.exact(name) else { return Ok(None) };
    match text.parse() {
        Ok(seconds) if (0..=LAST_SECOND).contains(&seconds) => Ok(Some(seconds)),
        _ => Err(ApiError::bad_request(format!(
            "the parameter '{name}' must be a time in whole seconds since 1970"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<(Option<UnixMillis>, Option<UnixMillis>), ApiError> {
        range(&Query::parse(Some(text))?)
    }

    #[test]
    fn both_ends_may_be_open() {
        assert_eq!(read(""), Ok((None, None)));
        assert_eq!(read("start=7"), Ok((Some(UnixMillis(7_000)), None)));
        assert_eq!(read("start=7&end=7"), Ok((Some(UnixMillis(7_000)), Some(UnixMillis(7_999)))));
        let last = format!("end={LAST_SECOND}");
        assert_eq!(read(&last), Ok((None, Some(UnixMillis(LAST_SECOND * 1000 + 999)))));
    }

    #[test]
    fn what_is_no_time_is_refused_by_name() {
        for text in ["start=x", "start=-1", "start=1.5", "start=253402300800", "start=1e9"] {
            let refused = format!("{:?}", read(text).expect_err(text));
            assert!(refused.contains("'start'"), "{refused}");
        }
        for text in ["end=", "end=99999999999999999999"] {
            assert!(read(text).is_err(), "{text}");
        }
        let refused = format!("{:?}", read("start=2&end=1").expect_err("it is backwards"));
        assert!(refused.contains("'end'"), "{refused}");
    }
}
