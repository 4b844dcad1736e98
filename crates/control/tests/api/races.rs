//! Several callers at one sandbox: whatever the order, the table, the node and the store agree.

use serde_json::Value;
use sqlx::SqlitePool;

use crate::support::node::State;
use crate::support::{Rig, config, eventually};

const CREATE: &str = r#"{"templateID":"base","timeout":100}"#;

fn millis(time: &Value) -> i64 {
    let time = time.as_str().expect("a time");
    chrono::DateTime::parse_from_rfc3339(time).expect("RFC 3339").timestamp_millis()
}

async fn node_was_asked(state: &State, creates: usize) -> String {
    eventually("the create is at the node", || async {
        state.creates.lock().expect("no panic holds it").len() == creates
    })
    .await;
    let creates = state.creates.lock().expect("no panic holds it");
    creates.last().expect("there is one").sandbox_id.clone()
}

#[tokio::test]
async fn any_number_of_changes_at_once_end_with_everybody_agreeing() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}");
    let changes = (0..60).map(|n| {
        let path = path.clone();
        async move {
            let answer = match n % 3 {
                0 => {
                    let body = format!(r#"{{"timeout":{}}}"#, 100 + n);
                    client.post(&format!("{path}/timeout"), &body).await
                }
                1 => {
                    let body = format!(r#"{{"timeout":{}}}"#, 2000 - n);
                    client.post(&format!("{path}/connect"), &body).await
                }
                _ => client.post(&format!("{path}/refreshes"), r#"{"duration":900}"#).await,
            };
            assert!([200, 204].contains(&answer.status), "{}", answer.text);
        }
    });
    futures::future::join_all(changes).await;
    let on_node = rig.node.state.end_of(&id);
    let last_set = rig.node.state.ends_set.lock().expect("no panic holds it").last().cloned();
    assert_eq!(last_set, Some((id.clone(), on_node)));
    assert_eq!(millis(&client.get(&path).await.json()["endAt"]), on_node);
    let file = rig.dir.path().join("control.db");
    let db = SqlitePool::connect(&format!("sqlite:{}", file.display())).await.expect("the store");
    eventually("the store agrees", || async {
        let stored: Option<i64> =
            sqlx::query_scalar("SELECT end_at_ms FROM sandboxes WHERE sandbox_id = ?")
                .bind(&id)
                .fetch_optional(&db)
                .await
                .expect("a row");
        stored == Some(on_node)
    })
    .await;
    db.close().await;
    rig.stop().await;
}

#[tokio::test]
async fn a_connect_that_waited_does_not_shorten() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}/connect");
    rig.node.state.hold_end_moves.send_replace(true);
    let (long, short) = tokio::join!(client.post(&path, r#"{"timeout":3000}"#), async {
        eventually("the long one is at the node", || async {
            !rig.node.state.ends_set.lock().expect("no panic holds it").is_empty()
        })
        .await;
        let short = client.post(&path, r#"{"timeout":500}"#);
        let release = async { rig.node.state.hold_end_moves.send_replace(false) };
        tokio::join!(short, release).0
    });
    assert_eq!((long.status, short.status), (200, 200));
    // The short one saw what the long one did, and had nothing to ask of the node.
    assert_eq!(rig.node.state.ends_set.lock().expect("no panic holds it").len(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn a_kill_does_not_wait_for_a_change_and_the_change_finds_nothing() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}");
    rig.node.state.hold_end_moves.send_replace(true);
    let timeout = format!("{path}/timeout");
    let ((), first, second) = tokio::join!(
        async {
            eventually("a change is at the node", || async {
                !rig.node.state.ends_set.lock().expect("no panic holds it").is_empty()
            })
            .await;
            assert_eq!(client.delete(&path).await.status, 204);
            rig.node.state.hold_end_moves.send_replace(false);
        },
        client.post(&timeout, r#"{"timeout":500}"#),
        client.post(&timeout, r#"{"timeout":600}"#),
    );
    for answer in [first, second] {
        answer.assert_error(404, "doesn't exist");
    }
    client.get(&path).await.assert_error(404, "doesn't exist");
    assert!(!rig.node.state.holds(&id));
    assert!(rig.control.routes.get(&id).is_none());
    rig.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_is_starting_can_be_killed_once() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    rig.node.state.hold_creates.send_replace(true);
    let (created, (first, second)) = tokio::join!(client.post("/v2/sandboxes", CREATE), async {
        let id = node_was_asked(&rig.node.state, 1).await;
        let path = format!("/sandboxes/{id}");
        let release = async { rig.node.state.hold_creates.send_replace(false) };
        let (first, second, _) = tokio::join!(client.delete(&path), client.delete(&path), release);
        (first, second)
    });
    let id = created.sandbox_id();
    let mut statuses = [first.status, second.status];
    statuses.sort_unstable();
    assert_eq!(statuses, [204, 404]);
    assert!(!rig.node.state.holds(&id));
    assert!(rig.control.routes.get(&id).is_none());
    assert_eq!(client.get("/v2/sandboxes").await.text, "[]");
    rig.stop().await;
}

#[tokio::test]
async fn a_kill_of_a_start_that_fails_finds_nothing() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    rig.node.state.hold_creates.send_replace(true);
    let error = connectrpc::ConnectError::invalid_argument("no");
    *rig.node.state.next_create.lock().expect("no panic holds it") = Some(error);
    let (created, killed) = tokio::join!(client.post("/v2/sandboxes", CREATE), async {
        let id = node_was_asked(&rig.node.state, 1).await;
        let release = async { rig.node.state.hold_creates.send_replace(false) };
        let path = format!("/sandboxes/{id}");
        tokio::join!(client.delete(&path), release).0
    });
    created.assert_error(400, "no");
    killed.assert_error(404, "doesn't exist");
    rig.stop().await;
}

#[tokio::test]
async fn of_a_kill_and_an_end_by_itself_the_first_is_written() {
    let often = belljar_control::Config {
        reconcile_interval: std::time::Duration::from_millis(50),
        ..config()
    };
    let rig = Rig::start_with(often).await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    rig.node.state.end(&id, "expired");
    let killed = client.delete(&format!("/sandboxes/{id}")).await;
    killed.assert_error(404, "doesn't exist");
    let file = rig.dir.path().join("control.db");
    let db = SqlitePool::connect(&format!("sqlite:{}", file.display())).await.expect("the store");
    eventually("its end is written", || async {
        let reason: Option<Option<String>> =
            sqlx::query_scalar("SELECT end_reason FROM sandboxes WHERE sandbox_id = ?")
                .bind(&id)
                .fetch_optional(&db)
                .await
                .expect("a row");
        reason.flatten().as_deref() == Some("expired")
    })
    .await;
    db.close().await;
    rig.stop().await;
}

#[tokio::test]
async fn an_end_that_is_noticed_before_it_is_told_has_its_own_reason() {
    let often = belljar_control::Config {
        reconcile_interval: std::time::Duration::from_millis(50),
        ..config()
    };
    let rig = Rig::start_with(often).await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    let gone = rig.node.state.end_silently(&id);
    // A reconcile that lists the node after the first of these has ended before the third.
    let mut lists = rig.node.state.lists.subscribe();
    let before = *lists.borrow_and_update();
    lists.wait_for(|lists| *lists >= before + 3).await.expect("the node outlives its calls");
    client.get(&format!("/sandboxes/{id}")).await.assert_error(404, "doesn't exist");
    rig.node.state.report(&gone, "crashed");
    let file = rig.dir.path().join("control.db");
    let db = SqlitePool::connect(&format!("sqlite:{}", file.display())).await.expect("the store");
    let reason = async || -> Option<String> {
        sqlx::query_scalar::<_, Option<String>>(
            "SELECT end_reason FROM sandboxes WHERE sandbox_id = ?",
        )
        .bind(&id)
        .fetch_optional(&db)
        .await
        .expect("a row")
        .flatten()
    };
    eventually("its end is written", || async { reason().await.is_some() }).await;
    assert_eq!(reason().await.as_deref(), Some("crashed"));
    db.close().await;
    rig.stop().await;
}
