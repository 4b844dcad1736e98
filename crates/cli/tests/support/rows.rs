//! What a server's store says, read beside the server or after its end.
#![allow(dead_code, unreachable_pub, reason = "each test program uses its own part of this file")]

use std::path::Path;
use std::time::Duration;

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

/// Every run in the SQLite store of this data folder, oldest first.
pub fn runs(data: &Path) -> Vec<Run> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.expect("a runtime").block_on(async {
        let options = SqliteConnectOptions::new()
            .filename(data.join("belljar.db"))
            .busy_timeout(Duration::from_secs(10));
        let mut database = options.connect().await.expect("the database opens");
        let rows = sqlx::query(
            "SELECT sandbox_id, end_at_ms, ended_at_ms, end_reason FROM sandboxes \
             ORDER BY started_at_ms",
        )
        .fetch_all(&mut database)
        .await
        .expect("the runs are read");
        let run = |row: &sqlx::sqlite::SqliteRow| Run {
            sandbox: row.get("sandbox_id"),
            end_at_ms: row.get("end_at_ms"),
            ended: row.get::<Option<i64>, _>("ended_at_ms").map(|_| {
                row.get::<Option<String>, _>("end_reason").expect("an ended run says why")
            }),
        };
        rows.iter().map(run).collect()
    })
}
