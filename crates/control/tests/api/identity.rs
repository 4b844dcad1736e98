//! Who is let in, as whom, and what nobody is told: keys, tokens, the operator, blocked teams,
//! address lists.

use belljar_control::Config;
use belljar_testkit::Transcript;
use http::Method;
use serde_json::{Value, json};

use crate::support::client::{Answer, Client};
use crate::support::{ADMIN_TOKEN, Rig, config};

const UNAUTHORIZED: &str =
    "error in openapi3filter.SecurityRequirementsError: security requirements failed: ";

async fn get(client: &Client, path: &str, headers: &[(&str, &str)]) -> Answer {
    client.ask(Method::GET, path, headers, "").await
}

#[tokio::test]
async fn of_several_credentials_the_first_in_order_decides() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let (team, other) = rig.team(json!({"name": "Other"})).await;
    let created = other.post("/v2/sandboxes", r#"{"templateID":"base"}"#).await.json();
    let listed = |answer: Answer| {
        assert_eq!(answer.status, 200, "{}", answer.text);
        answer.json().as_array().expect("a list").len()
    };
    let (own, dead) = (("x-api-key", client.key.as_str()), ("x-api-key", "e2b_dead"));
    let admin = ("x-admin-token", ADMIN_TOKEN);
    let of_other = ("x-team-id", team.as_str());
    let path = "/v2/sandboxes";
    assert_eq!(listed(get(client, path, &[own]).await), 0);
    assert_eq!(listed(get(client, path, &[admin, of_other]).await), 1, "the operator for a team");
    assert_eq!(listed(get(client, path, &[admin, of_other, own]).await), 0, "the key decides");
    // One that is not valid is not passed over.
    get(client, path, &[dead, admin, of_other]).await.assert_error(401, UNAUTHORIZED);
    get(client, path, &[("x-admin-token", "no"), of_other]).await.assert_error(401, UNAUTHORIZED);
    // What the route does not accept is not looked at.
    let junk = ("authorization", "Bearer sk_e2b_junk");
    assert_eq!(listed(get(client, path, &[junk, admin, of_other]).await), 1);
    assert_eq!(get(client, "/admin/tiers", &[dead, admin]).await.status, 200);

    get(client, path, &[admin]).await.assert_error(401, "X-Team-ID is missing");
    get(client, path, &[admin, ("x-team-id", "x")]).await.assert_error(400, "X-Team-ID");
    let nobody = ("x-team-id", "6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11");
    get(client, path, &[admin, nobody]).await.assert_error(404, "there is no team");
    get(client, path, &[]).await.assert_error(401, "X-API-Key, or X-Admin-Token");
    let jwt = ("authorization", "Bearer a.b.c");
    get(client, path, &[jwt, of_other]).await.assert_error(401, UNAUTHORIZED);

    let id = created["sandboxID"].as_str().expect("an id");
    let path = format!("/sandboxes/{id}");
    let killed = client.ask(Method::DELETE, &path, &[admin, of_other], "").await;
    assert_eq!(killed.status, 204, "{}", killed.text);
    rig.stop().await;
}

#[tokio::test]
async fn an_access_token_finds_its_user_s_teams_with_keys_that_work() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let (user, token) = rig.user("ada@example.org").await;
    let bearer = format!("Bearer {token}");
    let bearer = [("authorization", bearer.as_str())];
    assert_eq!(get(client, "/teams", &bearer).await.json(), json!([]));

    let (team, _) = rig.team(json!({"name": "Lab"})).await;
    let member = format!("/admin/teams/{team}/members/{user}");
    assert_eq!(rig.admin("PUT", &member, Value::Null).await.json()["isDefault"], true);
    let teams = get(client, "/teams", &bearer).await.json();
    let [shown] = teams.as_array().expect("a list").as_slice() else { panic!("{teams}") };
    assert_eq!((&shown["teamID"], &shown["name"]), (&json!(team), &json!("Lab")));
    assert_eq!(shown["isDefault"], true);
    let first = shown["apiKey"].as_str().expect("a key").to_owned();
    let keyed = Client::new(rig.control.address, &first);
    assert_eq!(keyed.get("/sandboxes").await.status, 200);

    // Each answer makes a key; the newest ten are kept, and old ones end at once.
    for _ in 0..10 {
        assert_eq!(get(client, "/teams", &bearer).await.status, 200);
    }
    keyed.get("/sandboxes").await.assert_error(401, UNAUTHORIZED);
    let keys = rig.admin("GET", &format!("/admin/teams/{team}/api-keys"), Value::Null).await;
    let keys = keys.json();
    let of_cli = |key: &&Value| key["createdBy"]["email"] == "ada@example.org";
    assert_eq!(keys.as_array().expect("a list").iter().filter(of_cli).count(), 10);

    // A token opens what the contract says, and no more.
    for path in ["/api-keys", "/sandboxes", "/admin/teams"] {
        get(client, path, &bearer).await.assert_error(401, UNAUTHORIZED);
    }
    let post = client.ask(Method::POST, "/access-tokens", &bearer, r#"{"name":"x"}"#).await;
    post.assert_error(401, UNAUTHORIZED);
    client.get("/teams").await.assert_error(401, "Authorization");
    get(client, "/teams", &[("authorization", "Bearer sk_e2b_00")])
        .await
        .assert_error(401, UNAUTHORIZED);

    // Removed users are out at once.
    assert_eq!(rig.admin("DELETE", &format!("/admin/users/{user}"), Value::Null).await.status, 204);
    get(client, "/teams", &bearer).await.assert_error(401, UNAUTHORIZED);
    rig.stop().await;
}

#[tokio::test]
async fn a_team_s_keys_are_shown_masked_renamed_and_removed() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let (team, keyed) = rig.team(json!({"name": "Lab"})).await;
    let (_, foreign) = rig.team(json!({"name": "Other"})).await;
    let headers = [("x-admin-token", ADMIN_TOKEN), ("x-team-id", team.as_str())];
    let keys = get(client, "/api-keys", &headers).await.json();
    let [shown] = keys.as_array().expect("a list").as_slice() else { panic!("{keys}") };
    let value = &keyed.key["e2b_".len()..];
    assert_eq!(
        shown["mask"],
        json!({
            "prefix": "e2b_", "valueLength": 40,
            "maskedValuePrefix": &value[..2], "maskedValueSuffix": &value[36..],
        })
    );
    assert!(!keys.to_string().contains(value), "{keys}");
    let id = shown["id"].as_str().expect("an id").to_owned();
    let path = format!("/api-keys/{id}");
    let renamed = client.ask(Method::PATCH, &path, &headers, r#"{"name":"ci"}"#).await;
    assert_eq!((renamed.status, &renamed.json()["name"]), (200, &json!("ci")));
    let unnamed = client.ask(Method::PATCH, &path, &headers, r#"{"name":" "}"#).await;
    unnamed.assert_error(400, "'name'");

    // A key is not one that manages keys, and another team's are not there.
    keyed.get("/api-keys").await.assert_error(401, UNAUTHORIZED);
    foreign.delete(&path).await.assert_error(401, UNAUTHORIZED);
    let default = rig.control.store.ensure_team("default").await.expect("a team").id.to_string();
    let others = [("x-admin-token", ADMIN_TOKEN), ("x-team-id", default.as_str())];
    let gone = client.ask(Method::DELETE, &path, &others, "").await;
    gone.assert_error(404, "no such API key");
    let post = client.ask(Method::POST, "/api-keys", &headers, r#"{"name":"x"}"#).await;
    post.assert_error(401, "a user who has signed in");

    assert_eq!(keyed.get("/sandboxes").await.status, 200);
    assert_eq!(client.ask(Method::DELETE, &path, &headers, "").await.status, 204);
    keyed.get("/sandboxes").await.assert_error(401, UNAUTHORIZED);
    client.ask(Method::DELETE, &path, &headers, "").await.assert_error(404, "no such API key");
    rig.stop().await;
}

#[tokio::test]
async fn a_blocked_team_is_told_so_at_once_and_only_the_operator_acts() {
    let rig = Rig::start().await;
    let (team, keyed) = rig.team(json!({"name": "Lab"})).await;
    let id = keyed.post("/v2/sandboxes", r#"{"templateID":"base"}"#).await.json();
    let id = id["sandboxID"].as_str().expect("an id").to_owned();
    let path = format!("/admin/teams/{team}");
    let block = json!({"blocked": true, "blockedReason": "unpaid"});
    assert_eq!(rig.admin("PATCH", &path, block).await.json()["blockedReason"], "unpaid");
    keyed.get("/sandboxes").await.assert_error(403, "team blocked: unpaid");
    let headers = [("x-admin-token", ADMIN_TOKEN), ("x-team-id", team.as_str())];
    assert_eq!(get(&keyed, &format!("/sandboxes/{id}"), &headers).await.status, 200);
    rig.admin("PATCH", &path, json!({"blockedReason": "x"})).await.assert_error(400, "blocked");
    let open = rig.admin("PATCH", &path, json!({"blocked": false})).await;
    assert_eq!(open.json()["blockedReason"], Value::Null);
    assert_eq!(keyed.get("/sandboxes").await.status, 200);
    rig.stop().await;
}

#[tokio::test]
async fn a_team_s_address_list_lets_in_who_is_on_it() {
    let here = "127.0.0.0/8".parse().expect("a range");
    let rig = Rig::start_with(Config { trusted_proxies: vec![here], ..config() }).await;
    let (team, keyed) = rig.team(json!({"name": "Lab"})).await;
    let path = format!("/admin/teams/{team}");
    let list = json!({"allowedAddresses": ["10.0.0.0/8", "2001:db8::/32"]});
    assert_eq!(rig.admin("PATCH", &path, list.clone()).await.status, 200);
    keyed.get("/sandboxes").await.assert_error(403, "team forbidden: requests from 127.0.0.1");
    let from = async |hops: &str| {
        let headers = [("x-api-key", keyed.key.as_str()), ("x-forwarded-for", hops)];
        get(&keyed, "/sandboxes", &headers).await
    };
    for inside in ["10.1.2.3", "1.1.1.1, 10.1.2.3", "::ffff:10.1.2.3", "2001:db8::7"] {
        assert_eq!(from(inside).await.status, 200, "{inside}");
    }
    for (outside, named) in [("192.0.2.1", "192.0.2.1"), ("10.1.2.3, 192.0.2.1", "192.0.2.1")] {
        from(outside).await.assert_error(403, &format!("requests from {named} may not"));
    }
    let bad = json!({"allowedAddresses": ["10.0.0.1/8"]});
    rig.admin("PATCH", &path, bad).await.assert_error(400, "'allowedAddresses'");
    assert_eq!(
        rig.admin("GET", &path, Value::Null).await.json()["allowedAddresses"],
        list["allowedAddresses"]
    );
    rig.stop().await;

    // Without a named proxy the header is anybody's.
    let rig = Rig::start().await;
    let (_, keyed) = rig.team(json!({"name": "Lab", "allowedAddresses": ["10.0.0.0/8"]})).await;
    let headers = [("x-api-key", keyed.key.as_str()), ("x-forwarded-for", "10.1.2.3")];
    get(&keyed, "/sandboxes", &headers).await.assert_error(403, "127.0.0.1");
    rig.stop().await;
}

#[tokio::test]
async fn nothing_that_opens_anything_is_logged() {
    let transcript = Transcript::install();
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let (team, keyed) = rig.team(json!({"name": "Lab"})).await;
    let (user, token) = rig.user("ada@example.org").await;
    rig.admin("PUT", &format!("/admin/teams/{team}/members/{user}"), Value::Null).await;
    let bearer = format!("Bearer {token}");
    let teams = get(client, "/teams", &[("authorization", &bearer)]).await.json();
    let minted = teams[0]["apiKey"].as_str().expect("a key").to_owned();
    let (wrong_key, wrong_token) = (format!("e2b_{}", "5".repeat(40)), "sk_e2b_wrongwrong");
    let (wrong_admin, wrong_jwt) = ("wrong-admin-token-0123456789abcdef", "aaa.bbb.ccc");
    for path in ["/sandboxes", "/teams", "/api-keys", "/admin/teams", "/access-tokens", "/health"] {
        for headers in [
            vec![("x-api-key", keyed.key.as_str())],
            vec![("x-api-key", minted.as_str())],
            vec![("x-api-key", wrong_key.as_str())],
            vec![("x-admin-token", ADMIN_TOKEN), ("x-team-id", team.as_str())],
            vec![("x-admin-token", wrong_admin), ("x-team-id", team.as_str())],
            vec![("authorization", bearer.as_str())],
            vec![("authorization", wrong_token)],
            vec![("authorization", "Bearer aaa.bbb.ccc"), ("x-team-id", team.as_str())],
        ] {
            get(client, path, &headers).await;
        }
    }
    let keys = rig.admin("GET", &format!("/admin/teams/{team}/api-keys"), Value::Null).await.json();
    for key in keys.as_array().expect("a list") {
        let path = format!("/admin/teams/{team}/api-keys/{}", key["id"].as_str().expect("an id"));
        assert_eq!(rig.admin("DELETE", &path, Value::Null).await.status, 204);
    }
    keyed.get("/sandboxes").await.assert_error(401, UNAUTHORIZED);
    rig.stop().await;
    let value = |key: &str| key.rsplit('_').next().expect("its value").to_owned();
    let values = [value(&keyed.key), value(&minted), value(&token), value(&wrong_key)];
    let mut secrets: Vec<&str> = values.iter().map(String::as_str).collect();
    secrets.extend([ADMIN_TOKEN, wrong_admin, wrong_token, wrong_jwt]);
    transcript.assert_without(&secrets);
}
