//! The verifier against a certified provider in a process of its own.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use belljar_daemon::Scope;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use super::super::provider::Timing;
use super::super::{OidcIssuer, Verifier, VerifyError};

/// Longer than the program takes to start on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// `e2e/oidc/provider.mjs`, which runs the npm package oidc-provider. Killed when dropped.
struct Program {
    _child: Child,
    commands: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Program {
    /// `None`, after a loud skip, where its packages or Node.js are not installed.
    fn start() -> Option<Program> {
        let folder = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../e2e/oidc"));
        if !folder.join("node_modules/oidc-provider").exists() {
            belljar_testkit::skip("the packages of e2e/oidc are not installed: cargo xtask setup");
            return None;
        }
        let mut node = Command::new("node");
        node.arg("provider.mjs").current_dir(folder).kill_on_drop(true);
        node.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
        let Ok(mut child) = node.spawn() else {
            belljar_testkit::skip("Node.js is not installed");
            return None;
        };
        let commands = child.stdin.take().expect("it is piped");
        let answers = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        Some(Program { _child: child, commands, answers })
    }

    async fn answer(&mut self) -> Value {
        let read = async {
            loop {
                let line = self.answers.next_line().await.expect("a line").expect("an answer");
                // The package says things of its own on the same stream.
                if line.starts_with('{') {
                    return serde_json::from_str(&line).expect("JSON");
                }
            }
        };
        tokio::time::timeout(PATIENCE, read).await.expect("the provider answers")
    }

    async fn ask(&mut self, command: &str) -> Value {
        let line = format!("{command}\n");
        self.commands.write_all(line.as_bytes()).await.expect("it listens");
        let answer = self.answer().await;
        assert!(answer.get("error").is_none(), "{command}: {answer}");
        answer
    }

    async fn token(&mut self, algorithm: &str) -> String {
        let answer = self.ask(&format!("token {algorithm}")).await;
        answer["token"].as_str().expect("a token").to_owned()
    }
}

#[tokio::test]
async fn tokens_of_a_certified_provider_are_accepted() {
    let Some(mut program) = Program::start() else { return };
    let started = program.answer().await;
    let url = started["issuer"].as_str().expect("an issuer");
    let audience = started["audience"].as_str().expect("an audience");
    let scope = Scope::root("test oidc");
    let timing = Timing { unknown_key: Duration::ZERO, ..Timing::default() };
    let verifier = |audience| {
        let issuer = OidcIssuer::parse(url, audience).expect("an issuer");
        Verifier::with_timing(&[issuer], &scope, timing.clone()).expect("a verifier")
    };
    let ours = verifier(audience);
    for algorithm in ["RS256", "PS256", "ES256", "EdDSA"] {
        let token = program.token(algorithm).await;
        let subject = ours.verify(&token).await.expect(algorithm);
        assert_eq!((subject.issuer.as_str(), subject.email), (url, None));
        assert_eq!(subject.subject, format!("robot-{algorithm}"));
    }
    let token = program.token("ES256").await;
    let refused = verifier("urn:another").verify(&token).await.expect_err("not its audience");
    assert!(matches!(refused, VerifyError::Audience), "{refused}");
    program.ask("rotate").await;
    let renewed = program.token("ES256").await;
    ours.verify(&renewed).await.expect("the new keys are found");
    let refused = ours.verify(&token).await.expect_err("the old ones are gone");
    assert!(matches!(refused, VerifyError::Key), "{refused}");
    assert!(scope.close(Duration::from_secs(10)).await, "something goes on");
}
