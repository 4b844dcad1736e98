//! What the operator does: teams, tiers, users, members, and what runs for whom.

use belljar_control::Store;
use http::Method;
use serde_json::{Value, json};
use sqlx::SqlitePool;
use tokio::io::AsyncWriteExt as _;
use tokio::net::TcpStream;

use crate::support::{ADMIN_TOKEN, Rig, eventually};

#[tokio::test]
async fn only_the_operator_s_token_opens_the_operator_s_routes() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let wrong = format!("{ADMIN_TOKEN}0");
    for path in ["/admin/teams", "/admin/tiers", "/admin/users", "/admin/sandboxes/running-counts"]
    {
        client.get(path).await.assert_error(401, "X-Admin-Token is missing");
        for token in ["", "x", &wrong, &ADMIN_TOKEN[1..], &client.key] {
            let headers = [("x-admin-token", token)];
            let answer = client.ask(Method::GET, path, &headers, "").await;
            answer.assert_error(401, "X-Admin-Token is not valid");
        }
        assert_eq!(rig.admin("GET", path, Value::Null).await.status, 200);
    }
    rig.stop().await;
}

#[tokio::test]
async fn a_team_lives_from_create_to_delete() {
    let rig = Rig::start().await;
    let body = json!({
        "name": "The Lab", "tier": "pro", "limitOverrides": {"maxVcpus": 4},
        "allowedAddresses": ["127.0.0.1"],
    });
    let made = rig.admin("POST", "/admin/teams", body).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let made = made.json();
    assert_eq!((&made["slug"], &made["name"]), (&json!("the-lab"), &json!("The Lab")));
    assert_eq!(made["limitOverrides"], json!({"maxVcpus": 4}));
    assert_eq!(made["limits"]["maxVcpus"], 4);
    assert_eq!(made["limits"]["maxConcurrentSandboxes"], 100);
    assert_eq!(made["limits"]["maxLengthSeconds"], 86_400);
    assert_eq!(made["allowedAddresses"], json!(["127.0.0.1/32"]));
    let path = format!("/admin/teams/{}", made["teamID"].as_str().expect("an id"));
    assert_eq!(rig.admin("GET", &path, Value::Null).await.json(), made);
    let slugs = |teams: &Value| -> Vec<String> {
        let teams = teams.as_array().expect("a list").iter();
        teams.map(|team| team["slug"].as_str().expect("a slug").to_owned()).collect()
    };
    let all = rig.admin("GET", "/admin/teams", Value::Null).await.json();
    assert_eq!(slugs(&all), ["default", "the-lab"]);

    for (body, field) in [
        (json!({}), "name"),
        (json!({"name": ""}), "'name'"),
        (json!({"name": "a\u{0}b"}), "'name'"),
        (json!({"name": "x", "slug": "A B"}), "'slug'"),
        (json!({"name": "日本"}), "'slug'"),
        (json!({"name": "x", "tier": "gold"}), "gold"),
        (json!({"name": "x", "limitOverrides": {"maxVcpus": -1}}), "limitOverrides.maxVcpus"),
        (json!({"name": "x", "limitOverrides": {"maxLengthSeconds": 0}}), "'maxLengthSeconds'"),
        (json!({"name": "x", "limitOverrides": {"eventsTTLDays": 366}}), "'eventsTTLDays'"),
        (json!({"name": "x", "allowedAddresses": ["localhost"]}), "'allowedAddresses'"),
        (json!({"name": "x", "allowedAddresses": vec!["::1"; 257]}), "'allowedAddresses'"),
    ] {
        rig.admin("POST", "/admin/teams", body).await.assert_error(400, field);
    }
    let again = rig.admin("POST", "/admin/teams", json!({"name": "The lab"})).await;
    again.assert_error(409, "the-lab");
    let change = json!({"name": "Lab", "tier": "base", "limitOverrides": {}});
    let changed = rig.admin("PATCH", &path, change).await.json();
    assert_eq!((&changed["name"], &changed["limits"]["maxVcpus"]), (&json!("Lab"), &json!(8)));

    assert_eq!(rig.admin("DELETE", &path, Value::Null).await.status, 204);
    for method in ["GET", "DELETE"] {
        rig.admin(method, &path, Value::Null).await.assert_error(404, "there is no team");
    }
    rig.admin("PATCH", &path, json!({})).await.assert_error(404, "no such team");
    rig.admin("GET", "/admin/teams/x", Value::Null).await.assert_error(404, "there is no team");
    rig.stop().await;
}

#[tokio::test]
async fn a_team_with_sandboxes_stays_and_is_not_left_blocked() {
    let rig = Rig::start().await;
    let (team, keyed) = rig.team(json!({"name": "Lab"})).await;
    let made = keyed.post("/v2/sandboxes", r#"{"templateID":"base"}"#).await;
    assert_eq!(made.status, 201, "{}", made.text);
    let path = format!("/admin/teams/{team}");
    rig.admin("DELETE", &path, Value::Null)
        .await
        .assert_error(409, "1 running or paused sandboxes");
    assert_eq!(keyed.get("/sandboxes").await.status, 200, "it can go on");
    let counts = rig.admin("GET", "/admin/sandboxes/running-counts", Value::Null).await.json();
    assert_eq!(counts, json!({team.as_str(): 1}));
    let killed = rig.admin("POST", &format!("{path}/sandboxes/kill"), Value::Null).await;
    assert_eq!((killed.status, killed.json()), (200, json!({"killedCount": 1, "failedCount": 0})));
    // The end is written behind.
    eventually("it can be removed", || async {
        rig.admin("DELETE", &path, Value::Null).await.status == 204
    })
    .await;
    keyed.get("/sandboxes").await.assert_error(401, "X-API-Key");
    rig.stop().await;
}

#[tokio::test]
async fn a_team_is_removed_to_the_end_when_the_operator_leaves() {
    let rig = Rig::start().await;
    let (team, _) = rig.team(json!({"name": "Lab"})).await;
    let file = rig.dir.path().join("control.db");
    let db = SqlitePool::connect(&format!("sqlite:{}", file.display())).await.expect("the store");
    // The last step takes long enough for the operator to leave in it.
    for statement in [
        "CREATE TABLE many AS WITH RECURSIVE n(x) AS \
         (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 4000) SELECT x FROM n",
        "CREATE TRIGGER slow BEFORE DELETE ON teams BEGIN \
         SELECT SUM(a.x * b.x) FROM many a, many b; END",
    ] {
        sqlx::query(statement).execute(&db).await.expect("a slow database");
    }
    let mut stream = TcpStream::connect(rig.control.address).await.expect("a connection");
    let request = format!(
        "DELETE /admin/teams/{team} HTTP/1.1\r\nHost: x\r\nX-Admin-Token: {ADMIN_TOKEN}\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.expect("it is taken");
    eventually("it is under way", || async {
        let blocked: Option<Option<String>> =
            sqlx::query_scalar("SELECT blocked_reason FROM teams WHERE id = ?")
                .bind(&team)
                .fetch_optional(&db)
                .await
                .expect("a row");
        blocked.flatten().is_some()
    })
    .await;
    drop(stream);
    let path = format!("/admin/teams/{team}");
    eventually("it is gone", || async { rig.admin("GET", &path, Value::Null).await.status == 404 })
        .await;
    db.close().await;
    rig.stop().await;
}

#[tokio::test]
async fn killing_for_a_team_leaves_other_teams_alone() {
    let rig = Rig::start().await;
    let (team, keyed) = rig.team(json!({"name": "Lab", "tier": "pro"})).await;
    let mine = rig.create(r#"{"templateID":"base"}"#).await;
    for _ in 0..20 {
        let made = keyed.post("/v2/sandboxes", r#"{"templateID":"base"}"#).await;
        assert_eq!(made.status, 201, "{}", made.text);
    }
    let path = format!("/admin/teams/{team}/sandboxes/kill");
    let killed = rig.admin("POST", &path, Value::Null).await.json();
    assert_eq!(killed, json!({"killedCount": 20, "failedCount": 0}));
    assert_eq!(keyed.get("/sandboxes").await.json(), json!([]));
    assert!(rig.node.state.holds(&mine));
    let again = rig.admin("POST", &path, Value::Null).await.json();
    assert_eq!(again, json!({"killedCount": 0, "failedCount": 0}));
    let builds = format!("/admin/teams/{team}/builds/cancel");
    let cancelled = rig.admin("POST", &builds, Value::Null).await;
    assert_eq!(cancelled.json(), json!({"cancelledCount": 0, "failedCount": 0}));
    let nobody = "/admin/teams/6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11/sandboxes/kill";
    rig.admin("POST", nobody, Value::Null).await.assert_error(404, "there is no team");
    rig.stop().await;
}

#[tokio::test]
async fn tiers_are_listed_changed_and_removed() {
    let rig = Rig::start().await;
    let tiers = rig.admin("GET", "/admin/tiers", Value::Null).await.json();
    assert_eq!(tiers[0]["id"], "base");
    assert_eq!(tiers[0]["maxConcurrentSandboxes"], 20);
    assert_eq!(tiers[1]["maxConcurrentSandboxes"], 1000, "`local` is what the server was told");
    let mut gold = tiers[0].clone();
    gold["maxConcurrentSandboxes"] = json!(1);
    let put = rig.admin("PUT", "/admin/tiers/gold", gold.clone()).await;
    assert_eq!((put.status, &put.json()["id"]), (200, &json!("gold")), "{}", put.text);
    let (team, keyed) = rig.team(json!({"name": "Lab", "tier": "gold"})).await;
    let create = async || keyed.post("/v2/sandboxes", r#"{"templateID":"base"}"#).await;
    assert_eq!(create().await.status, 201);
    create().await.assert_error(429, "concurrent E2B sandboxes (1)");
    gold["maxConcurrentSandboxes"] = json!(2);
    assert_eq!(rig.admin("PUT", "/admin/tiers/gold", gold).await.status, 200);
    assert_eq!(create().await.status, 201, "teams have new limits at once");

    rig.admin("DELETE", "/admin/tiers/gold", Value::Null).await.assert_error(409, "has teams");
    rig.admin("DELETE", "/admin/tiers/base", Value::Null).await.assert_error(409, "every server");
    rig.admin("PATCH", &format!("/admin/teams/{team}"), json!({"tier": "pro"})).await;
    assert_eq!(rig.admin("DELETE", "/admin/tiers/gold", Value::Null).await.status, 204);
    rig.admin("DELETE", "/admin/tiers/gold", Value::Null).await.assert_error(404, "no such tier");
    rig.admin("PUT", "/admin/tiers/Gold!", tiers[0].clone()).await.assert_error(400, "'tierID'");
    rig.admin("PUT", "/admin/tiers/x", json!({})).await.assert_error(400, "missing field");
    rig.stop().await;
}

#[tokio::test]
async fn users_and_their_memberships_are_kept() {
    let rig = Rig::start().await;
    let body = json!({
        "email": "ada@example.org",
        "identity": {"issuer": "https://id.example.org", "subject": "1"},
    });
    let ada = rig.admin("POST", "/admin/users", body.clone()).await;
    assert_eq!(ada.status, 201, "{}", ada.text);
    let ada = ada.json();
    assert_eq!(ada["identities"], json!([body["identity"]]));
    rig.admin("POST", "/admin/users", body).await.assert_error(409, "ada@example.org");
    let same = json!({
        "email": "eve@example.org",
        "identity": {"issuer": "https://id.example.org", "subject": "1"},
    });
    rig.admin("POST", "/admin/users", same).await.assert_error(409, "identity");
    rig.admin("POST", "/admin/users", json!({"email": "x"})).await.assert_error(400, "'email'");
    assert_eq!(rig.admin("GET", "/admin/users", Value::Null).await.json(), json!([ada]));

    let id = ada["id"].as_str().expect("an id");
    let (team, _) = rig.team(json!({"name": "Lab"})).await;
    let member = format!("/admin/teams/{team}/members/{id}");
    let put = rig.admin("PUT", &member, json!({"isDefault": true})).await.json();
    assert_eq!(put, json!({"userID": id, "email": "ada@example.org", "isDefault": true}));
    let members = format!("/admin/teams/{team}/members");
    assert_eq!(rig.admin("GET", &members, Value::Null).await.json(), json!([put]));
    let nobody = format!("/admin/teams/{team}/members/6f2b8a52-9d0f-4a43-a0bb-5d2f6b7f8c11");
    rig.admin("PUT", &nobody, Value::Null).await.assert_error(404, "no such user");
    assert_eq!(rig.admin("DELETE", &member, Value::Null).await.status, 204);
    rig.admin("DELETE", &member, Value::Null).await.assert_error(404, "not a member");

    let tokens = format!("/admin/users/{id}/access-tokens");
    let made = rig.admin("POST", &tokens, json!({"name": "laptop"})).await.json();
    let shown = rig.admin("GET", &tokens, Value::Null).await.json();
    assert_eq!((&shown[0]["id"], &shown[0]["name"]), (&made["id"], &json!("laptop")));
    assert!(shown[0].get("token").is_none(), "{shown}");
    let token = format!("{tokens}/{}", made["id"].as_str().expect("an id"));
    assert_eq!(rig.admin("DELETE", &token, Value::Null).await.status, 204);
    rig.admin("DELETE", &token, Value::Null).await.assert_error(404, "no such access token");
    rig.stop().await;
}

/// The time of a key's last use is written behind, and at the latest when the server stops.
#[tokio::test]
async fn a_key_s_last_use_is_known_after_a_stop() {
    let rig = Rig::start().await;
    let (team, keyed) = rig.team(json!({"name": "Lab"})).await;
    assert_eq!(keyed.get("/sandboxes").await.status, 200);
    let Rig { dir, node, control } = rig;
    control.stop().await;
    let control = crate::support::Control::start(dir.path(), crate::support::config()).await;
    let rig = Rig { dir, node, control };
    let keys = rig.admin("GET", &format!("/admin/teams/{team}/api-keys"), Value::Null).await.json();
    assert!(keys[0]["lastUsed"].is_string(), "{keys}");
    rig.stop().await;
}

#[tokio::test]
async fn without_an_operator_s_token_nobody_is_the_operator() {
    use crate::support::{Routes, config};
    use belljar_control::{Deps, RouteSink};
    use std::sync::Arc;
    let dir = tempfile::tempdir().expect("a temporary folder");
    let node = crate::support::node::FakeNode::start(&dir.path().join("node.sock")).await;
    let store = Store::open(&dir.path().join("control.db")).await.expect("a store");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let client = crate::support::client::Client::new(listener.local_addr().expect("one"), "");
    let routes: Arc<dyn RouteSink> = Arc::new(Routes::default());
    let node_sockets = vec![dir.path().join("node.sock")];
    let store_of = store.clone();
    let deps = Deps { node_sockets, routes, admin_token: None, wake: None, store: store_of };
    let scope = belljar_daemon::Scope::root("test");
    let serving = belljar_control::serve(config(), deps, listener, scope.clone());
    let asking = async {
        for token in ["", "x", ADMIN_TOKEN] {
            let headers = [("x-admin-token", token)];
            let answer = client.ask(Method::GET, "/admin/teams", &headers, "").await;
            answer.assert_error(401, "X-Admin-Token is not valid");
        }
        scope.cancel();
    };
    let (served, ()) = tokio::join!(serving, asking);
    served.expect("it served");
    assert!(scope.close(crate::support::PATIENCE).await);
    store.close().await;
    node.stop().await;
}
