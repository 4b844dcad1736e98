//! What happens to a delivery after a try: one pure function.
//!
//! ```text
//!             2xx
//!  pending ─────────► delivered
//!   │  ▲ │
//!   └──┘ └──────────► dead ──► pending (somebody asks for it)
//!  failed, tries left   failed, none left
//! ```
//!
//! A try that nobody saw the end of, because the server died, does not count.

use std::time::Duration;

use belljar_domain::UnixMillis;

/// Longest error text kept, in bytes.
const MAX_ERROR_BYTES: usize = 256;

/// How a try ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The receiver answered with this HTTP status.
    Answered(u16),
    /// There was no answer. The text is for the team, and so are all its words.
    Failed(String),
}

/// What becomes of the delivery.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct After {
    pub(crate) state: Next,
    /// Tries that have come to an end, this one included.
    pub(crate) attempts: u32,
    pub(crate) last_status: Option<u16>,
    pub(crate) last_error: Option<String>,
}

/// See the module's own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Next {
    /// The receiver has it.
    Delivered,
    /// Tried again at this time.
    Pending { due: UnixMillis },
    /// Not tried any more by itself.
    Dead,
}

/// How often and how far apart failed deliveries are tried again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Patience {
    /// Tries after the first.
    pub(crate) retries: u32,
    /// Wait before each of them.
    pub(crate) wait: Duration,
}

/// What becomes of a delivery that has had `attempts_before` tries and now this one.
pub(crate) fn after(
    attempts_before: u32,
    outcome: Outcome,
    now: UnixMillis,
    patience: Patience,
) -> After {
    let attempts = attempts_before.saturating_add(1);
    let (last_status, last_error) = match outcome {
        Outcome::Answered(status @ 200..=299) => {
            return After {
                state: Next::Delivered,
                attempts,
                last_status: Some(status),
                last_error: None,
            };
        }
        Outcome::Answered(status @ 300..=399) => {
            (Some(status), format!("the receiver answered {status}; redirects are not followed"))
        }
        Outcome::Answered(status) => (Some(status), format!("the receiver answered {status}")),
        Outcome::Failed(reason) => (None, reason),
    };
    let state = if attempts > patience.retries {
        Next::Dead
    } else {
        Next::Pending { due: now.plus(patience.wait) }
    };
    After { state, attempts, last_status, last_error: Some(cut(last_error)) }
}

fn cut(mut text: String) -> String {
    text.truncate(text.floor_char_boundary(MAX_ERROR_BYTES));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: UnixMillis = UnixMillis(1_000);
    const PATIENCE: Patience = Patience { retries: 3, wait: Duration::from_secs(10) };

    #[test]
    fn every_success_is_the_end() {
        for (attempts, status) in [(0, 200), (1, 204), (3, 299), (9, 200)] {
            let after = after(attempts, Outcome::Answered(status), NOW, PATIENCE);
            assert_eq!(after.state, Next::Delivered);
            assert_eq!((after.attempts, after.last_status), (attempts + 1, Some(status)));
            assert_eq!(after.last_error, None);
        }
    }

    #[test]
    fn a_failure_is_tried_three_times_more_ten_seconds_apart() {
        for status in [100, 301, 400, 410, 500, 599] {
            for attempts in 0..3 {
                let after = after(attempts, Outcome::Answered(status), NOW, PATIENCE);
                assert_eq!(after.state, Next::Pending { due: UnixMillis(11_000) });
                assert_eq!(after.last_status, Some(status));
                assert!(after.last_error.expect("a text").contains(&status.to_string()));
            }
            let last = after(3, Outcome::Answered(status), NOW, PATIENCE);
            assert_eq!((last.state, last.attempts), (Next::Dead, 4));
        }
    }

    #[test]
    fn silence_keeps_its_reason_within_bounds() {
        let after = after(0, Outcome::Failed("\u{fc}".repeat(1000)), NOW, PATIENCE);
        assert_eq!(after.last_status, None);
        assert_eq!(after.last_error.expect("a text").len(), MAX_ERROR_BYTES);
    }
}
