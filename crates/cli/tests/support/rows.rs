//! What a server's store says, read beside the server or after its end.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part of this file")]

use std::path::Path;
use std::time::Duration;

use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{ConnectOptions as _, Row as _};

/// One run of a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub sandbox: String,
    /// When it is to end, Unix milliseconds.
    pub end_at_ms: i64,
    /// Why it ended; `None` while it runs.
    pub ended: Option<String>,
}

const SELECT: &str = "SELECT sandbox_id, end_at_ms, ended_at_ms, end_reason FROM sandboxes \
                      ORDER BY started_at_ms";

/// Every run in the SQLite store of this data folder, oldest first.
pub fn runs(data: &Path) -> Vec<Run> {
    let options = SqliteConnectOptions::new()
        .filename(data.join("belljar.db"))
        .busy_timeout(Duration::from_secs(10));
    wait_for(async {
        let mut database = options.connect().await.expect("the database opens");
        sqlx::query(SELECT)
            .map(|row: sqlx::sqlite::SqliteRow| Run {
                sandbox: row.get("sandbox_id"),
                end_at_ms: row.get("end_at_ms"),
                ended: why(row.get("ended_at_ms"), row.get("end_reason")),
            })
            .fetch_all(&mut database)
            .await
            .expect("the runs are read")
    })
}

/// The same of a PostgreSQL store.
pub fn runs_on_postgresql(address: &str) -> Vec<Run> {
    let options: PgConnectOptions = address.parse().expect("an address");
    wait_for(async {
        let mut database = options.connect().await.expect("the database answers");
        sqlx::query(SELECT)
            .map(|row: sqlx::postgres::PgRow| Run {
                sandbox: row.get("sandbox_id"),
                end_at_ms: row.get("end_at_ms"),
                ended: why(row.get("ended_at_ms"), row.get("end_reason")),
            })
            .fetch_all(&mut database)
            .await
            .expect("the runs are read")
    })
}

fn why(ended_at_ms: Option<i64>, reason: Option<String>) -> Option<String> {
    ended_at_ms.map(|_| reason.expect("an ended run says why"))
}

fn wait_for<T>(work: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(work)
}
