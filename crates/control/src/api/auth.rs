//! Who is asking, and for which team.
//!
//! | credential | header | acts for |
//! |---|---|---|
//! | API key | `X-API-Key` | its team |
//! | admin token | `X-Admin-Token` | the operator; with `X-Team-ID`, a team |
//! | access token | `Authorization: Bearer sk_e2b_…` | its user |
//! | token of an identity provider | `Authorization: Bearer …` and `X-Team-ID` | a user, in one of their teams |
//!
//! A request may carry several. Of those its route accepts, the first in the order of this table
//! decides, whatever the others are: one that is not valid is refused and not passed over, so that
//! a client learns that the key it shows is dead. What the route does not accept is not looked at.
//!
//! A blocked team and a team's address list stop keys and users, not the operator, who has to be
//! able to clean up. Source: contract section 1.1.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::middleware::Next;
use axum::response::Response;
use belljar_domain::Kind;
use http::{HeaderMap, HeaderName, header};

use super::error::ApiError;
use crate::app::App;
use crate::keys::{AccessToken, ApiKey, CredentialKind, OfUser};
use crate::oidc::VerifyError;
use crate::peer::Peer;
use crate::store::Identity;
use crate::team::{Team, TeamId, UserId};

const API_KEY: HeaderName = HeaderName::from_static("x-api-key");
const ADMIN_TOKEN: HeaderName = HeaderName::from_static("x-admin-token");
const TEAM_ID: HeaderName = HeaderName::from_static("x-team-id");

/// What texts of 403 begin with that clients match on. Source: contract section 1.1.
const BLOCKED: &str = "team blocked: ";
const FORBIDDEN: &str = "team forbidden: ";

/// The team a request acts for; put there by [`require_team`] and [`require_member`].
pub(crate) type Caller = Extension<Arc<Team>>;

/// Who acts; put on every request that is let through.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Principal {
    /// Whoever has a team's key.
    Key,
    /// A user.
    User(UserId),
    /// Whoever runs this server.
    Operator,
}

/// A way to say who is asking.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Key,
    Operator,
    OperatorForTeam,
    AccessToken,
    Provider,
    ProviderForTeam,
}

/// Lets a request through with its team, or answers 401.
pub(crate) async fn require_team(
    state: State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    require(state, request, next, &[Way::Key, Way::OperatorForTeam, Way::ProviderForTeam]).await
}

/// Lets people who manage a team through: its members and the operator, not its keys.
pub(crate) async fn require_member(
    state: State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    require(state, request, next, &[Way::OperatorForTeam, Way::ProviderForTeam]).await
}

/// Lets users through, whichever of their teams is meant.
pub(crate) async fn require_user(
    state: State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    require(state, request, next, &[Way::AccessToken, Way::Provider]).await
}

/// Lets users through who have just signed in: an access token makes no other.
pub(crate) async fn require_signed_in(
    state: State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    require(state, request, next, &[Way::Provider]).await
}

/// Lets the operator through.
pub(crate) async fn require_operator(
    state: State<Arc<App>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    require(state, request, next, &[Way::Operator]).await
}

async fn require(
    State(app): State<Arc<App>>,
    mut request: Request,
    next: Next,
    accepted: &[Way],
) -> Result<Response, ApiError> {
    let headers = request.headers();
    let Some(way) = accepted.iter().find(|way| way.is_tried_in(headers)) else {
        return Err(nothing_shown(accepted));
    };
    let (principal, team) = way.check(&app, headers).await?;
    if let Some(team) = team {
        if principal != Principal::Operator {
            let peer = request.extensions().get().copied();
            check_team(&team, peer)?;
        }
        request.extensions_mut().insert(team);
    }
    request.extensions_mut().insert(principal);
    Ok(next.run(request).await)
}

type Found = (Principal, Option<Arc<Team>>);

impl Way {
    /// Whether the request carries the header this way is about.
    fn is_tried_in(self, headers: &HeaderMap) -> bool {
        match self {
            Way::Key => headers.contains_key(API_KEY),
            Way::Operator | Way::OperatorForTeam => headers.contains_key(ADMIN_TOKEN),
            Way::AccessToken => bearer(headers).is_some_and(is_access_token),
            Way::Provider | Way::ProviderForTeam => {
                bearer(headers).is_some_and(|token| !is_access_token(token))
            }
        }
    }

    async fn check(self, app: &App, headers: &HeaderMap) -> Result<Found, ApiError> {
        match self {
            Way::Key => Ok((Principal::Key, Some(team_of_key(app, headers).await?))),
            Way::Operator => operator(app, headers).map(|operator| (operator, None)),
            Way::OperatorForTeam => {
                let operator = operator(app, headers)?;
                let id = named_team(headers)?;
                let team = app.access.team(&id).await?;
                let team = team.ok_or_else(|| ApiError::not_found(no_team(&id)))?;
                Ok((operator, Some(team)))
            }
            Way::AccessToken => {
                let token: Option<AccessToken> = bearer(headers).and_then(|text| text.parse().ok());
                let user = match token {
                    Some(token) => app.access.user_of_token(&token).await?,
                    None => None,
                };
                let user = user.ok_or_else(|| {
                    ApiError::unauthorized(
                        "the access token in the header Authorization is not valid",
                    )
                })?;
                Ok((Principal::User(user), None))
            }
            Way::Provider => Ok((Principal::User(signed_in(app, headers).await?), None)),
            Way::ProviderForTeam => {
                let user = signed_in(app, headers).await?;
                let id = named_team(headers)?;
                let team = app.access.team_of_member(&user, &id).await?;
                // A team one is no member of and one that is not there look the same.
                let team = team.ok_or_else(|| {
                    ApiError::forbidden(format!("{FORBIDDEN}you are not a member of team {id}"))
                })?;
                Ok((Principal::User(user), Some(team)))
            }
        }
    }

    /// What to send for it.
    fn headers_wanted(self) -> &'static str {
        match self {
            Way::Key => "X-API-Key",
            Way::Operator => "X-Admin-Token",
            Way::OperatorForTeam => "X-Admin-Token with X-Team-ID",
            Way::AccessToken => "Authorization with an access token",
            Way::Provider => "Authorization with a token of the identity provider",
            Way::ProviderForTeam => {
                "Authorization with a token of the identity provider, and X-Team-ID"
            }
        }
    }
}

fn nothing_shown(accepted: &[Way]) -> ApiError {
    let wanted: Vec<&str> = accepted.iter().map(|way| way.headers_wanted()).collect();
    ApiError::unauthorized(&format!("the header {} is missing", wanted.join(", or ")))
}

pub(crate) fn no_team(id: &TeamId) -> String {
    format!("there is no team {id}")
}

/// The token of `Authorization: Bearer`, whose scheme is spelled in any case.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

fn is_access_token(token: &str) -> bool {
    token.starts_with(OfUser::PREFIX)
}

async fn team_of_key(app: &App, headers: &HeaderMap) -> Result<Arc<Team>, ApiError> {
    let key: Option<ApiKey> = headers
        .get(API_KEY)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.trim().parse().ok());
    let team = match key {
        Some(key) => app.access.team_of_key(&key).await?,
        None => None,
    };
    // An unknown key and a malformed one look the same from outside.
    team.ok_or_else(|| ApiError::unauthorized("the API key in the header X-API-Key is not valid"))
}

fn operator(app: &App, headers: &HeaderMap) -> Result<Principal, ApiError> {
    let shown = headers.get(ADMIN_TOKEN).map_or(&[][..], |value| value.as_bytes());
    if app.access.is_operator(shown) {
        return Ok(Principal::Operator);
    }
    Err(ApiError::unauthorized("the token in the header X-Admin-Token is not valid"))
}

/// The user who signed in at the identity provider.
async fn signed_in(app: &App, headers: &HeaderMap) -> Result<UserId, ApiError> {
    if !app.oidc.is_configured() {
        return Err(ApiError::unauthorized("this server trusts no identity provider"));
    }
    let token = bearer(headers).unwrap_or_default();
    let subject = app.oidc.verify(token).await?;
    let identity = Identity { issuer: subject.issuer, subject: subject.subject };
    Ok(app.access.user_of_identity(&identity, subject.email.as_deref()).await?)
}

impl From<VerifyError> for ApiError {
    fn from(error: VerifyError) -> Self {
        match error.kind() {
            Kind::Unauthenticated => ApiError::unauthorized(&error.to_string()),
            kind => ApiError::of_kind(kind, error.to_string()),
        }
    }
}

fn named_team(headers: &HeaderMap) -> Result<TeamId, ApiError> {
    let Some(value) = headers.get(TEAM_ID) else {
        return Err(ApiError::unauthorized("the header X-Team-ID is missing"));
    };
    value
        .to_str()
        .ok()
        .and_then(|text| TeamId::parse(text.trim()))
        .ok_or_else(|| ApiError::bad_request("the header X-Team-ID must be a team's id, a UUID"))
}

/// Whether anybody may act for the team now, and from where this request comes.
fn check_team(team: &Team, peer: Option<Peer>) -> Result<(), ApiError> {
    if let Some(reason) = &team.blocked {
        return Err(ApiError::forbidden(format!("{BLOCKED}{reason}")));
    }
    if team.allowed.is_empty() {
        return Ok(());
    }
    match peer {
        Some(Peer(address)) if team.admits(address) => Ok(()),
        Some(Peer(address)) => Err(ApiError::forbidden(format!(
            "{FORBIDDEN}requests from {address} may not act for this team; whoever runs this \
             server can add the address to the team's list"
        ))),
        // The listener names a peer for every request; without one nothing is let in.
        None => {
            Err(ApiError::forbidden(format!("{FORBIDDEN}the address of the request is unknown")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(authorization: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, authorization.parse().expect("a header value"));
        headers
    }

    #[test]
    fn bearer_tokens_are_told_apart_by_their_prefix() {
        for (value, token, provider) in [
            ("Bearer sk_e2b_00", true, false),
            ("bearer  sk_e2b_00 ", true, false),
            ("Bearer eyJhbGciOi", false, true),
            ("Bearer ", false, true),
            ("Bearer", false, false),
            ("Basic dXNlcjo=", false, false),
        ] {
            let headers = headers(value);
            assert_eq!(Way::AccessToken.is_tried_in(&headers), token, "{value:?}");
            assert_eq!(Way::Provider.is_tried_in(&headers), provider, "{value:?}");
        }
    }

    #[test]
    fn a_list_of_addresses_lets_in_what_is_on_it() {
        let mut team = Team::called("default");
        let at = |text: &str| Some(Peer(text.parse().expect("an address")));
        assert_eq!(check_team(&team, None), Ok(()));
        team.allowed = vec!["10.0.0.0/8".parse().expect("a range")];
        assert_eq!(check_team(&team, at("10.1.2.3")), Ok(()));
        let refused = check_team(&team, at("192.0.2.1")).expect_err("not on the list");
        assert!(format!("{refused:?}").contains("192.0.2.1"), "{refused:?}");
        assert!(check_team(&team, None).is_err());
        team.blocked = Some("unpaid".to_owned());
        let refused = check_team(&team, at("10.1.2.3")).expect_err("blocked");
        assert_eq!(refused, ApiError::forbidden("team blocked: unpaid".to_owned()));
    }
}
