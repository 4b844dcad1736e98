//! What a control plane does with sandboxes that it finds on a node and does not know.

use std::path::Path;
use std::time::Duration;

use belljar_control::Config;
use belljar_domain::{ExecutionId, SandboxId};
use belljar_wire::rpc::belljar::node::v1::ReclaimedSandbox;
use serde_json::json;
use sqlx::SqlitePool;

use crate::support::node::{BUILD_ID, State, TEMPLATE_ID, sandbox_info};
use crate::support::{Control, Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base"}"#;

fn often() -> Config {
    Config { reconcile_interval: Duration::from_millis(50), ..config() }
}

async fn open_store(dir: &Path) -> SqlitePool {
    let file = dir.join("control.db");
    SqlitePool::connect(&format!("sqlite:{}", file.display())).await.expect("the store's file")
}

fn put(state: &State, terms: &str) -> String {
    let id = SandboxId::random().to_string();
    let mut info = sandbox_info(&id, ExecutionId::random().as_str(), i64::MAX);
    info.terms = terms.to_owned();
    state.sandboxes.lock().expect("no panic holds it").insert(id.clone(), info);
    id
}

#[tokio::test]
async fn a_sandbox_the_store_never_heard_of_is_taken_over_as_it_was() {
    let Rig { dir, node, control } = Rig::start().await;
    let body = json!({
        "templateID": "base", "timeout": 900, "secure": false, "allow_internet_access": false,
        "metadata": {"user": "alice \u{fc}"},
    });
    let open = control.client.post("/sandboxes", &body.to_string()).await.sandbox_id();
    let secure = control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    let mut before = Vec::new();
    for id in [&open, &secure] {
        before.push(control.client.get(&format!("/sandboxes/{id}")).await.json());
    }
    control.stop().await;
    // As after a crash before anything was written.
    let db = open_store(dir.path()).await;
    let deleted = sqlx::query("DELETE FROM sandboxes").execute(&db).await.expect("a delete");
    assert_eq!(deleted.rows_affected(), 2);

    let control = Control::start(dir.path(), config()).await;
    for (id, before) in [&open, &secure].into_iter().zip(before) {
        assert_eq!(control.client.get(&format!("/sandboxes/{id}")).await.json(), before);
        assert!(control.routes.get(id).is_some());
    }
    eventually("both are stored again", || async {
        let rows: i64 = sqlx::query_scalar("SELECT COUNT(*) FROM sandboxes")
            .fetch_one(&db)
            .await
            .expect("a count");
        rows == 2
    })
    .await;
    assert_eq!(control.client.delete(&format!("/sandboxes/{open}")).await.status, 204);
    db.close().await;
    control.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn what_is_nobodys_is_killed() {
    let rig = Rig::start_with(often()).await;
    let state = &rig.node.state;
    rig.create(CREATE).await;
    let good = state.creates.lock().expect("no panic holds it")[0].terms.clone();
    let team = serde_json::from_str::<serde_json::Value>(&good).expect("JSON")["team"].clone();
    let team = team.as_str().expect("a team").to_owned();
    let gone = good.replace(&team, "00000000-0000-4000-8000-000000000000");
    let strangers: Vec<_> =
        ["", "{}", "nonsense", &gone].into_iter().map(|terms| put(state, terms)).collect();
    let ours = put(state, &good);
    let client = &rig.control.client;
    eventually("ours is adopted", || async {
        client.get(&format!("/sandboxes/{ours}")).await.status == 200
    })
    .await;
    for stranger in &strangers {
        eventually("the stranger is gone", || async { !state.holds(stranger) }).await;
        client.get(&format!("/sandboxes/{stranger}")).await.assert_error(404, "doesn't exist");
    }
    assert!(state.holds(&ours));
    rig.stop().await;
}

#[tokio::test]
async fn a_create_that_nobody_waits_for_any_more_leaves_nothing() {
    let Rig { dir, node, control } = Rig::start().await;
    node.state.hold_creates.send_replace(true);
    let state = node.state.clone();
    let (lost, (node, asked)) = tokio::join!(control.client.post("/v2/sandboxes", CREATE), async {
        eventually("the create is at the node", || async {
            !state.creates.lock().expect("no panic holds it").is_empty()
        })
        .await;
        let asked = state.creates.lock().expect("no panic holds it")[0].clone();
        // It runs, and whoever asked for it never learns its id.
        state.run(&asked);
        (node.reconnect().await, asked)
    });
    assert_eq!(lost.status, 503, "{}", lost.text);
    eventually("it is killed", || async { !state.holds(&asked.sandbox_id) }).await;
    assert_eq!(control.client.get("/v2/sandboxes").await.text, "[]");
    control.stop().await;
    node.stop().await;
    drop(dir);
}

#[tokio::test]
async fn what_ended_with_its_node_is_written_and_then_forgotten_there() {
    let Rig { dir, node, control } = Rig::start().await;
    control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    let terms = node.state.creates.lock().expect("no panic holds it")[0].terms.clone();
    let known = control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    let execution =
        node.state.sandboxes.lock().expect("no panic holds it")[&known].execution_id.clone();
    control.stop().await;
    let reclaimed = |id: &str, execution: &str, terms: &str, reason: &str| ReclaimedSandbox {
        sandbox_id: id.to_owned(),
        execution_id: execution.to_owned(),
        template_id: TEMPLATE_ID.to_owned(),
        build_id: BUILD_ID.to_owned(),
        terms: terms.to_owned(),
        started_at_unix_ms: 1_000,
        end_at_unix_ms: 9_000,
        vcpus: 2,
        memory_mib: 512,
        disk_mib: 1024,
        reclaimed_at_unix_ms: 5_000,
        reason: reason.to_owned(),
        ..Default::default()
    };
    node.state.end_silently(&known);
    let mut all = vec![reclaimed(&known, &execution, &terms, "shutdown")];
    for _ in 0..7 {
        let (id, execution) = (SandboxId::random(), ExecutionId::random());
        all.push(reclaimed(id.as_str(), execution.as_str(), &terms, "lost"));
    }
    all.push(reclaimed("iother", ExecutionId::random().as_str(), "nonsense", "lost"));
    *node.state.reclaimed.lock().expect("no panic holds it") = all;

    // These ended long ago, and are to be looked at all the same.
    let control = Control::start(dir.path(), Config { runs_kept: Duration::MAX, ..config() }).await;
    assert!(node.state.reclaimed.lock().expect("no panic holds it").is_empty());
    let db = open_store(dir.path()).await;
    let ended: Vec<(String, i64)> = sqlx::query_as(
        "SELECT end_reason, ended_at_ms FROM sandboxes WHERE ended_at_ms IS NOT NULL \
         ORDER BY end_reason",
    )
    .fetch_all(&db)
    .await
    .expect("rows");
    let expected = |reason: &str| (reason.to_owned(), 5_000);
    let mut wanted = vec![expected("lost"); 7];
    wanted.push(expected("shutdown"));
    assert_eq!(ended, wanted);
    control.client.get(&format!("/sandboxes/{known}")).await.assert_error(404, "doesn't exist");
    db.close().await;
    control.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn runs_that_ended_long_ago_leave_the_store_and_stay_counted() {
    let Rig { dir, node, control } = Rig::start().await;
    let ended = control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    control.client.post("/v2/sandboxes", CREATE).await.sandbox_id();
    assert_eq!(control.client.delete(&format!("/sandboxes/{ended}")).await.status, 204);
    control.stop().await;
    let db = open_store(dir.path()).await;
    let rows = async || -> i64 {
        sqlx::query_scalar("SELECT COUNT(*) FROM sandboxes").fetch_one(&db).await.expect("a count")
    };
    assert_eq!(rows().await, 2);
    // Nothing is as old as a month, and everything as old as nothing.
    let control = Control::start(dir.path(), config()).await;
    assert_eq!(rows().await, 2);
    control.stop().await;
    let at_once = Config { runs_kept: Duration::ZERO, ..config() };
    let control = Control::start(dir.path(), at_once).await;
    eventually("only the running one is left", || async { rows().await == 1 }).await;
    assert_eq!(control.client.get("/templates/base").await.json()["spawnCount"], 2);
    db.close().await;
    control.stop().await;
    node.stop().await;
}
