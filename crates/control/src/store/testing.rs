//! Every test of the store runs on both databases.

use std::sync::Arc;

use belljar_testkit::postgres::Postgres;
use tempfile::TempDir;

use super::{Database, Pool, Store};

/// An empty database for one test.
pub(crate) struct Bench {
    database: Database,
    _home: Home,
}

enum Home {
    Sqlite(#[expect(dead_code, reason = "held for its end")] TempDir),
    Postgres(#[expect(dead_code, reason = "held for its end")] Arc<Postgres>),
}

impl Bench {
    pub(crate) fn sqlite() -> Bench {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let database = Database::Sqlite(dir.path().join("control.db"));
        Bench { database, _home: Home::Sqlite(dir) }
    }

    /// `None`, after a loud skip, where PostgreSQL is not installed.
    pub(crate) fn postgres() -> Option<Bench> {
        let server = Postgres::shared()?;
        let database = server.database().parse().expect("its address");
        Some(Bench { database, _home: Home::Postgres(server) })
    }

    /// Opens the store; again and again, it is the same one.
    pub(crate) async fn store(&self) -> Store {
        Store::connect(&self.database).await.expect("the store")
    }

    /// The database as it is, without tables at first.
    pub(crate) async fn bare_pool(&self) -> Pool {
        Pool::connect(&self.database).await.expect("the database")
    }
}

/// Runs a test on SQLite, then on PostgreSQL.
pub(crate) async fn on_both(test: impl AsyncFn(Bench)) {
    test(Bench::sqlite()).await;
    if let Some(bench) = Bench::postgres() {
        test(bench).await;
    }
}
