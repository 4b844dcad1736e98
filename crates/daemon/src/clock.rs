//! The one place that reads the wall clock.

use belljar_domain::UnixMillis;

/// Now, by the host's wall clock.
#[expect(clippy::disallowed_methods, reason = "this is the place the ban points at")]
pub fn now() -> UnixMillis {
    UnixMillis::from(std::time::SystemTime::now())
}
