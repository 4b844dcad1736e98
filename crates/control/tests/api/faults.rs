//! What happens between the control plane, its node and its store when things go wrong.

use std::sync::Arc;
use std::time::Duration;

use belljar_control::{Config, Deps, RouteSink, ServeError, Store};
use belljar_daemon::{Scope, clock};
use belljar_domain::{ExecutionId, SandboxId};
use connectrpc::ConnectError;
use serde_json::json;
use sqlx::SqlitePool;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

use crate::support::node::{FakeNode, sandbox_info};
use crate::support::{Control, PATIENCE, Rig, Routes, config, eventually};

const CREATE: &str = r#"{"templateID":"base"}"#;

#[tokio::test]
async fn a_body_of_300_mb_is_refused_cleanly_and_not_kept() {
    const MB: usize = 1 << 20;
    let rig = Rig::start().await;
    let memory_before = resident_bytes();
    for chunked in [false, true] {
        let mut stream = TcpStream::connect(rig.control.address).await.expect("a connection");
        let framing = if chunked {
            "Transfer-Encoding: chunked".to_owned()
        } else {
            format!("Content-Length: {}", 300 * MB)
        };
        let key = &rig.control.client.key;
        let head = format!(
            "POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n{framing}\r\n\r\n"
        );
        let talk = async {
            stream.write_all(head.as_bytes()).await.expect("the head is taken");
            let block = vec![b' '; MB];
            for _ in 0..300 {
                if chunked {
                    stream.write_all(b"100000\r\n").await.expect("a chunk is taken");
                }
                stream.write_all(&block).await.expect("the body is taken to its end");
                if chunked {
                    stream.write_all(b"\r\n").await.expect("a chunk is taken");
                }
            }
            if chunked {
                stream.write_all(b"0\r\n\r\n").await.expect("the end is taken");
            }
            stream.shutdown().await.expect("a clean close");
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await.expect("the answer, and no reset");
            answer
        };
        let answer = tokio::time::timeout(PATIENCE, talk).await.expect("it does not hang");
        assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
        assert!(
            answer.contains(r#"{"code":413,"message":"the request body is larger"#),
            "{answer}"
        );
    }
    let grown = resident_bytes().saturating_sub(memory_before);
    assert!(grown < 100 * MB, "memory grew by {grown} bytes");
    rig.create(CREATE).await;
    rig.stop().await;
}

/// Source: proc(5), `statm`: the second number is resident pages.
fn resident_bytes() -> usize {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("proc is mounted");
    let pages = statm.split(' ').nth(1).expect("a second number");
    pages.parse::<usize>().expect("a number") * 4096
}

#[tokio::test]
async fn a_team_has_a_limit_that_counts_what_is_starting() {
    let rig = Rig::start_with(Config { max_concurrent_sandboxes: 2, ..config() }).await;
    let client = &rig.control.client;
    let first = rig.create(CREATE).await;
    rig.node.state.hold_creates.send_replace(true);
    let limit = "you have reached the maximum number of concurrent E2B sandboxes (2)";
    let (second, ()) = tokio::join!(client.post("/sandboxes", CREATE), async {
        eventually("the second create is at the node", || async {
            rig.node.state.creates.lock().expect("no panic holds it").len() == 2
        })
        .await;
        client.post("/v2/sandboxes", CREATE).await.assert_error(429, limit);
        // What is starting cannot be seen yet.
        let starting = rig.node.state.creates.lock().expect("no panic holds it")[1].clone();
        let path = format!("/sandboxes/{}", starting.sandbox_id);
        client.get(&path).await.assert_error(404, "doesn't exist");
        rig.node.state.hold_creates.send_replace(false);
    });
    assert_eq!(second.status, 201);
    client.post("/sandboxes", CREATE).await.assert_error(429, limit);
    assert_eq!(client.delete(&format!("/sandboxes/{first}")).await.status, 204);
    rig.create(CREATE).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_creator_who_leaves_breaks_nothing() {
    let rig = Rig::start().await;
    rig.node.state.hold_creates.send_replace(true);
    let mut stream = TcpStream::connect(rig.control.address).await.expect("a connection");
    let key = &rig.control.client.key;
    let length = CREATE.len();
    let request = format!(
        "POST /v2/sandboxes HTTP/1.1\r\nHost: x\r\nX-API-Key: {key}\r\n\
         Content-Length: {length}\r\n\r\n{CREATE}"
    );
    stream.write_all(request.as_bytes()).await.expect("it is taken");
    eventually("the create is at the node", || async {
        !rig.node.state.creates.lock().expect("no panic holds it").is_empty()
    })
    .await;
    drop(stream);
    rig.node.state.hold_creates.send_replace(false);
    let client = &rig.control.client;
    eventually("the sandbox is there", || async {
        client.get("/sandboxes").await.json().as_array().map(Vec::len) == Some(1)
    })
    .await;
    rig.stop().await;
}

#[tokio::test]
async fn of_many_kills_one_succeeds() {
    let rig = Rig::start().await;
    let id = rig.create(CREATE).await;
    let path = format!("/sandboxes/{id}");
    let kills = (0..10).map(|_| rig.control.client.delete(&path));
    let statuses: Vec<u16> =
        futures::future::join_all(kills).await.iter().map(|answer| answer.status).collect();
    assert_eq!(statuses.iter().filter(|s| **s == 204).count(), 1, "{statuses:?}");
    assert_eq!(statuses.iter().filter(|s| **s == 404).count(), 9, "{statuses:?}");
    rig.stop().await;
}

#[tokio::test]
async fn what_the_node_says_reaches_the_client_in_the_contracts_words() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    for (error, status, message, code, retry) in [
        (
            ConnectError::resource_exhausted("full"),
            503,
            "no room",
            "sandbox_capacity_unavailable",
            true,
        ),
        (ConnectError::unavailable("busy"), 503, "no room", "sandbox_capacity_unavailable", true),
        (
            ConnectError::deadline_exceeded("slow"),
            504,
            "in time",
            "sandbox_placement_timeout",
            true,
        ),
        (ConnectError::internal("secret"), 500, "could not", "sandbox_create_failed", false),
        (ConnectError::failed_precondition("no"), 500, "refused", "sandbox_create_refused", false),
        (ConnectError::invalid_argument("bad env"), 400, "bad env", "", false),
        (ConnectError::not_found("build"), 404, "template 'base' not found", "", false),
    ] {
        *rig.node.state.next_create.lock().expect("no panic holds it") = Some(error);
        let answer = client.post("/v2/sandboxes", CREATE).await;
        answer.assert_error(status, message);
        assert_eq!(answer.json()["error_code"].as_str().unwrap_or_default(), code);
        assert_eq!(answer.headers.get("should-retry").is_some_and(|v| v == "true"), retry);
        assert!(!answer.text.contains("secret"));
    }
    assert_eq!(client.get("/sandboxes").await.text, "[]");
    rig.stop().await;
}

#[tokio::test]
async fn a_sandbox_that_dies_at_once_was_never_there() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    *rig.node.state.end_at_once.lock().expect("no panic holds it") = true;
    let answer = client.post("/v2/sandboxes", CREATE).await;
    // The end may be heard before or after the answer to the create.
    assert!([201, 503].contains(&answer.status), "{}", answer.text);
    eventually("nothing is left", || async { client.get("/sandboxes").await.text == "[]" }).await;
    rig.stop().await;
}

#[tokio::test]
async fn ends_are_followed() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let id = rig.create(CREATE).await;
    rig.node.state.end(&id, "crashed");
    let path = format!("/sandboxes/{id}");
    eventually("it is gone", || async { client.get(&path).await.status == 404 }).await;
    assert!(rig.control.routes.get(&id).is_none());
    rig.stop().await;
}

#[tokio::test]
async fn ends_that_were_missed_are_found() {
    let often = Config { reconcile_interval: Duration::from_millis(50), ..config() };
    let rig = Rig::start_with(often).await;
    let client = &rig.control.client;
    let (lost, kept) = (rig.create(CREATE).await, rig.create(CREATE).await);
    rig.node.state.end_silently(&lost);
    let path = format!("/sandboxes/{lost}");
    eventually("it is gone", || async { client.get(&path).await.status == 404 }).await;
    assert!(rig.control.routes.get(&lost).is_none());
    assert_eq!(client.get(&format!("/sandboxes/{kept}")).await.status, 200);
    // A stranger is killed.
    let stranger = SandboxId::random();
    let info = sandbox_info(stranger.as_str(), ExecutionId::random().as_str(), i64::MAX);
    let state = &rig.node.state;
    state.sandboxes.lock().expect("no panic holds it").insert(stranger.to_string(), info);
    eventually("the stranger is gone", || async { !state.holds(stranger.as_str()) }).await;
    rig.stop().await;
}

#[tokio::test]
async fn a_node_that_restarts_is_followed_again() {
    let Rig { dir, node, control } = Rig::start().await;
    let client = &control.client;
    let created = client.post("/v2/sandboxes", CREATE).await.json();
    let id = created["sandboxID"].as_str().expect("an id").to_owned();
    let path = format!("/sandboxes/{id}");

    // Its connections break, its sandboxes stay.
    let node = node.reconnect().await;
    eventually("the node can be used again", || async {
        client.post("/v2/sandboxes", CREATE).await.status == 201
    })
    .await;
    assert_eq!(client.get(&path).await.status, 200);

    // While it is away, what is known is answered; what needs it says so.
    let node_socket = dir.path().join("node.sock");
    node.stop().await;
    assert_eq!(client.get(&path).await.status, 200);
    let away = client.post("/v2/sandboxes", CREATE).await;
    away.assert_error(503, "no room");
    assert_eq!(away.json()["error_code"], "sandbox_capacity_unavailable");
    client.delete(&path).await.assert_error(503, "try again");
    assert_eq!(client.get(&path).await.status, 200);

    // It comes back empty.
    let node = FakeNode::start(&node_socket).await;
    eventually("the sandbox is gone", || async { client.get(&path).await.status == 404 }).await;
    assert!(control.routes.get(&id).is_none());
    let node = node.restart_empty().await;
    eventually("the node can be used again", || async {
        client.post("/v2/sandboxes", CREATE).await.status == 201
    })
    .await;
    control.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn a_control_plane_that_restarts_knows_what_runs() {
    let Rig { dir, node, control } = Rig::start().await;
    let body = json!({"templateID": "base", "metadata": {"user": "alice"}, "secure": true});
    let kept = control.client.post("/sandboxes", &body.to_string()).await.json();
    let kept = kept["sandboxID"].as_str().expect("an id").to_owned();
    let open = control.client.post("/sandboxes", r#"{"templateID":"base","secure":false}"#).await;
    let open = open.json()["sandboxID"].as_str().expect("an id").to_owned();
    let lost = control.client.post("/sandboxes", CREATE).await.json();
    let lost = lost["sandboxID"].as_str().expect("an id").to_owned();
    let before = control.client.get(&format!("/sandboxes/{kept}")).await.json();
    let path = format!("/sandboxes/{open}/timeout");
    assert_eq!(control.client.post(&path, r#"{"timeout":900}"#).await.status, 204);
    control.stop().await;

    node.state.end_silently(&lost);
    let stranger = SandboxId::random();
    let info = sandbox_info(stranger.as_str(), ExecutionId::random().as_str(), i64::MAX);
    node.state.sandboxes.lock().expect("no panic holds it").insert(stranger.to_string(), info);

    let control = Control::start(dir.path(), config()).await;
    let client = &control.client;
    assert_eq!(client.get(&format!("/sandboxes/{kept}")).await.json(), before);
    let detail = client.get(&format!("/sandboxes/{open}")).await.json();
    assert_eq!(detail.get("envdAccessToken"), None);
    assert_eq!(client.get(&format!("/sandboxes/{lost}")).await.status, 404);
    assert!(!node.state.holds(stranger.as_str()));
    let token = control.routes.get(&kept).expect("a route").envd_access_token.expect("a token");
    assert_eq!(before["envdAccessToken"], json!(token.expose()));
    assert!(control.routes.get(&open).expect("a route").envd_access_token.is_none());
    assert!(node.state.end_of(&open) > clock::now().0 + 800_000);
    assert_eq!(client.delete(&format!("/sandboxes/{kept}")).await.status, 204);
    control.stop().await;

    // What was lost and killed stays so.
    let control = Control::start(dir.path(), config()).await;
    let listed = control.client.get("/sandboxes").await.json();
    assert_eq!(listed.as_array().map(Vec::len), Some(1));
    assert_eq!(listed[0]["sandboxID"], json!(open));
    control.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn the_store_tells_how_each_run_went() {
    let often = Config { reconcile_interval: Duration::from_millis(50), ..config() };
    let Rig { dir, node, control } = Rig::start_with(often.clone()).await;
    let client = &control.client;
    let mut made = Vec::new();
    for _ in 0..4 {
        let created = client.post("/v2/sandboxes", CREATE).await.json();
        made.push(created["sandboxID"].as_str().expect("an id").to_owned());
    }
    let [killed, crashed, lost, kept] = made.try_into().expect("four were made");
    assert_eq!(client.delete(&format!("/sandboxes/{killed}")).await.status, 204);
    node.state.end(&crashed, "crashed");
    node.state.end_silently(&lost);
    eventually("the lost one is gone", || async {
        client.get(&format!("/sandboxes/{lost}")).await.status == 404
    })
    .await;
    let db = SqlitePool::connect(&format!("sqlite:{}", dir.path().join("control.db").display()))
        .await
        .expect("the same file");
    let reason = async |id: &str| -> Option<Option<String>> {
        sqlx::query_scalar("SELECT end_reason FROM sandboxes WHERE sandbox_id = ?")
            .bind(id)
            .fetch_optional(&db)
            .await
            .expect("a row")
    };
    for (id, expected) in [(&killed, "killed"), (&crashed, "crashed"), (&lost, "lost")] {
        eventually(expected, || async { reason(id).await.flatten().as_deref() == Some(expected) })
            .await;
    }
    // What the store has lost is written again.
    eventually("the kept one is stored", || async { reason(&kept).await == Some(None) }).await;
    let deleted = sqlx::query("DELETE FROM sandboxes WHERE sandbox_id = ?").bind(&kept);
    assert_eq!(deleted.execute(&db).await.expect("a delete").rows_affected(), 1);
    eventually("it is stored again", || async { reason(&kept).await == Some(None) }).await;
    db.close().await;
    control.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn without_a_node_it_does_not_start() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let store = Store::open(&dir.path().join("control.db")).await.expect("a store");
    let routes: Arc<dyn RouteSink> = Arc::new(Routes::default());
    let node_sockets = vec![dir.path().join("node.sock")];
    let store_of = store.clone();
    let deps = Deps { node_sockets, routes, admin_token: None, wake: None, store: store_of };
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let scope = Scope::root("test");
    let brief = Config { node_wait: Duration::from_millis(200), ..config() };
    let outcome = belljar_control::serve(brief, deps, listener, scope.clone()).await;
    let error = outcome.expect_err("there is no node");
    assert!(matches!(error, ServeError::Node { wait_ms: 200, .. }), "{error:?}");
    assert!(error.to_string().contains("node.sock"), "{error}");
    assert!(scope.close(PATIENCE).await);
    store.close().await;
}
