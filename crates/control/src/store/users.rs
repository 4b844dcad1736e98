//! Users, who signs in as them, and which teams they may act for.

use belljar_daemon::clock;
use belljar_domain::{Kind, UnixMillis};

use super::credentials::CLI_KEY;
use super::teams::{StoredTeam, TeamRecord, team_columns};
use super::{Store, StoreError, corrupt, during, on_pool, on_tx};
use crate::team::{Team, TeamId, UserId};

/// A person as an identity provider knows them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Identity {
    pub(crate) issuer: String,
    pub(crate) subject: String,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct UserRecord {
    pub(crate) id: UserId,
    pub(crate) email: String,
    pub(crate) identities: Vec<Identity>,
    pub(crate) created_at: UnixMillis,
}

/// A user of a team.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MemberRecord {
    pub(crate) user: UserId,
    pub(crate) email: String,
    pub(crate) is_default: bool,
}

/// Why a user was not made, or not put into a team.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UserError {
    #[error("there is no such user")]
    NotFound,
    #[error("there is no such team")]
    NoTeam,
    #[error("the address '{email}' is another user's")]
    EmailTaken { email: String },
    #[error("the identity is another user's")]
    IdentityTaken,
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl UserError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            UserError::NotFound | UserError::NoTeam => Kind::NotFound,
            UserError::EmailTaken { .. } | UserError::IdentityTaken => Kind::Conflict,
            UserError::Store(e) => e.kind(),
        }
    }
}

/// One identity of one user, or a user without any.
#[derive(sqlx::FromRow)]
struct Stored {
    id: String,
    email: String,
    created_at_ms: i64,
    issuer: Option<String>,
    subject: Option<String>,
}

#[derive(sqlx::FromRow)]
struct StoredMembership {
    is_default: bool,
    #[sqlx(flatten)]
    team: StoredTeam,
}

fn user_id(text: &str) -> Result<UserId, StoreError> {
    UserId::parse(text).ok_or_else(|| corrupt("a user id", text))
}

/// Joins the rows of each user, which follow each other.
fn users_of(rows: Vec<Stored>) -> Result<Vec<UserRecord>, StoreError> {
    let mut users: Vec<UserRecord> = Vec::new();
    for row in rows {
        let id = user_id(&row.id)?;
        let identity =
            row.issuer.zip(row.subject).map(|(issuer, subject)| Identity { issuer, subject });
        match users.last_mut() {
            Some(user) if user.id == id => user.identities.extend(identity),
            _ => users.push(UserRecord {
                id,
                email: row.email,
                identities: identity.into_iter().collect(),
                created_at: UnixMillis(row.created_at_ms),
            }),
        }
    }
    Ok(users)
}

impl Store {
    /// Every user, oldest first.
    pub(crate) async fn users(&self) -> Result<Vec<UserRecord>, StoreError> {
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT u.id, u.email, u.created_at_ms, i.issuer, i.subject FROM users u \
                 LEFT JOIN user_identities i ON i.user_id = u.id \
                 ORDER BY u.created_at_ms, u.id, i.issuer, i.subject",
            )
            .fetch_all(pool)
            .await
            .map_err(during("list users"))?
        });
        users_of(rows)
    }

    pub(crate) async fn user(&self, id: &UserId) -> Result<Option<UserRecord>, StoreError> {
        let rows: Vec<Stored> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT u.id, u.email, u.created_at_ms, i.issuer, i.subject FROM users u \
                 LEFT JOIN user_identities i ON i.user_id = u.id WHERE u.id = $1 \
                 ORDER BY i.issuer, i.subject",
            )
            .bind(id.to_string())
            .fetch_all(pool)
            .await
            .map_err(during("find a user"))?
        });
        Ok(users_of(rows)?.pop())
    }

    pub(crate) async fn create_user(
        &self,
        email: &str,
        identity: Option<&Identity>,
    ) -> Result<UserRecord, UserError> {
        const WHAT: &str = "make a user";
        let (id, now) = (UserId::random(), clock::now());
        let mut tx = self.begin(WHAT).await?;
        let made = on_tx!(&mut tx, connection => {
            sqlx::query(
                "INSERT INTO users (id, email, created_at_ms) VALUES ($1, $2, $3) \
                 ON CONFLICT (email) DO NOTHING",
            )
            .bind(id.to_string())
            .bind(email)
            .bind(now.0)
            .execute(connection)
            .await
            .map_err(during(WHAT))?
            .rows_affected()
        });
        if made == 0 {
            return Err(UserError::EmailTaken { email: email.to_owned() });
        }
        if let Some(identity) = identity {
            let known = on_tx!(&mut tx, connection => {
                sqlx::query(
                    "INSERT INTO user_identities (issuer, subject, user_id, created_at_ms) \
                     VALUES ($1, $2, $3, $4) ON CONFLICT (issuer, subject) DO NOTHING",
                )
                .bind(&identity.issuer)
                .bind(&identity.subject)
                .bind(id.to_string())
                .bind(now.0)
                .execute(connection)
                .await
                .map_err(during(WHAT))?
                .rows_affected()
            });
            if known == 0 {
                return Err(UserError::IdentityTaken);
            }
        }
        tx.commit(WHAT).await?;
        let identities = identity.cloned().into_iter().collect();
        Ok(UserRecord { id, email: email.to_owned(), identities, created_at: now })
    }

    /// Removes a user with their tokens, memberships and the keys of their command line; false when
    /// there is none. Keys they made by name stay with their teams.
    pub(crate) async fn delete_user(&self, id: &UserId) -> Result<bool, StoreError> {
        const WHAT: &str = "remove a user";
        let mut tx = self.begin(WHAT).await?;
        let removed = on_tx!(&mut tx, connection => {
            sqlx::query("DELETE FROM api_keys WHERE created_by = $1 AND name = $2")
                .bind(id.to_string())
                .bind(CLI_KEY)
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?;
            sqlx::query("DELETE FROM users WHERE id = $1")
                .bind(id.to_string())
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?
                .rows_affected()
        });
        tx.commit(WHAT).await?;
        Ok(removed > 0)
    }

    /// Who signs in with `identity`.
    pub(crate) async fn user_of_identity(
        &self,
        identity: &Identity,
    ) -> Result<Option<UserId>, StoreError> {
        let id: Option<String> = on_pool!(self, pool => {
            sqlx::query_scalar(
                "SELECT user_id FROM user_identities WHERE issuer = $1 AND subject = $2",
            )
            .bind(&identity.issuer)
            .bind(&identity.subject)
            .fetch_optional(pool)
            .await
            .map_err(during("find a user"))?
        });
        id.as_deref().map(user_id).transpose()
    }

    /// The users of a team, by address.
    pub(crate) async fn members(&self, team: &TeamId) -> Result<Vec<MemberRecord>, StoreError> {
        let rows: Vec<(String, String, bool)> = on_pool!(self, pool => {
            sqlx::query_as(
                "SELECT u.id, u.email, m.is_default FROM memberships m \
                 JOIN users u ON u.id = m.user_id WHERE m.team_id = $1 ORDER BY u.email",
            )
            .bind(team.to_string())
            .fetch_all(pool)
            .await
            .map_err(during("list members"))?
        });
        rows.into_iter()
            .map(|(id, email, is_default)| {
                Ok(MemberRecord { user: user_id(&id)?, email, is_default })
            })
            .collect()
    }

    /// The teams a user may act for, the default one first.
    pub(crate) async fn teams_of(&self, user: &UserId) -> Result<Vec<(Team, bool)>, StoreError> {
        let rows: Vec<StoredMembership> = on_pool!(self, pool => {
            sqlx::query_as(concat!(
                "SELECT memberships.is_default, ", team_columns!(),
                " FROM memberships JOIN teams ON teams.id = memberships.team_id ",
                "JOIN tiers ON tiers.id = teams.tier_id WHERE memberships.user_id = $1 ",
                "ORDER BY memberships.is_default DESC, teams.created_at_ms, teams.id",
            ))
            .bind(user.to_string())
            .fetch_all(pool)
            .await
            .map_err(during("list a user's teams"))?
        });
        let team =
            |row: StoredMembership| Ok((TeamRecord::try_from(row.team)?.team, row.is_default));
        rows.into_iter().map(team).collect()
    }

    /// Lets a user act for a team. It becomes their default if asked for, or if it is their first.
    pub(crate) async fn put_member(
        &self,
        team: &TeamId,
        user: &UserId,
        make_default: bool,
    ) -> Result<MemberRecord, UserError> {
        const WHAT: &str = "put a user into a team";
        let record = self.user(user).await?.ok_or(UserError::NotFound)?;
        self.team(team).await?.ok_or(UserError::NoTeam)?;
        let mut tx = self.begin(WHAT).await?;
        let is_default: bool = on_tx!(&mut tx, connection => {
            if make_default {
                sqlx::query("UPDATE memberships SET is_default = FALSE WHERE user_id = $1")
                    .bind(user.to_string())
                    .execute(&mut *connection)
                    .await
                    .map_err(during(WHAT))?;
            }
            let defaults: i64 = sqlx::query_scalar(
                "SELECT COUNT(*) FROM memberships WHERE user_id = $1 AND is_default",
            )
            .bind(user.to_string())
            .fetch_one(&mut *connection)
            .await
            .map_err(during(WHAT))?;
            sqlx::query(
                "INSERT INTO memberships (user_id, team_id, is_default, created_at_ms) \
                 VALUES ($1, $2, $3, $4) ON CONFLICT (user_id, team_id) DO UPDATE \
                 SET is_default = CASE WHEN $3 THEN $3 ELSE memberships.is_default END",
            )
            .bind(user.to_string())
            .bind(team.to_string())
            .bind(defaults == 0)
            .bind(clock::now().0)
            .execute(&mut *connection)
            .await
            .map_err(during(WHAT))?;
            sqlx::query_scalar(
                "SELECT is_default FROM memberships WHERE user_id = $1 AND team_id = $2",
            )
            .bind(user.to_string())
            .bind(team.to_string())
            .fetch_one(&mut *connection)
            .await
            .map_err(during(WHAT))?
        });
        tx.commit(WHAT).await?;
        Ok(MemberRecord { user: record.id, email: record.email, is_default })
    }

    /// Ends a membership, and with it the keys the user's command line was given for the team; false
    /// when there is none.
    pub(crate) async fn remove_member(
        &self,
        team: &TeamId,
        user: &UserId,
    ) -> Result<bool, StoreError> {
        const WHAT: &str = "remove a member";
        let mut tx = self.begin(WHAT).await?;
        let removed = on_tx!(&mut tx, connection => {
            sqlx::query("DELETE FROM api_keys WHERE team_id = $1 AND created_by = $2 AND name = $3")
                .bind(team.to_string())
                .bind(user.to_string())
                .bind(CLI_KEY)
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?;
            sqlx::query("DELETE FROM memberships WHERE team_id = $1 AND user_id = $2")
                .bind(team.to_string())
                .bind(user.to_string())
                .execute(&mut *connection)
                .await
                .map_err(during(WHAT))?
                .rows_affected()
        });
        tx.commit(WHAT).await?;
        Ok(removed > 0)
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Bench, on_both};
    use super::*;

    fn identity(subject: &str) -> Identity {
        Identity { issuer: "https://id.example.org".to_owned(), subject: subject.to_owned() }
    }

    #[tokio::test]
    async fn users_are_made_found_and_removed() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let ada = store.create_user("ada@x.org", Some(&identity("1"))).await.expect("a user");
            let bob = store.create_user("bob@x.org", None).await.expect("a user");
            assert_eq!(store.user(&ada.id).await.expect("a lookup"), Some(ada.clone()));
            let mut listed = store.users().await.expect("a list");
            listed.sort_by(|a, b| a.email.cmp(&b.email));
            assert_eq!(listed, [ada.clone(), bob]);
            let found = store.user_of_identity(&identity("1")).await.expect("a lookup");
            assert_eq!(found, Some(ada.id.clone()));
            assert_eq!(store.user_of_identity(&identity("2")).await.expect("a lookup"), None);

            let taken = store.create_user("ada@x.org", None).await;
            assert!(matches!(taken, Err(UserError::EmailTaken { .. })), "{taken:?}");
            let taken = store.create_user("eve@x.org", Some(&identity("1"))).await;
            assert!(matches!(taken, Err(UserError::IdentityTaken)), "{taken:?}");
            assert_eq!(store.users().await.expect("a list").len(), 2, "all or nothing");

            assert!(store.delete_user(&ada.id).await.expect("removed"));
            assert!(!store.delete_user(&ada.id).await.expect("gone"));
            assert_eq!(store.user_of_identity(&identity("1")).await.expect("a lookup"), None);
            store.close().await;
        })
        .await;
    }

    #[tokio::test]
    async fn a_user_has_one_default_team() {
        on_both(async |bench: Bench| {
            let store = bench.store().await;
            let user = store.create_user("ada@x.org", None).await.expect("a user").id;
            let first = store.ensure_team("first").await.expect("a team");
            let second = store.ensure_team("second").await.expect("a team");
            let made = store.put_member(&first.id, &user, false).await.expect("a member");
            assert!(made.is_default, "the first one is");
            let made = store.put_member(&second.id, &user, false).await.expect("a member");
            assert!(!made.is_default);
            let teams = store.teams_of(&user).await.expect("a list");
            assert_eq!(teams, [(first.clone(), true), (second.clone(), false)]);
            assert!(store.put_member(&second.id, &user, true).await.expect("moved").is_default);
            assert!(store.put_member(&second.id, &user, false).await.expect("stays").is_default);
            let teams = store.teams_of(&user).await.expect("a list");
            assert_eq!(teams, [(second.clone(), true), (first.clone(), false)]);
            assert_eq!(store.members(&second.id).await.expect("a list").len(), 1);

            assert!(store.remove_member(&first.id, &user).await.expect("removed"));
            assert!(!store.remove_member(&first.id, &user).await.expect("gone"));
            let nobody = store.put_member(&first.id, &UserId::random(), false).await;
            assert!(matches!(nobody, Err(UserError::NotFound)), "{nobody:?}");
            let nowhere = store.put_member(&TeamId::random(), &user, false).await;
            assert!(matches!(nowhere, Err(UserError::NoTeam)), "{nowhere:?}");
            store.close().await;
        })
        .await;
    }
}
