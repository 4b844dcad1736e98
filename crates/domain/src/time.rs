//! Points in time as data; who reads the clock is decided elsewhere.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Milliseconds since the Unix epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct UnixMillis(pub i64);

impl UnixMillis {
    /// This time moved by `delta` into the future; saturates.
    pub fn plus(self, delta: Duration) -> UnixMillis {
        let delta_ms = i64::try_from(delta.as_millis()).unwrap_or(i64::MAX);
        UnixMillis(self.0.saturating_add(delta_ms))
    }

    /// How long after `earlier` this is; zero when it is not after it.
    pub fn since(self, earlier: UnixMillis) -> Duration {
        Duration::from_millis(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl From<SystemTime> for UnixMillis {
    fn from(time: SystemTime) -> Self {
        let since_epoch = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
        UnixMillis(i64::try_from(since_epoch.as_millis()).unwrap_or(i64::MAX))
    }
}
