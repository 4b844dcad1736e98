//! Keeping the store small: runs that ended long ago are removed, a few at a time.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::UnixMillis;
use tokio::time::MissedTickBehavior;
use tracing::{debug, warn};

use crate::app::App;

const INTERVAL: Duration = Duration::from_secs(3600);
/// Runs removed in one transaction: few enough that writers hardly wait.
const BATCH: u32 = 500;

/// Prunes now and every hour, until dropped.
pub(crate) async fn run(app: Arc<App>) -> Result<(), Infallible> {
    let mut due = tokio::time::interval(INTERVAL);
    due.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        due.tick().await;
        let kept_ms = i64::try_from(app.config.runs_kept.as_millis()).unwrap_or(i64::MAX);
        let before = UnixMillis(clock::now().0.saturating_sub(kept_ms));
        loop {
            match app.store.prune_runs(before, BATCH).await {
                Ok(0) => break,
                Ok(removed) => debug!(removed, "removed runs that ended long ago"),
                Err(e) => {
                    warn!(error = %e, "old runs were not removed; the next hour tries again");
                    break;
                }
            }
        }
    }
}
