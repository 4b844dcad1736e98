//! Teams and the keys that act for them.

use belljar_daemon::clock;

use super::{Store, StoreError, corrupt, during, on_pool};
use crate::keys::{ApiKey, KeyHash, PREFIX};
use crate::team::{Team, TeamId};

/// How a key is known that nobody named.
const UNNAMED: &str = "default";

impl Store {
    /// The team called `slug`, made if there is none.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn ensure_team(&self, slug: &str) -> Result<Team, StoreError> {
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO teams (id, slug, name, created_at_ms) VALUES ($1, $2, $3, $4) \
                 ON CONFLICT (slug) DO NOTHING",
            )
            .bind(TeamId::random().to_string())
            .bind(slug)
            .bind(slug)
            .bind(clock::now().0)
            .execute(pool)
            .await
            .map_err(during("make a team"))?;
        });
        let id: String = on_pool!(self, pool => {
            sqlx::query_scalar("SELECT id FROM teams WHERE slug = $1")
                .bind(slug)
                .fetch_one(pool)
                .await
                .map_err(during("find a team"))?
        });
        let id = TeamId::parse(&id).ok_or_else(|| corrupt("a team id", &id))?;
        Ok(Team { id, slug: slug.to_owned() })
    }

    /// Whether there is a team `id`.
    pub(crate) async fn team_exists(&self, id: &TeamId) -> Result<bool, StoreError> {
        let found: Option<String> = on_pool!(self, pool => {
            sqlx::query_scalar("SELECT id FROM teams WHERE id = $1")
                .bind(id.to_string())
                .fetch_optional(pool)
                .await
                .map_err(during("look for a team"))?
        });
        Ok(found.is_some())
    }

    /// Lets `key` act for `team`. A key that is already there stays with its team.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn add_key(&self, team: &TeamId, key: &ApiKey) -> Result<(), StoreError> {
        let mask = key.mask();
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO api_keys (id, hash, team_id, name, prefix, value_length, \
                 masked_prefix, masked_suffix, created_at_ms) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9) ON CONFLICT (hash) DO NOTHING",
            )
            .bind(uuid::Uuid::new_v4().to_string())
            .bind(key.hash().as_str())
            .bind(team.to_string())
            .bind(UNNAMED)
            .bind(PREFIX)
            .bind(i64::try_from(mask.value_length).unwrap_or(i64::MAX))
            .bind(&mask.head)
            .bind(&mask.tail)
            .bind(clock::now().0)
            .execute(pool)
            .await
            .map_err(during("add an API key"))?;
        });
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
        let row: Option<(String, String)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT teams.id, teams.slug FROM api_keys \
                 JOIN teams ON teams.id = api_keys.team_id WHERE api_keys.hash = $1",
            )
            .bind(hash.as_str())
            .fetch_optional(pool)
            .await
            .map_err(during("find an API key"))?
        });
        row.map(|(id, slug)| {
            let id = TeamId::parse(&id).ok_or_else(|| corrupt("a team id", &id))?;
            Ok(Team { id, slug })
        })
        .transpose()
    }
}
