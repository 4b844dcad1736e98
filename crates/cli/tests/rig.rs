//! The whole server on the fake driver: no root, no network, seconds.
//!
//! The real `belljar` program is started on free ports with its own data folder and driven over
//! its sockets, so composition, start order and stop order are what users get.

#[path = "support/server.rs"]
mod server;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use server::{Server, fake_template, left_in, wait_until};

fn data_dir() -> tempfile::TempDir {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    data
}

fn start(data: &Path) -> Server {
    Server::start(data, "fake")
}

#[test]
fn a_sandbox_lives_from_create_to_kill() {
    let data = data_dir();
    let server = start(data.path());
    let sandbox = server.create(json!({ "templateID": "base", "metadata": { "who": "rig" } }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    let token = sandbox["envdAccessToken"].as_str().expect("a token");

    let (status, _) = server.traffic(&id, 49983, "/health", "");
    assert_eq!(status, 204);
    let (status, _) = server.traffic(&id, 49983, "/metrics", "");
    assert_eq!(status, 401, "the guest asks for its token");
    let (status, body) =
        server.traffic(&id, 49983, "/metrics", &format!("X-Access-Token: {token}\r\n"));
    assert_eq!(status, 200, "{body}");
    assert!(body.contains(&id), "another sandbox answered: {body}");

    let (status, listed) = server.api("GET", "/v2/sandboxes", None);
    assert_eq!((status, listed.as_array().map(Vec::len)), (200, Some(1)));
    let (status, _) = server.api("DELETE", &format!("/sandboxes/{id}"), None);
    assert_eq!(status, 204);
    let (status, _) = server.api("GET", &format!("/sandboxes/{id}"), None);
    assert_eq!(status, 404);
    let (status, body) = server.traffic(&id, 49983, "/health", "");
    assert_eq!(status, 502);
    let expected = json!({ "sandboxId": id, "message": "The sandbox was not found", "code": 502 });
    assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), expected);
    server.stop();
}

#[test]
fn a_sandbox_has_a_log_of_its_own_until_it_ends() {
    let data = data_dir();
    let server = start(data.path());
    let ids = [(), ()].map(|()| {
        let sandbox = server.create(json!({ "templateID": "base" }));
        sandbox["sandboxID"].as_str().expect("an id").to_owned()
    });
    let read = |id: &str| server.api("GET", &format!("/v2/sandboxes/{id}/logs"), None);
    for id in &ids {
        wait_until("a line", || read(id).1["logs"] != json!([]));
        let (_, answer) = read(id);
        let entries = answer["logs"].as_array().expect("a list");
        let said: Vec<&Value> = entries.iter().map(|entry| &entry["message"]).collect();
        assert_eq!(said, [&json!(format!("the fake guest is {id}"))]);
    }
    let logs = |more: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_belljar"));
        command.args(["sandbox", "logs", &ids[0]]).args(more).arg("--data-dir").arg(data.path());
        command
    };
    let printed = logs(&[]).output().expect("the program runs");
    let text = String::from_utf8_lossy(&printed.stdout).into_owned();
    let line = format!("INFO      1 stdout        the fake guest is {}\n", ids[0]);
    assert!(printed.status.success() && text.ends_with(&line), "{printed:?}");
    assert_eq!(text.lines().count(), 1);

    let mut following = logs(&["--follow", "--json"]);
    let mut follower =
        following.stdout(std::process::Stdio::piped()).spawn().expect("the program runs");
    let mut lines = BufReader::new(follower.stdout.take().expect("a pipe")).lines();
    let first = lines.next().expect("a line before the end").expect("text");
    let entry: Value = serde_json::from_str(&first).expect("an entry");
    assert_eq!(entry["fields"]["event_type"], "stdout");
    assert_eq!(server.api("DELETE", &format!("/sandboxes/{}", ids[0]), None).0, 204);
    assert!(lines.next().is_none(), "it was told once");
    assert!(follower.wait().expect("it ended").success());
    assert_eq!((read(&ids[0]).0, read(&ids[1]).0), (404, 200));
    let gone = logs(&[]).output().expect("the program runs");
    let said = String::from_utf8_lossy(&gone.stderr);
    assert!(!gone.status.success() && said.contains("there is no sandbox"), "{said}");
    server.stop();
}

#[test]
fn a_sandbox_ends_when_its_time_is_up() {
    let data = data_dir();
    let server = start(data.path());
    let sandbox = server.create(json!({ "templateID": "base", "timeout": 1 }));
    let id = sandbox["sandboxID"].as_str().expect("an id").to_owned();
    wait_until("expiry", || server.api("GET", &format!("/sandboxes/{id}"), None).0 == 404);
    wait_until("the route's end", || server.traffic(&id, 49983, "/health", "").0 == 502);
    server.stop();
}

#[test]
fn a_closed_port_is_named() {
    let data = data_dir();
    let server = start(data.path());
    let sandbox = server.create(json!({ "templateID": "base" }));
    let id = sandbox["sandboxID"].as_str().expect("an id");
    let (status, body) = server.traffic(id, 4, "/", "");
    assert_eq!(status, 502);
    let expected = json!({
        "sandboxId": id,
        "message": "The sandbox is running but port is not open",
        "port": 4,
        "code": 502,
    });
    assert_eq!(serde_json::from_str::<Value>(&body).expect("JSON"), expected);
    server.stop();
}

#[test]
fn a_killed_server_accounts_for_every_sandbox() {
    let data = data_dir();
    let server = start(data.path());
    let ids: Vec<String> = (0..10)
        .map(|_| server.create(json!({ "templateID": "base" })))
        .map(|s| s["sandboxID"].as_str().expect("an id").to_owned())
        .collect();
    server.crash();

    let server = start(data.path());
    assert_eq!(server.ready["reclaimed_sandboxes"], json!(10));
    let (_, listed) = server.api("GET", "/v2/sandboxes", None);
    assert_eq!(listed, json!([]));
    for id in &ids {
        assert_eq!(server.api("GET", &format!("/sandboxes/{id}"), None).0, 404);
    }
    assert_eq!(left_in(data.path(), server.text("host_tag")), Vec::<String>::new());
    server.stop();
}

#[test]
fn one_data_folder_has_one_server() {
    let data = data_dir();
    let server = start(data.path());
    let second = Command::new(env!("CARGO_BIN_EXE_belljar"))
        .args(["up", "--runtime", "fake", "--api-port", "0", "--proxy-port", "0", "--data-dir"])
        .arg(data.path())
        .output()
        .expect("the program runs");
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("in use by process"), "{said}");
    server.stop();
}

#[test]
fn stopping_ends_sandboxes_and_leaves_nothing() {
    let data = data_dir();
    let server = start(data.path());
    let tag = server.text("host_tag").to_owned();
    let _sandbox = server.create(json!({ "templateID": "base" }));
    assert_ne!(left_in(data.path(), &tag), Vec::<String>::new(), "the check sees nothing");
    server.stop();
    assert_eq!(left_in(data.path(), &tag), Vec::<String>::new());
    assert!(!Path::new("/run/belljar").join(&tag).exists());
    assert!(!data.path().join("server.json").exists());
}
