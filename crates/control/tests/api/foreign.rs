//! Another team's things are never visible: every operation of the OpenAPI document, asked with no
//! key, with none that counts, and by a stranger who knows all the ids.

use belljar_control::ApiKey;
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request};
use http_body_util::Full;
use serde_json::json;

use crate::support::client::{Answer, Client};
use crate::support::walk::{Operation, Owned, header, operations};
use crate::support::{ADMIN_TOKEN, Rig};

/// Open to everybody.
const EXEMPT: &[&str] = &["/health", "/openapi.json"];
/// Shows what belongs to the server, and so to every team.
const SHARED: &[&str] = &["/templates/{id}", "/templates/aliases/{alias}"];

async fn ask(rig: &Rig, operation: &Operation, target: &str, headers: &HeaderMap) -> Answer {
    let mut request = Request::builder()
        .method(operation.method.clone())
        .uri(format!("http://{}{target}", rig.control.address))
        .body(Full::new(Bytes::from(operation.body.clone())))
        .expect("a request");
    *request.headers_mut() = headers.clone();
    request.headers_mut().insert("content-type", HeaderValue::from_static("application/json"));
    rig.control.client.raw(request).await
}

fn headers<const N: usize>(pairs: [(&'static str, &str); N]) -> HeaderMap {
    pairs.into_iter().map(|(name, value)| header(name, value)).collect()
}

/// What must not be in any answer to a stranger.
fn secrets(owned: &Owned) -> [&str; 7] {
    let Owned { sandbox, key, token, webhook, user, .. } = owned;
    [sandbox, key, token, webhook, user, "first team's", "first@example.org"]
}

#[track_caller]
fn assert_hidden(owned: &Owned, answer: &Answer, what: &str) {
    // A refusal repeats what the caller spelled.
    if matches!(answer.status, 401 | 403 | 404) {
        return;
    }
    for secret in secrets(owned) {
        assert!(!answer.text.contains(secret), "{what} shows {secret}: {}", answer.text);
    }
}

#[tokio::test]
async fn without_a_key_that_counts_every_door_is_closed() {
    let rig = Rig::start().await;
    let owned = Owned::make(&rig).await;
    let before = owned.state(&rig).await;
    let key = rig.control.client.key.clone();
    let hex = &key["e2b_".len()..];
    let zeros = "0".repeat(40);
    let wrong: Vec<HeaderMap> = [
        ("x-api-key", format!("e2b_{zeros}")),
        ("x-api-key", String::new()),
        ("x-api-key", hex.to_owned()),
        ("x-api-key", format!("{key}0")),
        ("x-api-key", key.to_uppercase()),
        // What is right, in the wrong place.
        ("authorization", format!("Bearer {key}")),
        ("authorization", format!("Bearer sk_e2b_{hex}")),
        ("authorization", format!("Bearer sk_e2b_{zeros}")),
        ("authorization", format!("Bearer {ADMIN_TOKEN}")),
        ("authorization", key.clone()),
        ("x-api-key", ADMIN_TOKEN.to_owned()),
        ("x-admin-token", key.clone()),
        ("x-admin-token", String::new()),
        ("x-team-id", owned.team.clone()),
        ("cookie", format!("X-API-Key={key}")),
    ]
    .into_iter()
    .map(|(name, value)| headers([(name, &value)]))
    .collect();
    let mut asked = 0;
    for operation in operations(&rig).await {
        let target = owned.filled(&operation.path);
        let what = format!("{} {target}", operation.method);
        let bare = ask(&rig, &operation, &target, &HeaderMap::new()).await;
        if EXEMPT.contains(&operation.path.as_str()) {
            assert_eq!(bare.status, 200, "{what}");
            continue;
        }
        asked += 1;
        bare.assert_error(401, "");
        for headers in &wrong {
            let answer = ask(&rig, &operation, &target, headers).await;
            assert_eq!(answer.status, 401, "{what} with {headers:?}: {}", answer.text);
        }
        let in_query = format!("{target}?X-API-Key={key}&X-Admin-Token={ADMIN_TOKEN}");
        ask(&rig, &operation, &in_query, &HeaderMap::new()).await.assert_error(401, "");
    }
    assert!(asked >= 50, "only {asked} operations were asked");
    assert_eq!(owned.state(&rig).await, before);
    rig.stop().await;
}

/// Asks every operation with `shown`, which `opens` some; nothing of the first team's may be seen
/// or change.
async fn walk(rig: &Rig, owned: &Owned, shown: &HeaderMap, opens: impl Fn(&Operation) -> bool) {
    let before = owned.state(rig).await;
    let mut refused = 0;
    for operation in operations(rig).await {
        let path = operation.path.as_str();
        if EXEMPT.contains(&path) {
            continue;
        }
        let target = owned.filled(path);
        let answer = ask(rig, &operation, &target, shown).await;
        let what = format!("{} {target}: {} {}", operation.method, answer.status, answer.text);
        if !opens(&operation) {
            assert!(matches!(answer.status, 401 | 403), "{what}");
        } else if path.contains('{') && !SHARED.contains(&path) && path != "/events/sandboxes/{id}"
        {
            assert!(matches!(answer.status, 401 | 403 | 404), "{what}");
            refused += 1;
        } else {
            // What comes later is refused for everybody.
            assert!(answer.status < 500 || answer.status == 501, "{what}");
        }
        assert_hidden(owned, &answer, &what);
    }
    assert!(refused >= 15, "only {refused} operations were refused for their ids");
    assert_eq!(owned.state(rig).await, before);
}

#[tokio::test]
async fn a_stranger_with_every_id_and_a_key_sees_and_changes_nothing() {
    let rig = Rig::start().await;
    let owned = Owned::make(&rig).await;
    let team = rig.control.store.ensure_team("stranger").await.expect("a team");
    let key = ApiKey::random();
    rig.control.store.add_key(&team.id, &key).await.expect("a key");
    let shown = headers([("x-api-key", &key.expose())]);
    walk(&rig, &owned, &shown, |operation| operation.takes("ApiKeyAuth")).await;

    // The same ids with the right key work, so the refusals were about the key.
    let detail = format!("/sandboxes/{}", owned.sandbox);
    assert_eq!(rig.control.client.get(&detail).await.status, 200);
    assert_eq!(Client::new(rig.control.address, &key.expose()).get(&detail).await.status, 404);
    rig.stop().await;
}

/// What an operator does for one team does not reach into another one, keys included.
#[tokio::test]
async fn acting_for_one_team_does_not_reach_another() {
    let rig = Rig::start().await;
    let owned = Owned::make(&rig).await;
    let team = rig.control.store.ensure_team("stranger").await.expect("a team");
    let shown = headers([("x-admin-token", ADMIN_TOKEN), ("x-team-id", &team.id.to_string())]);
    let before = owned.state(&rig).await;
    let of_a_team = ["AdminApiKeyAuth".to_owned(), "AdminTeamAuth".to_owned()];
    let mut refused = 0;
    for operation in operations(&rig).await {
        let path = operation.path.as_str();
        if !operation.ways.iter().any(|way| *way == of_a_team) || SHARED.contains(&path) {
            continue;
        }
        let target = owned.filled(path);
        let answer = ask(&rig, &operation, &target, &shown).await;
        let what = format!("{} {target}: {} {}", operation.method, answer.status, answer.text);
        if path.contains('{') && path != "/events/sandboxes/{id}" {
            assert!(matches!(answer.status, 403 | 404), "{what}");
            refused += 1;
        }
        assert_hidden(&owned, &answer, &what);
    }
    assert!(refused >= 17, "only {refused} operations were refused for their ids");
    assert_eq!(owned.state(&rig).await, before);
    rig.stop().await;
}

/// A user's access token opens the list of their own teams, and nothing else.
#[tokio::test]
async fn a_stranger_s_access_token_shows_their_own_teams_only() {
    let rig = Rig::start().await;
    let owned = Owned::make(&rig).await;
    let (user, token) = rig.user("stranger@example.org").await;
    let (team, _) = rig.team(json!({"name": "Strangers"})).await;
    let member = format!("/admin/teams/{team}/members/{user}");
    assert_eq!(rig.admin("PUT", &member, json!({"isDefault": true})).await.status, 200);
    let shown = headers([("authorization", &format!("Bearer {token}"))]);
    let before = owned.state(&rig).await;
    for operation in operations(&rig).await {
        if EXEMPT.contains(&operation.path.as_str()) {
            continue;
        }
        let target = owned.filled(&operation.path);
        let answer = ask(&rig, &operation, &target, &shown).await;
        let what = format!("{} {target}: {} {}", operation.method, answer.status, answer.text);
        if operation.takes("AccessTokenAuth") {
            assert_eq!(answer.status, 200, "{what}");
            assert!(!answer.text.contains(&owned.team), "{what}");
        } else {
            assert!(matches!(answer.status, 401 | 403), "{what}");
        }
        assert_hidden(&owned, &answer, &what);
    }
    assert_eq!(owned.state(&rig).await, before);
    rig.stop().await;
}
