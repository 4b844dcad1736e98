//! What outlives the process: teams, keys, runs of sandboxes, events, usage.
//!
//! SQLite is the embedded default, PostgreSQL what several machines share; every function works on
//! both, and every test of one runs on both. Templates are not here: the node has them, and says so
//! at every reconcile.
//!
//! The database holds the seed of all sandbox tokens, so a file is made readable by its owner only.

mod credentials;
mod database;
mod deliveries;
mod events;
mod prune;
mod sandboxes;
mod snapshots;
mod teams;
#[cfg(test)]
pub(crate) mod testing;
mod tiers;
mod usage;
mod users;
mod webhooks;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use belljar_domain::Kind;
use tokio::sync::Notify;

use crate::token::TokenSeed;

pub(crate) use credentials::{CLI_KEY, CredentialRecord, Used};
pub use database::{Claim, Database, DatabaseError};
pub(crate) use database::{Pool, Tx, on_pool, on_tx};
pub(crate) use deliveries::{DeliveriesWanted, Delivery, Taken, Waiting};
pub(crate) use events::EventsWanted;
pub(crate) use sandboxes::{RunRow, Spawned};
pub(crate) use snapshots::{
    DEFAULT_TAG, SnapshotKey, SnapshotName, SnapshotRecord, SnapshotsWanted,
};
pub(crate) use teams::{TeamChange, TeamDraft, TeamError, TeamRecord};
pub(crate) use tiers::{TierError, TierRecord};
pub(crate) use usage::{UsagePeak, UsageSample, UsageStep};
pub(crate) use users::{Identity, MemberRecord, UserError, UserRecord};
pub(crate) use webhooks::{Webhook, WebhookChange, WebhookTerms};

const SEED_SETTING: &str = "envd_token_seed";

/// The store. Cheap to clone; all clones share one pool.
#[derive(Debug, Clone)]
pub struct Store {
    pool: Pool,
    /// Told when deliveries were written.
    due: Arc<Notify>,
}

/// Why the store did not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The file cannot be made or opened.
    #[error("create the database file {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The file is not a database, or the server not reachable.
    #[error("open the database {database}")]
    Open {
        /// Which.
        database: Database,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// The database is newer than this program, or damaged.
    #[error("bring the database {database} up to date")]
    Migrate {
        /// Which.
        database: Database,
        /// Why.
        #[source]
        source: sqlx::migrate::MigrateError,
    },
    /// A statement failed.
    #[error("{what} in the database")]
    Query {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// Another control plane works with the database.
    #[error("take the database: another control plane has it; stop that one, or name another")]
    InUse,
    /// A stored value is not what this program writes.
    #[error("read {what} from the database: {value:?} is not valid")]
    Corrupt {
        /// What was read.
        what: &'static str,
        /// What was found.
        value: String,
    },
}

impl StoreError {
    /// Whether what was to be written is at fault, so that trying it again changes nothing.
    pub(crate) fn is_of_the_data(&self) -> bool {
        let StoreError::Query { source: sqlx::Error::Database(e), .. } = self else { return false };
        // Class 22 of SQLSTATE: a value the database cannot hold.
        let unholdable = e.code().is_some_and(|code| code.len() == 5 && code.starts_with("22"));
        unholdable || !matches!(e.kind(), sqlx::error::ErrorKind::Other)
    }

    /// What a caller should do about it.
    pub fn kind(&self) -> Kind {
        match self {
            StoreError::InUse => Kind::Conflict,
            StoreError::File { .. } | StoreError::Open { .. } | StoreError::Query { .. } => {
                Kind::Unavailable
            }
            StoreError::Migrate { .. } | StoreError::Corrupt { .. } => Kind::Internal,
        }
    }
}

/// Names what a statement was for when it fails.
fn during(what: &'static str) -> impl FnOnce(sqlx::Error) -> StoreError {
    move |source| StoreError::Query { what, source }
}

fn corrupt(what: &'static str, value: &str) -> StoreError {
    StoreError::Corrupt { what, value: value.to_owned() }
}

impl Store {
    /// Opens the store in the file `path`; see [`Store::connect`].
    ///
    /// # Errors
    /// [`StoreError`] when the file cannot be made or opened, or was written by a newer version.
    pub async fn open(path: &Path) -> Result<Store, StoreError> {
        Store::connect(&Database::Sqlite(path.to_owned())).await
    }

    /// Opens the store, making its tables and bringing them up to date as needed.
    ///
    /// # Errors
    /// [`StoreError`] when the database cannot be made or reached, or was written by a newer version.
    pub async fn connect(database: &Database) -> Result<Store, StoreError> {
        Ok(Store { pool: Pool::open(database).await?, due: Arc::default() })
    }

    /// Keeps other control planes off the database for as long as the answer lives: two of them over
    /// different nodes would end each other's runs. Waits `patience` for one that is going.
    ///
    /// # Errors
    /// [`StoreError::InUse`] when another one has it; others when the database fails.
    pub async fn claim(&self, patience: Duration) -> Result<Claim, StoreError> {
        self.pool.claim(patience).await
    }

    /// Closes every connection and waits for it. Clones are unusable afterwards.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    pub(crate) fn pool(&self) -> &Pool {
        &self.pool
    }

    /// Told whenever this process has written something to deliver. Other processes may too.
    pub(crate) fn deliveries_due(&self) -> &Notify {
        &self.due
    }

    /// Begins a transaction that will write; `what` names it in errors.
    pub(crate) async fn begin(&self, what: &'static str) -> Result<Tx, StoreError> {
        self.pool.begin(what).await
    }

    /// The seed of all sandbox tokens, made at first use.
    pub(crate) async fn token_seed(&self) -> Result<TokenSeed, StoreError> {
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO settings (key, value) VALUES ($1, $2) ON CONFLICT (key) DO NOTHING",
            )
            .bind(SEED_SETTING)
            .bind(TokenSeed::random().to_stored())
            .execute(pool)
            .await
            .map_err(during("make the token seed"))?;
        });
        let text: String = on_pool!(self, pool => {
            sqlx::query_scalar("SELECT value FROM settings WHERE key = $1")
                .bind(SEED_SETTING)
                .fetch_one(pool)
                .await
                .map_err(during("read the token seed"))?
        });
        // The value is a secret even when it is damaged, so it is not repeated in the error.
        TokenSeed::from_stored(&text).ok_or_else(|| corrupt("the token seed", "***"))
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{Bench, on_both};
    use super::*;
    use crate::keys::ApiKey;
    use std::os::unix::fs::PermissionsExt as _;

    #[tokio::test]
    async fn teams_keys_and_the_seed_survive_reopening() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team");
            let key = ApiKey::random();
            assert!(!store.has_key(&key).await.expect("a lookup"));
            store.add_key(&team.id, &key).await.expect("a key");
            store.add_key(&team.id, &key).await.expect("the same key again");
            let seed = store.token_seed().await.expect("a seed").to_stored();
            store.close().await;

            let store = bench.store().await;
            assert_eq!(store.ensure_team("default").await.expect("the team"), team);
            let found = store.team_of_key(&key.hash()).await.expect("a lookup");
            assert_eq!(found.map(|(_, team)| team), Some(team));
            assert!(!store.has_key(&ApiKey::random()).await.expect("a lookup"));
            assert_eq!(store.token_seed().await.expect("the seed").to_stored(), seed);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_shared_database_has_one_control_plane() {
        let Some(bench) = Bench::postgres() else { return };
        let (store, other) = (bench.store().await, bench.store().await);
        let claim = store.claim(Duration::ZERO).await.expect("nobody has it");
        let refused = other.claim(Duration::ZERO).await.expect_err("it is taken");
        assert!(matches!(refused, StoreError::InUse), "{refused:?}");
        drop(claim);
        let claim = other.claim(Duration::from_secs(20)).await.expect("it is free again");
        drop(claim);
        store.close().await;
        other.close().await;
    }

    #[tokio::test]
    async fn only_the_owner_can_read_the_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&dir.path().join("control.db")).await.expect("a new store");
        for entry in dir.path().read_dir().expect("the folder") {
            let entry = entry.expect("an entry");
            let mode = entry.metadata().expect("its metadata").permissions().mode();
            assert_eq!(mode & 0o077, 0, "{:?} is open to others", entry.file_name());
        }
        store.close().await;
    }

    #[tokio::test]
    async fn what_is_no_database_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("control.db");
        std::fs::write(&path, vec![7; 8192]).expect("a file");
        assert!(matches!(Store::open(&path).await, Err(StoreError::Open { .. })));
        let missing = dir.path().join("no/such/folder/control.db");
        assert!(matches!(Store::open(&missing).await, Err(StoreError::File { .. })));
        let nobody = "postgres://ann:hunter2@127.0.0.1:1/x".parse().expect("an address");
        let error = Store::connect(&nobody).await.expect_err("nobody listens there");
        assert!(matches!(error, StoreError::Open { .. }), "{error:?}");
        assert!(!format!("{error:?}").contains("hunter2"), "{error:?}");
    }
}
