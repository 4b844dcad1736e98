//! API keys and access tokens: whose they are, how they are shown, when they were used.

use belljar_daemon::clock;
use belljar_domain::UnixMillis;

use super::teams::{StoredTeam, TeamRecord, team_columns};
use super::{Store, StoreError, corrupt, during, on_pool, on_tx};
use crate::keys::{AccessToken, ApiKey, KeyHash, KeyMask};
use crate::team::{CredentialId, Team, TeamId, UserId};

/// How a key is known that nobody named.
const UNNAMED: &str = "default";
/// How keys are known that a user's command line was given. They end with the membership, while
/// keys made by name stay with the team.
pub(crate) const CLI_KEY: &str = "E2B CLI";

/// A key or token as it is shown: everything but itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CredentialRecord {
    pub(crate) id: CredentialId,
    pub(crate) name: String,
    pub(crate) mask: KeyMask,
    pub(crate) created_at: UnixMillis,
    /// Who made it and their address; `None` for tokens, and for keys of the operator.
    pub(crate) created_by: Option<(UserId, String)>,
    pub(crate) last_used: Option<UnixMillis>,
}

/// A credential that was used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Used {
    Key(CredentialId),
    Token(CredentialId),
}

/// The columns both tables have.
#[derive(sqlx::FromRow)]
struct Stored {
    id: String,
    name: String,
    prefix: String,
    value_length: i64,
    masked_prefix: String,
    masked_suffix: String,
    created_at_ms: i64,
    last_used_ms: Option<i64>,
    created_by: Option<String>,
    email: Option<String>,
}

impl TryFrom<Stored> for CredentialRecord {
    type Error = StoreError;

    fn try_from(row: Stored) -> Result<Self, StoreError> {
        let created_by = match (row.created_by, row.email) {
            (Some(id), Some(email)) => {
                Some((UserId::parse(&id).ok_or_else(|| corrupt("a user id", &id))?, email))
            }
            _ => None,
        };
        Ok(CredentialRecord {
            id: credential_id(&row.id)?,
            name: row.name,
            mask: KeyMask {
                prefix: row.prefix,
                value_length: u32::try_from(row.value_length)
                    .map_err(|_| corrupt("a key's length", &row.value_length.to_string()))?,
                head: row.masked_prefix,
                tail: row.masked_suffix,
            },
            created_at: UnixMillis(row.created_at_ms),
            created_by,
            last_used: row.last_used_ms.map(UnixMillis),
        })
    }
}

fn credential_id(text: &str) -> Result<CredentialId, StoreError> {
    CredentialId::parse(text).ok_or_else(|| corrupt("a key's id", text))
}

/// A key with its team.
#[derive(sqlx::FromRow)]
struct StoredKeyTeam {
    key_id: String,
    #[sqlx(flatten)]
    team: StoredTeam,
}

impl Store {
    /// Lets `key` act for `team`. A key that is already there stays with its team.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn add_key(&self, team: &TeamId, key: &ApiKey) -> Result<(), StoreError> {
        self.insert_key(team, key, UNNAMED, None).await.map(drop)
    }

    /// Whether `key` opens anything.
    ///
    /// # Errors
    /// [`StoreError`] when the database fails.
    pub async fn has_key(&self, key: &ApiKey) -> Result<bool, StoreError> {
        Ok(self.team_of_key(&key.hash()).await?.is_some())
    }

    /// Lets `key` act for `team`, and says how it is shown.
    pub(crate) async fn insert_key(
        &self,
        team: &TeamId,
        key: &ApiKey,
        name: &str,
        created_by: Option<&UserId>,
    ) -> Result<CredentialRecord, StoreError> {
        let (id, mask, created_at) = (CredentialId::random(), key.mask(), clock::now());
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO api_keys (id, hash, team_id, name, prefix, value_length, \
                 masked_prefix, masked_suffix, created_by, created_at_ms) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) ON CONFLICT (hash) DO NOTHING",
            )
            .bind(id.to_string())
            .bind(key.hash().as_str())
            .bind(team.to_string())
            .bind(name)
            .bind(&mask.prefix)
            .bind(i64::from(mask.value_length))
            .bind(&mask.head)
            .bind(&mask.tail)
            .bind(created_by.map(UserId::to_string))
            .bind(created_at.0)
            .execute(pool)
            .await
            .map_err(during("add an API key"))?;
        });
        let created_by = match created_by {
            Some(user) => self.user(user).await?.map(|found| (found.id, found.email)),
            None => None,
        };
        let name = name.to_owned();
        Ok(CredentialRecord { id, name, mask, created_at, created_by, last_used: None })
    }

    /// The keys of a team, oldest first.
    pub(crate) async fn keys_of(&self, team: &TeamId) -> Result<Vec<CredentialRecord>, StoreError> {
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT k.id, k.name, k.prefix, k.value_length, k.masked_prefix, k.masked_suffix, \
                 k.created_at_ms, k.last_used_ms, k.created_by, users.email \
                 FROM api_keys k LEFT JOIN users ON users.id = k.created_by \
                 WHERE k.team_id = $1 ORDER BY k.created_at_ms, k.id",
            )
            .bind(team.to_string())
            .fetch_all(pool)
            .await
            .map_err(during("list API keys"))?
        });
        rows.into_iter().map(CredentialRecord::try_from).collect()
    }

    /// Gives a key another name; `None` when the team has no such key.
    pub(crate) async fn rename_key(
        &self,
        team: &TeamId,
        id: &CredentialId,
        name: &str,
    ) -> Result<Option<CredentialRecord>, StoreError> {
        on_pool!(self, pool => {
            sqlx::query("UPDATE api_keys SET name = $3 WHERE team_id = $1 AND id = $2")
                .bind(team.to_string())
                .bind(id.to_string())
                .bind(name)
                .execute(pool)
                .await
                .map_err(during("rename an API key"))?;
        });
        Ok(self.keys_of(team).await?.into_iter().find(|key| key.id == *id))
    }

    /// Removes a key; false when the team has no such key.
    pub(crate) async fn delete_key(
        &self,
        team: &TeamId,
        id: &CredentialId,
    ) -> Result<bool, StoreError> {
        let removed = on_pool!(self, pool => {
            sqlx::query("DELETE FROM api_keys WHERE team_id = $1 AND id = $2")
                .bind(team.to_string())
                .bind(id.to_string())
                .execute(pool)
                .await
                .map_err(during("remove an API key"))?
                .rows_affected()
        });
        Ok(removed > 0)
    }

    /// Of the keys `user`'s command line was given for `team`, keeps the `keep` newest; answers how
    /// many went.
    pub(crate) async fn keep_newest_keys(
        &self,
        team: &TeamId,
        user: &UserId,
        keep: u32,
    ) -> Result<u64, StoreError> {
        let removed = on_pool!(self, pool => {
            sqlx::query(
                "DELETE FROM api_keys WHERE team_id = $1 AND created_by = $2 AND name = $3 \
                 AND id NOT IN (SELECT id FROM api_keys WHERE team_id = $1 AND created_by = $2 \
                 AND name = $3 ORDER BY created_at_ms DESC, id LIMIT $4)",
            )
            .bind(team.to_string())
            .bind(user.to_string())
            .bind(CLI_KEY)
            .bind(i64::from(keep))
            .execute(pool)
            .await
            .map_err(during("remove old API keys"))?
            .rows_affected()
        });
        Ok(removed)
    }

    /// The team a key acts for, and the key's id.
    pub(crate) async fn team_of_key(
        &self,
        hash: &KeyHash,
    ) -> Result<Option<(CredentialId, Team)>, StoreError> {
        let row: Option<StoredKeyTeam> = on_pool!(self, pool => {
            sqlx::query_as(concat!(
                "SELECT api_keys.id AS key_id, ", team_columns!(),
                " FROM api_keys JOIN teams ON teams.id = api_keys.team_id ",
                "JOIN tiers ON tiers.id = teams.tier_id WHERE api_keys.hash = $1",
            ))
            .bind(hash.as_str())
            .fetch_optional(pool)
            .await
            .map_err(during("find an API key"))?
        });
        let Some(row) = row else { return Ok(None) };
        Ok(Some((credential_id(&row.key_id)?, TeamRecord::try_from(row.team)?.team)))
    }

    /// Lets `token` act for `user`, and says how it is shown.
    pub(crate) async fn insert_token(
        &self,
        user: &UserId,
        token: &AccessToken,
        name: &str,
    ) -> Result<CredentialRecord, StoreError> {
        let (id, mask, created_at) = (CredentialId::random(), token.mask(), clock::now());
        on_pool!(self, pool => {
            sqlx::query(
                "INSERT INTO access_tokens (id, hash, user_id, name, prefix, value_length, \
                 masked_prefix, masked_suffix, created_at_ms) \
                 VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9)",
            )
            .bind(id.to_string())
            .bind(token.hash().as_str())
            .bind(user.to_string())
            .bind(name)
            .bind(&mask.prefix)
            .bind(i64::from(mask.value_length))
            .bind(&mask.head)
            .bind(&mask.tail)
            .bind(created_at.0)
            .execute(pool)
            .await
            .map_err(during("add an access token"))?;
        });
        let name = name.to_owned();
        Ok(CredentialRecord { id, name, mask, created_at, created_by: None, last_used: None })
    }

    /// The access tokens of a user, oldest first.
    pub(crate) async fn tokens_of(
        &self,
        user: &UserId,
    ) -> Result<Vec<CredentialRecord>, StoreError> {
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT id, name, prefix, value_length, masked_prefix, masked_suffix, \
                 created_at_ms, last_used_ms, CAST(NULL AS TEXT) AS created_by, \
                 CAST(NULL AS TEXT) AS email FROM access_tokens WHERE user_id = $1 \
                 ORDER BY created_at_ms, id",
            )
            .bind(user.to_string())
            .fetch_all(pool)
            .await
            .map_err(during("list access tokens"))?
        });
        rows.into_iter().map(CredentialRecord::try_from).collect()
    }

    /// Removes a token; false when the user has no such token.
    pub(crate) async fn delete_token(
        &self,
        user: &UserId,
        id: &CredentialId,
    ) -> Result<bool, StoreError> {
        let removed = on_pool!(self, pool => {
            sqlx::query("DELETE FROM access_tokens WHERE user_id = $1 AND id = $2")
                .bind(user.to_string())
                .bind(id.to_string())
                .execute(pool)
                .await
                .map_err(during("remove an access token"))?
                .rows_affected()
        });
        Ok(removed > 0)
    }

    /// The user a token acts for, and the token's id.
    pub(crate) async fn user_of_token(
        &self,
        hash: &KeyHash,
    ) -> Result<Option<(CredentialId, UserId)>, StoreError> {
        let row: Option<(String, String)> = on_pool!(self, pool => {
            sqlx::query_as("SELECT id, user_id FROM access_tokens WHERE hash = $1")
                .bind(hash.as_str())
                .fetch_optional(pool)
                .await
                .map_err(during("find an access token"))?
        });
        let Some((id, user)) = row else { return Ok(None) };
        let user = UserId::parse(&user).ok_or_else(|| corrupt("a user id", &user))?;
        Ok(Some((credential_id(&id)?, user)))
    }

    /// Remembers when credentials were used last, all or none. Unknown ones are skipped.
    pub(crate) async fn write_last_used(
        &self,
        used: &[(Used, UnixMillis)],
    ) -> Result<(), StoreError> {
        const WHAT: &str = "write when keys were used";
        let mut tx = self.begin(WHAT).await?;
        for (credential, at) in used {
            let (sql, id) = match credential {
                Used::Key(id) => ("UPDATE api_keys SET last_used_ms = $2 WHERE id = $1", id),
                Used::Token(id) => ("UPDATE access_tokens SET last_used_ms = $2 WHERE id = $1", id),
            };
            on_tx!(&mut tx, connection => {
                sqlx::query(sql)
                    .bind(id.to_string())
                    .bind(at.0)
                    .execute(connection)
                    .await
                    .map_err(during(WHAT))?;
            });
        }
        tx.commit(WHAT).await
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, on_both};
    use super::*;

    #[tokio::test]
    async fn keys_are_made_shown_renamed_and_removed() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team");
            let user = store.create_user("ada@example.org", None).await.expect("a user");
            let key = ApiKey::random();
            let made = store.insert_key(&team.id, &key, "ci", Some(&user.id)).await.expect("a key");
            assert_eq!(made.created_by, Some((user.id.clone(), "ada@example.org".to_owned())));
            assert_eq!(store.keys_of(&team.id).await.expect("a list"), std::slice::from_ref(&made));
            let found = store.team_of_key(&key.hash()).await.expect("a lookup");
            assert_eq!(found, Some((made.id.clone(), team.clone())));

            let renamed = store.rename_key(&team.id, &made.id, "cd").await.expect("renamed");
            assert_eq!(renamed.map(|key| key.name), Some("cd".to_owned()));
            let other = TeamId::random();
            assert_eq!(store.rename_key(&other, &made.id, "x").await.expect("a lookup"), None);
            assert!(!store.delete_key(&other, &made.id).await.expect("not another team's"));
            assert!(store.delete_key(&team.id, &made.id).await.expect("removed"));
            assert!(!store.delete_key(&team.id, &made.id).await.expect("gone"));
            assert_eq!(store.team_of_key(&key.hash()).await.expect("a lookup"), None);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn tokens_are_made_shown_and_removed() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let user = store.create_user("ada@example.org", None).await.expect("a user").id;
            let token = AccessToken::random();
            let made = store.insert_token(&user, &token, "laptop").await.expect("a token");
            assert_eq!(store.tokens_of(&user).await.expect("a list"), std::slice::from_ref(&made));
            let found = store.user_of_token(&token.hash()).await.expect("a lookup");
            assert_eq!(found, Some((made.id.clone(), user.clone())));
            assert!(!store.delete_token(&UserId::random(), &made.id).await.expect("not theirs"));
            assert!(store.delete_token(&user, &made.id).await.expect("removed"));
            assert_eq!(store.user_of_token(&token.hash()).await.expect("a lookup"), None);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn the_last_use_is_written_for_those_that_are_there() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team").id;
            let user = store.create_user("ada@example.org", None).await.expect("a user").id;
            let (key, token) = (ApiKey::random(), AccessToken::random());
            let key = store.insert_key(&team, &key, "ci", None).await.expect("a key").id;
            let token = store.insert_token(&user, &token, "laptop").await.expect("a token").id;
            let used = [
                (Used::Key(key), UnixMillis(5)),
                (Used::Token(token), UnixMillis(6)),
                (Used::Key(CredentialId::random()), UnixMillis(7)),
            ];
            store.write_last_used(&used).await.expect("written");
            let keys = store.keys_of(&team).await.expect("a list");
            assert_eq!(keys[0].last_used, Some(UnixMillis(5)));
            let tokens = store.tokens_of(&user).await.expect("a list");
            assert_eq!(tokens[0].last_used, Some(UnixMillis(6)));
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn old_keys_of_one_name_make_room() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let team = store.ensure_team("default").await.expect("a team").id;
            let user = store.create_user("ada@example.org", None).await.expect("a user").id;
            for (name, by) in [(CLI_KEY, Some(&user)), ("ci", Some(&user)), (CLI_KEY, None)] {
                for _ in 0..3 {
                    store.insert_key(&team, &ApiKey::random(), name, by).await.expect("a key");
                }
            }
            let of_cli = async || {
                let keys = store.keys_of(&team).await.expect("a list");
                let own = keys.iter().filter(|key| key.name == CLI_KEY && key.created_by.is_some());
                (keys.len(), own.count())
            };
            assert_eq!(store.keep_newest_keys(&team, &user, 1).await.expect("removed"), 2);
            assert_eq!(of_cli().await, (7, 1));
            // What was made by name stays; what the user's command line has ends with them.
            store.put_member(&team, &user, false).await.expect("a member");
            assert!(store.remove_member(&team, &user).await.expect("removed"));
            assert_eq!(of_cli().await, (6, 0));
            store.insert_key(&team, &ApiKey::random(), CLI_KEY, Some(&user)).await.expect("a key");
            assert!(store.delete_user(&user).await.expect("removed"));
            assert_eq!(of_cli().await, (6, 0));
            store.close().await;
        })
        .await;
    }
}
