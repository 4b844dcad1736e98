//! `kill -9` at every step of a pause, a copy and a resume, on the fake driver: a sandbox is paused
//! or it is lost with its server, and what was paused before can always be resumed.

#[path = "support/deaths.rs"]
mod deaths;
#[path = "support/rows.rs"]
mod rows;
#[path = "support/server.rs"]
mod server;

use std::path::Path;

use belljar_daemon::fault::Point;
use serde_json::{Value, json};

use deaths::{Made, Role, make, ways};
use server::{Server, fake_template, left_in, up, wait_until};

fn armed(data: &Path, fault: &str) -> Server {
    let mut command = up(data);
    command.args(["--runtime", "fake"]).env("BELLJAR_FAULT", fault);
    Server::run(&mut command)
}

/// The server after a death; nothing of what ran is left by then.
fn again(data: &Path, after: &str) -> Server {
    let server = Server::start(data, "fake");
    let tag = server.text("host_tag").to_owned();
    assert_eq!(left_in(data, &tag), Vec::<String>::new(), "{after}");
    server
}

fn state(server: &Server, id: &str) -> (u16, Value) {
    let (status, detail) = server.api("GET", &format!("/sandboxes/{id}"), None);
    (status, detail["state"].clone())
}

fn pause(server: &Server, id: &str) {
    let (status, answer) = server.api("POST", &format!("/sandboxes/{id}/pause"), None);
    assert_eq!(status, 204, "{answer}");
}

fn resume(server: &Server, made: &Made, after: &str) {
    let path = format!("/v2/sandboxes/{}/connect", made.id);
    let (status, answer) = server.api("POST", &path, Some(json!({ "timeout": 1000 })));
    assert_eq!(status, 201, "{after}: {answer}");
    let token = answer["envdAccessToken"].as_str().expect("a token");
    assert_eq!(token, made.token, "{after}: it outlives a pause");
    let token = format!("X-Access-Token: {token}\r\n");
    let (status, body) = server.traffic(&made.id, 49983, "/metrics", &token);
    assert!(status == 200 && body.contains(&made.id), "{after}: {status} {body}");
}

/// Kills it, whatever it is; then nothing of it may be on disk.
fn kill(server: &Server, data: &Path, id: &str, after: &str) {
    let (status, answer) = server.api("DELETE", &format!("/sandboxes/{id}"), None);
    assert_eq!(status, 204, "{after}: {answer}");
    nothing_kept(data, after);
}

fn nothing_kept(data: &Path, after: &str) {
    let kept = |folder: &str| {
        let found = std::fs::read_dir(data.join(folder)).map(Iterator::count);
        found.unwrap_or_default()
    };
    wait_until(&format!("{after}: no snapshot and no layer"), || {
        (kept("snapshots"), kept("layers")) == (0, 0)
    });
}

fn points(role: Role) -> impl Iterator<Item = Point> {
    Point::ALL.iter().copied().filter(move |point| ways(*point).0 == role)
}

#[test]
fn a_server_dies_at_every_step_of_a_pause() {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    for point in points(Role::Keeper) {
        let after = format!("pause, {}", point.name());
        let server = armed(data.path(), point.name());
        let made = make(&server, data.path(), 1000);
        let answer = server.try_api("POST", &format!("/sandboxes/{}/pause", made.id), None);
        assert_eq!(answer, None, "{after}: it was answered");
        server.dies(point.name());

        let server = again(data.path(), &after);
        if point == Point::KeepPublished {
            wait_until(&after, || state(&server, &made.id) == (200, json!("paused")));
            resume(&server, &made, &after);
            kill(&server, data.path(), &made.id, &after);
        } else {
            // It ran, and what runs does not outlive its server.
            wait_until(&after, || state(&server, &made.id).0 == 404);
            nothing_kept(data.path(), &after);
        }
        server.stop();
    }
}

#[test]
fn a_server_dies_at_every_step_of_a_copy() {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    for point in points(Role::Keeper) {
        let after = format!("copy, {}", point.name());
        let server = armed(data.path(), point.name());
        let made = make(&server, data.path(), 1000);
        let answer = server.try_api("POST", &format!("/sandboxes/{}/snapshots", made.id), None);
        assert_eq!(answer, None, "{after}: it was answered");
        server.dies(point.name());

        let server = again(data.path(), &after);
        wait_until(&after, || state(&server, &made.id).0 == 404);
        // Nobody was told of it, so nobody can ask for it.
        nothing_kept(data.path(), &after);
        server.stop();
    }
}

#[test]
fn a_server_dies_at_every_step_of_a_resume() {
    let data = tempfile::tempdir().expect("a temporary folder");
    fake_template(data.path());
    let server = Server::start(data.path(), "fake");
    let made = make(&server, data.path(), 1000);
    pause(&server, &made.id);
    server.stop();
    let starts = points(Role::Node).filter(|point| point.name().starts_with("sandbox.boot."));
    for point in starts {
        let after = format!("resume, {}", point.name());
        let server = armed(data.path(), point.name());
        let path = format!("/v2/sandboxes/{}/connect", made.id);
        let answer = server.try_api("POST", &path, Some(json!({ "timeout": 1000 })));
        assert_eq!(answer, None, "{after}: it was answered");
        server.dies(point.name());

        let server = again(data.path(), &after);
        wait_until(&after, || state(&server, &made.id) == (200, json!("paused")));
        resume(&server, &made, &after);
        pause(&server, &made.id);
        server.stop();
    }
    let server = Server::start(data.path(), "fake");
    kill(&server, data.path(), &made.id, "the last");
    server.stop();
}
