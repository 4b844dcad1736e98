//! `belljar team|user|key|token` against a running server, as an operator types them.

#[path = "support/server.rs"]
mod server;

use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use server::{Server, fake_template};

/// A data folder with a template, and commands for it.
struct Operator {
    data: tempfile::TempDir,
}

impl Operator {
    fn new() -> Operator {
        let data = tempfile::tempdir().expect("a temporary folder");
        fake_template(data.path());
        Operator { data }
    }

    fn server(&self) -> Server {
        Server::start(self.data.path(), "fake")
    }

    fn run(&self, words: &[&str]) -> Output {
        run(self.data.path(), words, &[])
    }

    /// The JSON a command prints; it must go well.
    fn json(&self, words: &[&str]) -> Value {
        let mut words = words.to_vec();
        words.push("--json");
        let output = self.run(&words);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {errors}");
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// What a command says when it fails.
    fn failure(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(1), "{words:?}: {output:?}");
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

fn run(data: &Path, words: &[&str], variables: &[(&str, &str)]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_belljar"))
        .args(words)
        .arg("--data-dir")
        .arg(data)
        .envs(variables.iter().copied())
        .output()
        .expect("the program runs")
}

#[test]
fn tiers_are_kept() {
    let operator = Operator::new();
    let server = operator.server();
    let base = operator.json(&["tier", "list"])[0].clone();
    assert_eq!(base["id"], "base");
    let gold = operator.json(&["tier", "create", "gold", "--max-sandboxes", "7"]);
    assert_eq!((&gold["id"], &gold["maxConcurrentSandboxes"]), (&json!("gold"), &json!(7)));
    assert_eq!(gold["maxVcpus"], base["maxVcpus"], "the rest is the base tier's");
    assert!(operator.failure(&["tier", "create", "gold"]).contains("tier update gold"));
    let more = operator.json(&["tier", "create", "more", "--like", "gold", "--max-vcpus", "3"]);
    assert_eq!((&more["maxConcurrentSandboxes"], &more["maxVcpus"]), (&json!(7), &json!(3)));
    let team = operator.json(&["team", "create", "lab", "--tier", "gold"]);
    assert_eq!(team["limits"]["maxConcurrentSandboxes"], 7);
    let changed = operator.json(&["tier", "update", "gold", "--events-ttl-days", "3"]);
    assert_eq!(
        (&changed["eventsTTLDays"], &changed["maxConcurrentSandboxes"]),
        (&json!(3), &json!(7))
    );

    let shown = operator.run(&["tier", "list"]);
    let shown = String::from_utf8(shown.stdout).expect("text");
    assert!(shown.contains("gold") && shown.contains("SANDBOXES"), "{shown}");
    assert!(operator.failure(&["tier", "delete", "gold"]).contains("has teams"));
    assert_eq!(operator.json(&["tier", "delete", "more"]), json!({"id": "more", "deleted": true}));
    for words in [["tier", "delete", "more"], ["tier", "update", "more"]] {
        assert!(operator.failure(&words).contains("belljar tier list"));
    }
    assert!(operator.failure(&["tier", "create", "a/b"]).contains("lower-case"));
    server.stop();
}

#[test]
fn teams_and_their_keys_are_kept() {
    let operator = Operator::new();
    let server = operator.server();
    let lab = operator.json(&["team", "create", "The Lab", "--max-sandboxes", "3"]);
    assert_eq!(lab["slug"], "the-lab");
    assert_eq!(lab["limits"]["maxConcurrentSandboxes"], 3);
    let id = lab["teamID"].as_str().expect("an id");
    let key = operator.run(&["key", "create", "--team", "the-lab", "--name", "ci"]);
    let key = String::from_utf8(key.stdout).expect("text").trim().to_owned();
    assert!(key.starts_with("e2b_") && key.len() == 44, "{key:?}");
    assert_eq!(server.api_as(&key, "GET", "/sandboxes").0, 200);

    let keys = operator.json(&["key", "list", "--team", id]);
    assert_eq!((&keys[0]["name"], keys.as_array().map(Vec::len)), (&json!("ci"), Some(1)));
    let shown = operator.run(&["key", "list", "--team", id]);
    let shown = String::from_utf8(shown.stdout).expect("text");
    assert!(shown.contains("ci") && !shown.contains(&key[8..40]), "{shown}");

    let words =
        ["team", "update", id, "--tier", "pro", "--max-vcpus", "4", "--allow", "10.0.0.0/8"];
    let changed = operator.json(&words);
    assert_eq!(changed["limitOverrides"], json!({"maxConcurrentSandboxes": 3, "maxVcpus": 4}));
    assert_eq!(changed["allowedAddresses"], json!(["10.0.0.0/8"]));
    assert_eq!(server.api_as(&key, "GET", "/sandboxes").0, 403);
    let changed = operator.json(&["team", "update", id, "--allow-all", "--tier-limits"]);
    assert_eq!(changed["limitOverrides"], json!({}));
    assert_eq!(server.api_as(&key, "GET", "/sandboxes").0, 200);

    operator.json(&["team", "block", id, "--reason", "unpaid"]);
    assert_eq!(server.api_as(&key, "GET", "/sandboxes").0, 403);
    assert_eq!(operator.json(&["team", "list"])[1]["blockedReason"], "unpaid");
    operator.json(&["team", "unblock", id]);
    let key_id = keys[0]["id"].as_str().expect("an id");
    let gone = operator.json(&["key", "delete", "--team", id, key_id]);
    assert_eq!(gone, json!({"id": key_id, "deleted": true}));
    assert_eq!(server.api_as(&key, "GET", "/sandboxes").0, 401);
    assert_eq!(operator.run(&["key", "delete", "--team", id, key_id]).status.code(), Some(1));

    operator.json(&["team", "delete", "the-lab"]);
    assert!(operator.failure(&["team", "delete", "the-lab"]).contains("there is no team"));
    assert!(operator.failure(&["team", "create", "x", "--tier", "gold"]).contains("gold"));
    server.stop();
}

#[test]
fn users_and_their_tokens_are_kept() {
    let operator = Operator::new();
    let server = operator.server();
    let words = ["user", "create", "ada@example.org", "--issuer", "https://id", "--subject", "1"];
    let ada = operator.json(&words);
    assert_eq!(ada["identities"], json!([{"issuer": "https://id", "subject": "1"}]));
    let id = ada["id"].as_str().expect("an id");
    let member = operator.json(&["user", "add", "ada@example.org"]);
    assert_eq!((&member["userID"], &member["isDefault"]), (&json!(id), &json!(true)));
    let token = operator.json(&["token", "create", "--user", id, "--name", "laptop"]);
    assert!(token["token"].as_str().is_some_and(|text| text.starts_with("sk_e2b_")), "{token}");
    let listed = operator.json(&["token", "list", "--user", "ada@example.org"]);
    assert_eq!((&listed[0]["id"], listed[0].get("token")), (&token["id"], None));
    let token_id = token["id"].as_str().expect("an id");
    operator.json(&["token", "delete", "--user", id, token_id]);
    operator.json(&["user", "remove", "ada@example.org"]);
    assert!(operator.failure(&["user", "remove", "ada@example.org"]).contains("no member"));
    operator.json(&["user", "delete", "ada@example.org"]);
    assert_eq!(operator.json(&["user", "list"]), json!([]));
    server.stop();
}

#[test]
fn the_token_is_its_owner_s_alone_and_may_be_given_instead() {
    let operator = Operator::new();
    assert!(operator.failure(&["team", "list"]).contains("belljar up"), "no server runs");
    let server = operator.server();
    let file = operator.data.path().join("admin-token");
    let mode = file.metadata().expect("the file").permissions().mode();
    assert_eq!(mode & 0o077, 0, "others can read it");
    let token = std::fs::read_to_string(&file).expect("a token");

    // From elsewhere: an address and the token, and no data folder of the server.
    let elsewhere = tempfile::tempdir().expect("a temporary folder");
    let (url, token) = (server.text("api_url").to_owned(), token.trim().to_owned());
    let remote = [("E2B_API_URL", url.as_str()), ("BELLJAR_ADMIN_TOKEN", token.as_str())];
    let listed = run(elsewhere.path(), &["team", "list", "--json"], &remote);
    assert!(listed.status.success(), "{listed:?}");
    let wrong = [("E2B_API_URL", url.as_str()), ("BELLJAR_ADMIN_TOKEN", "wrong")];
    let refused = run(elsewhere.path(), &["team", "list"], &wrong);
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(refused.status.code() == Some(1) && said.contains("X-Admin-Token"), "{said}");
    server.stop();

    // It stays the same over a restart, and a weak one is not taken.
    let server = operator.server();
    assert_eq!(std::fs::read_to_string(&file).expect("a token").trim(), token);
    server.stop();
    std::fs::write(&file, "weak\n").expect("a file");
    let up = ["up", "--runtime", "fake", "--api-port", "0", "--proxy-port", "0"];
    assert!(operator.failure(&up).contains("admin token"));
}
