//! Every test of the store runs on both databases.

use std::sync::Arc;

use belljar_daemon::clock;
use belljar_domain::Secret;
use belljar_testkit::postgres::Postgres;
use belljar_wire::rest::EventType;
use tempfile::TempDir;

use super::events::Recorder;
use super::{Database, Pool, Store, Webhook, WebhookTerms, on_pool};
use crate::event::Event;
use crate::team::TeamId;

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

impl Store {
    /// Sets what differs from a team's tier.
    pub(crate) async fn set_limits_text(&self, team: &TeamId, limits: &str) {
        let done = on_pool!(self, pool => {
            sqlx::query("UPDATE teams SET limits = $1 WHERE id = $2")
                .bind(limits)
                .bind(team.to_string())
                .execute(pool)
                .await
                .map(|done| done.rows_affected())
        });
        assert_eq!(done.expect("the team's row"), 1);
    }

    /// Runs a statement that both databases understand.
    pub(crate) async fn run(&self, statement: &'static str) {
        let done = on_pool!(self, pool => sqlx::query(statement).execute(pool).await.map(drop));
        done.expect("a statement");
    }

    /// Writes one event in a transaction of its own.
    pub(crate) async fn record(&self, event: &Event) {
        let mut tx = self.begin("begin").await.expect("a transaction");
        let mut recorder = Recorder::default();
        recorder.record(&mut tx, event).await.expect("an event");
        tx.commit("commit").await.expect("it is written");
    }

    /// A webhook of `team` that wants everything; its id.
    pub(crate) async fn a_webhook(&self, team: &TeamId) -> String {
        let webhook = Webhook {
            id: uuid::Uuid::new_v4().to_string(),
            team: team.clone(),
            terms: WebhookTerms {
                name: "hook".to_owned(),
                url: "https://example.com/hook".to_owned(),
                enabled: true,
                kinds: EventType::ALL.to_vec(),
                secret: Secret::new("0123456789abcdef".to_owned()),
            },
            created_at: clock::now(),
        };
        assert!(self.add_webhook(&webhook, 100).await.expect("a webhook"));
        webhook.id
    }
}
