//! Which database the store lives in, and how it is opened: a SQLite file, or PostgreSQL.
//!
//! One SQL text serves both. [`on_pool!`] and [`on_tx!`] run the same lines for either: the driver's
//! types are generic, and only a macro can write one body for two of them without a trait for every
//! statement. `$1` names a parameter in both dialects; what differs lives in the migrations.

use std::fmt;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use belljar_domain::Secret;
use sqlx::migrate::Migrator;
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous,
};
use sqlx::{Connection as _, Postgres, Sqlite, Transaction};
use tokio::time::Instant;

use super::{StoreError, during};

static SQLITE_MIGRATIONS: Migrator = sqlx::migrate!("./migrations/sqlite");
static POSTGRES_MIGRATIONS: Migrator = sqlx::migrate!("./migrations/postgres");

/// Readers of the file may run beside its one writer; more connections only wait for each other.
const SQLITE_CONNECTIONS: u32 = 4;
/// Connections to PostgreSQL, of the 100 it offers by default.
const POSTGRES_CONNECTIONS: u32 = 16;
/// How long a statement waits for another process that holds the file, and a caller for a connection.
const BUSY_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest a statement may run on PostgreSQL, in its own spelling; none here reads much.
const POSTGRES_STATEMENT_TIMEOUT: (&str, &str) = ("statement_timeout", "30s");

/// The advisory lock of the one control plane; any number nobody else uses.
const CLAIM_LOCK: i64 = 0x0062_656c_6c6a_6172;
const CLAIM_RETRY: Duration = Duration::from_millis(100);

/// Runs one body with the pool of whichever database it is.
macro_rules! on_pool {
    ($store:expr, $pool:ident => $body:expr) => {
        match $store.pool() {
            $crate::store::database::Pool::Sqlite($pool) => $body,
            $crate::store::database::Pool::Postgres($pool) => $body,
        }
    };
}

/// Runs one body with the connection of an open transaction of whichever database it is.
macro_rules! on_tx {
    ($tx:expr, $connection:ident => $body:expr) => {
        match $tx {
            $crate::store::database::Tx::Sqlite(tx) => {
                let $connection = &mut **tx;
                $body
            }
            $crate::store::database::Tx::Postgres(tx) => {
                let $connection = &mut **tx;
                $body
            }
        }
    };
}

pub(crate) use {on_pool, on_tx};

/// Where the store lives.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// A file, made when it is not there.
    Sqlite(PathBuf),
    /// `postgres://user:password@host:port/name`, with sqlx's options after a `?`.
    Postgres(Secret<String>),
}

/// The text names no database.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("read a database address: it must be postgres://…, sqlite:PATH or a path")]
pub struct DatabaseError;

impl FromStr for Database {
    type Err = DatabaseError;

    fn from_str(text: &str) -> Result<Self, DatabaseError> {
        if text.starts_with("postgres://") || text.starts_with("postgresql://") {
            return Ok(Database::Postgres(Secret::new(text.to_owned())));
        }
        let path = text.strip_prefix("sqlite:").unwrap_or(text);
        let path = path.strip_prefix("//").unwrap_or(path);
        let is_url = path.contains("://") || path.is_empty();
        if is_url { Err(DatabaseError) } else { Ok(Database::Sqlite(path.into())) }
    }
}

/// Names it without what opens it.
impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Database::Sqlite(path) => path.display().fmt(f),
            Database::Postgres(url) => match url.expose().parse::<PgConnectOptions>() {
                Ok(options) => write!(
                    f,
                    "postgres://{}:{}/{}",
                    options.get_host(),
                    options.get_port(),
                    options.get_database().unwrap_or_default()
                ),
                Err(_) => f.write_str("postgres://…"),
            },
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Open connections. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) enum Pool {
    Sqlite(SqlitePool),
    Postgres(PgPool),
}

/// The place of the one control plane of a database, for as long as it lives.
#[derive(Debug)]
pub struct Claim {
    /// PostgreSQL gives the lock back with the connection, however the process ends.
    _held: Option<PgConnection>,
}

/// An open transaction. Dropping it undoes what was written.
#[derive(Debug)]
pub(crate) enum Tx {
    Sqlite(Transaction<'static, Sqlite>),
    Postgres(Transaction<'static, Postgres>),
}

impl Pool {
    /// Connects and brings the tables up to date.
    pub(super) async fn open(database: &Database) -> Result<Pool, StoreError> {
        let pool = Pool::connect(database).await?;
        let migrated = match &pool {
            Pool::Sqlite(pool) => SQLITE_MIGRATIONS.run(pool).await,
            Pool::Postgres(pool) => POSTGRES_MIGRATIONS.run(pool).await,
        };
        migrated.map_err(|source| StoreError::Migrate { database: database.clone(), source })?;
        Ok(pool)
    }

    /// Connects, whatever tables there are.
    pub(super) async fn connect(database: &Database) -> Result<Pool, StoreError> {
        let failed = |source| StoreError::Open { database: database.clone(), source };
        match database {
            Database::Sqlite(path) => {
                create_private(path)?;
                sqlite(path).await.map(Pool::Sqlite).map_err(failed)
            }
            Database::Postgres(url) => {
                postgres(url.expose()).await.map(Pool::Postgres).map_err(failed)
            }
        }
    }

    /// Begins a transaction that will write.
    pub(super) async fn begin(&self, what: &'static str) -> Result<Tx, StoreError> {
        match self {
            // The write lock is taken now: one that has read first cannot wait for it later.
            Pool::Sqlite(pool) => pool.begin_with("BEGIN IMMEDIATE").await.map(Tx::Sqlite),
            Pool::Postgres(pool) => pool.begin().await.map(Tx::Postgres),
        }
        .map_err(during(what))
    }

    /// Takes the place of the one control plane of a PostgreSQL database, waiting `patience` for the
    /// connection of one that has just died. A file has the lock of its data folder instead.
    pub(super) async fn claim(&self, patience: Duration) -> Result<Claim, StoreError> {
        const WHAT: &str = "look for another control plane";
        let Pool::Postgres(pool) = self else { return Ok(Claim { _held: None }) };
        let mut connection = pool.acquire().await.map_err(during(WHAT))?.detach();
        let deadline = Instant::now() + patience;
        loop {
            let is_ours: bool = sqlx::query_scalar("SELECT pg_try_advisory_lock($1)")
                .bind(CLAIM_LOCK)
                .fetch_one(&mut connection)
                .await
                .map_err(during(WHAT))?;
            if is_ours {
                return Ok(Claim { _held: Some(connection) });
            }
            if Instant::now() > deadline {
                return Err(StoreError::InUse);
            }
            tokio::time::sleep(CLAIM_RETRY).await;
        }
    }

    pub(super) async fn close(&self) {
        match self {
            Pool::Sqlite(pool) => pool.close().await,
            Pool::Postgres(pool) => pool.close().await,
        }
    }
}

impl Tx {
    /// Makes what was written last.
    pub(super) async fn commit(self, what: &'static str) -> Result<(), StoreError> {
        match self {
            Tx::Sqlite(tx) => tx.commit().await,
            Tx::Postgres(tx) => tx.commit().await,
        }
        .map_err(during(what))
    }
}

async fn sqlite(path: &Path) -> Result<SqlitePool, sqlx::Error> {
    let options = SqliteConnectOptions::new()
        .filename(path)
        .journal_mode(SqliteJournalMode::Wal)
        // The log is synced at checkpoints: a power cut may lose the last rows, which the
        // reconciler rewrites, and never the database.
        .synchronous(SqliteSynchronous::Normal)
        .busy_timeout(BUSY_TIMEOUT)
        .foreign_keys(true);
    let pool = SqlitePoolOptions::new()
        .max_connections(SQLITE_CONNECTIONS)
        .acquire_timeout(BUSY_TIMEOUT)
        // A commit that fails for want of room has undone itself, and the driver goes on counting
        // the transaction as open: such a connection would refuse every later one.
        .before_acquire(|connection, _| {
            let usable = !connection.is_in_transaction();
            Box::pin(async move { Ok(usable) })
        });
    pool.connect_with(options).await
}

async fn postgres(url: &str) -> Result<PgPool, sqlx::Error> {
    let options: PgConnectOptions = url.parse()?;
    let options = options.application_name("belljar").options([POSTGRES_STATEMENT_TIMEOUT]);
    let pool =
        PgPoolOptions::new().max_connections(POSTGRES_CONNECTIONS).acquire_timeout(BUSY_TIMEOUT);
    pool.connect_with(options).await
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
    use super::super::testing::{Bench, on_both};
    use super::*;
    use crate::keys::ApiKey;
    use crate::team::TeamId;

    /// Every migration but those after `version`.
    fn up_to(migrator: &Migrator, version: i64) -> Migrator {
        let kept = migrator.iter().filter(|m| m.version <= version).cloned().collect::<Vec<_>>();
        Migrator { migrations: kept.into(), ..Migrator::DEFAULT }
    }

    /// Tables and columns, as `table.column`, sorted.
    async fn columns(bench: &Bench) -> Vec<String> {
        let store = bench.store().await;
        let found: Vec<(String,)> = match store.pool() {
            Pool::Sqlite(pool) => {
                sqlx::query_as(
                    "SELECT t.name || '.' || c.name FROM sqlite_master t, \
                     pragma_table_info(t.name) c WHERE t.type = 'table' \
                     AND t.name NOT LIKE 'sqlite_%' AND t.name NOT LIKE '_sqlx%'",
                )
                .fetch_all(pool)
                .await
            }
            Pool::Postgres(pool) => {
                sqlx::query_as(
                    "SELECT table_name || '.' || column_name FROM information_schema.columns \
                     WHERE table_schema = 'public' AND table_name NOT LIKE '\\_sqlx%'",
                )
                .fetch_all(pool)
                .await
            }
        }
        .expect("the catalogue");
        store.close().await;
        let mut names: Vec<String> = found.into_iter().map(|(name,)| name).collect();
        names.sort();
        names
    }

    #[tokio::test]
    async fn both_databases_have_the_same_tables() {
        let sqlite = columns(&Bench::sqlite()).await;
        assert!(sqlite.contains(&"sandboxes.execution_id".to_owned()), "{sqlite:?}");
        if let Some(bench) = Bench::postgres() {
            assert_eq!(columns(&bench).await, sqlite);
        }
    }

    #[tokio::test]
    async fn a_store_of_the_first_generation_is_brought_forward() {
        on_both(async |bench: Bench| {
            let (key, team) = (ApiKey::random(), TeamId::random().to_string());
            let pool = bench.bare_pool().await;
            match &pool {
                Pool::Sqlite(pool) => up_to(&SQLITE_MIGRATIONS, 1).run(pool).await,
                Pool::Postgres(pool) => up_to(&POSTGRES_MIGRATIONS, 1).run(pool).await,
            }
            .expect("the first generation");
            for (sql, first, second) in [
                ("INSERT INTO teams VALUES ($1, $2, 1)", team.as_str(), "default"),
                (
                    "INSERT INTO api_keys VALUES ($1, $2, 'e2b_', 40, 'ab', 'cdef', 1)",
                    key.hash().as_str(),
                    team.as_str(),
                ),
                (
                    "INSERT INTO sandboxes (execution_id, sandbox_id, team_id, template_id, \
                     build_id, metadata, secure, allow_internet, started_at_ms, end_at_ms) \
                     VALUES ('e', $1, $2, 't', 'b', '{}', TRUE, TRUE, 1, 2)",
                    "i1",
                    team.as_str(),
                ),
            ] {
                let written = match &pool {
                    Pool::Sqlite(pool) => {
                        sqlx::query(sql).bind(first).bind(second).execute(pool).await.map(drop)
                    }
                    Pool::Postgres(pool) => {
                        sqlx::query(sql).bind(first).bind(second).execute(pool).await.map(drop)
                    }
                };
                written.expect(sql);
            }
            pool.close().await;

            let store = bench.store().await;
            let found = store.team_of_key(&key.hash()).await.expect("a lookup");
            assert_eq!(found.map(|(_, team)| team.id.to_string()), Some(team));
            let (id, name): (String, String) = on_pool!(store, pool => {
                sqlx::query_as("SELECT id, name FROM api_keys").fetch_one(pool).await.expect("a key")
            });
            assert!(uuid::Uuid::try_parse(&id).is_ok(), "{id:?} is no UUID");
            assert_eq!(name, "default");
            assert_eq!(store.spawned().await.expect("counts")["t"].count, 1);
            store.close().await;
        })
        .await;
    }

    #[test]
    fn addresses_are_told_apart() {
        let file = |path: &str| Ok(Database::Sqlite(path.into()));
        assert_eq!("control.db".parse(), file("control.db"));
        assert_eq!("/a b/control.db".parse(), file("/a b/control.db"));
        assert_eq!("sqlite:/a/b".parse(), file("/a/b"));
        assert_eq!("sqlite:///a/b".parse(), file("/a/b"));
        for text in ["", "sqlite:", "mysql://x", "http://x"] {
            assert_eq!(text.parse::<Database>(), Err(DatabaseError), "{text:?}");
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let text = "postgres://ann:hunter2@db.internal:5433/bell?sslmode=require";
        let database: Database = text.parse().expect("an address");
        assert_eq!(database.to_string(), "postgres://db.internal:5433/bell");
        assert!(!format!("{database:?}").contains("hunter2"));
        let odd: Database = "postgres://hunter2:x:y".parse().expect("an address");
        assert!(!odd.to_string().contains("hunter2"), "{odd}");
    }
}
