//! What outlives the process: teams, keys and every run of a sandbox, in SQLite.
//!
//! Templates are not here: the node has them, and says so at every reconcile.
//!
//! The file holds the seed of all sandbox tokens, so it is made readable by its owner only.

mod sandboxes;

use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use belljar_daemon::clock;
use belljar_domain::Kind;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};

use crate::keys::{ApiKey, KeyHash, PREFIX};
use crate::team::{Team, TeamId};
use crate::token::TokenSeed;

pub(crate) use sandboxes::{RunRow, Spawned};

static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

/// Readers may run beside the one writer; more connections than this only wait for each other.
const MAX_CONNECTIONS: u32 = 4;
/// How long a statement waits for another process that holds the file, and a caller for a connection.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
const SEED_SETTING: &str = "envd_token_seed";

/// The store. Cheap to clone; all clones share one pool.
#[derive(Debug, Clone)]
pub struct Store {
    pool: SqlitePool,
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
    /// The file is not a database, or not reachable.
    #[error("open the database {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: sqlx::Error,
    },
    /// The database is newer than this program, or damaged.
    #[error("bring the database {} up to date", path.display())]
    Migrate {
        /// The file.
        path: PathBuf,
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
    /// What a caller should do about it.
    pub fn kind(&self) -> Kind {
        match self {
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
    /// Opens the store at `path`, making it and bringing it up to date as needed.
    ///
    /// # Errors
    /// [`StoreError`] when the file cannot be made or opened, or was written by a newer version.
    pub async fn open(path: &Path) -> Result<Store, StoreError> {
        create_private(path)?;
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            // The log is synced at checkpoints: a power cut may lose the last rows, which the
            // reconciler rewrites, and never the database.
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(BUSY_TIMEOUT)
            .foreign_keys(true);
        let pool = SqlitePoolOptions::new()
            .max_connections(MAX_CONNECTIONS)
            .acquire_timeout(BUSY_TIMEOUT)
            .connect_with(options)
            .await
            .map_err(|source| StoreError::Open { path: path.to_owned(), source })?;
        MIGRATIONS
            .run(&pool)
            .await
            .map_err(|source| StoreError::Migrate { path: path.to_owned(), source })?;
        Ok(Store { pool })
    }

    /// Closes every connection and waits for it. Clones are unusable afterwards.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// The team called `slug`, made if there is none.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn ensure_team(&self, slug: &str) -> Result<Team, StoreError> {
        sqlx::query(
            "INSERT INTO teams (id, slug, created_at_ms) VALUES (?, ?, ?) \
             ON CONFLICT (slug) DO NOTHING",
        )
        .bind(TeamId::random().to_string())
        .bind(slug)
        .bind(clock::now().0)
        .execute(&self.pool)
        .await
        .map_err(during("make a team"))?;
        let id: String = sqlx::query_scalar("SELECT id FROM teams WHERE slug = ?")
            .bind(slug)
            .fetch_one(&self.pool)
            .await
            .map_err(during("find a team"))?;
        let id = TeamId::parse(&id).ok_or_else(|| corrupt("a team id", &id))?;
        Ok(Team { id, slug: slug.to_owned() })
    }

    /// Lets `key` act for `team`. A key that is already there stays with its team.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn add_key(&self, team: &TeamId, key: &ApiKey) -> Result<(), StoreError> {
        let mask = key.mask();
        sqlx::query(
            "INSERT INTO api_keys (hash, team_id, prefix, value_length, masked_prefix, \
             masked_suffix, created_at_ms) VALUES (?, ?, ?, ?, ?, ?, ?) \
             ON CONFLICT (hash) DO NOTHING",
        )
        .bind(key.hash().as_str())
        .bind(team.to_string())
        .bind(PREFIX)
        .bind(i64::try_from(mask.value_length).unwrap_or(i64::MAX))
        .bind(mask.head)
        .bind(mask.tail)
        .bind(clock::now().0)
        .execute(&self.pool)
        .await
        .map_err(during("add an API key"))?;
        Ok(())
    }

    /// Whether `key` opens anything.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn has_key(&self, key: &ApiKey) -> Result<bool, StoreError> {
        Ok(self.team_of_key(&key.hash()).await?.is_some())
    }

    /// The team a key acts for.
    pub(crate) async fn team_of_key(&self, hash: &KeyHash) -> Result<Option<Team>, StoreError> {
        let row: Option<(String, String)> = sqlx::query_as(
            "SELECT teams.id, teams.slug FROM api_keys JOIN teams ON teams.id = api_keys.team_id \
             WHERE api_keys.hash = ?",
        )
        .bind(hash.as_str())
        .fetch_optional(&self.pool)
        .await
        .map_err(during("find an API key"))?;
        row.map(|(id, slug)| {
            let id = TeamId::parse(&id).ok_or_else(|| corrupt("a team id", &id))?;
            Ok(Team { id, slug })
        })
        .transpose()
    }

    /// The seed of all sandbox tokens, made at first use.
    pub(crate) async fn token_seed(&self) -> Result<TokenSeed, StoreError> {
        sqlx::query("INSERT INTO settings (key, value) VALUES (?, ?) ON CONFLICT (key) DO NOTHING")
            .bind(SEED_SETTING)
            .bind(TokenSeed::random().to_stored())
            .execute(&self.pool)
            .await
            .map_err(during("make the token seed"))?;
        let text: String = sqlx::query_scalar("SELECT value FROM settings WHERE key = ?")
            .bind(SEED_SETTING)
            .fetch_one(&self.pool)
            .await
            .map_err(during("read the token seed"))?;
        // The value is a secret even when it is damaged, so it is not repeated in the error.
        TokenSeed::from_stored(&text).ok_or_else(|| corrupt("the token seed", "***"))
    }
}

/// Makes `path` readable by its owner only; SQLite gives its side files the same mode.
fn create_private(path: &Path) -> Result<(), StoreError> {
    std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map(drop)
        .map_err(|source| StoreError::File { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    async fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(&dir.path().join("control.db")).await.expect("a new store");
        (dir, store)
    }

    #[tokio::test]
    async fn teams_keys_and_the_seed_survive_reopening() {
        let (dir, store) = store().await;
        let team = store.ensure_team("default").await.expect("a team");
        let key = ApiKey::random();
        assert!(!store.has_key(&key).await.expect("a lookup"));
        store.add_key(&team.id, &key).await.expect("a key");
        store.add_key(&team.id, &key).await.expect("the same key again");
        let seed = store.token_seed().await.expect("a seed").to_stored();
        store.close().await;

        let store = Store::open(&dir.path().join("control.db")).await.expect("the same store");
        assert_eq!(store.ensure_team("default").await.expect("the team"), team);
        assert_eq!(store.team_of_key(&key.hash()).await.expect("a lookup"), Some(team));
        assert!(!store.has_key(&ApiKey::random()).await.expect("a lookup"));
        assert_eq!(store.token_seed().await.expect("the seed").to_stored(), seed);
        store.close().await;
    }

    #[tokio::test]
    async fn only_the_owner_can_read_the_file() {
        let (dir, store) = store().await;
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
    }
}
