//! The one place that reads the guest's wall clock.

use std::time::{SystemTime, UNIX_EPOCH};

/// Seconds since the Unix epoch, by the guest's wall clock; 0 when it is set before the epoch.
#[expect(clippy::disallowed_methods, reason = "this is the place the ban points at")]
pub fn unix_seconds() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

/// Milliseconds since the Unix epoch, by the guest's wall clock; 0 when it is set before the epoch.
#[expect(clippy::disallowed_methods, reason = "this is the place the ban points at")]
pub fn unix_millis() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_millis()).unwrap_or(i64::MAX))
}
