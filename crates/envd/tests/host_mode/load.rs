//! Processes that are many, large, slow or stubborn.

use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};

use super::client::{Daemon, SOON, base64, envelope, shell};

/// Well above what any of these take, well below the lives of what they leave behind.
const PROMPTLY: Duration = Duration::from_secs(10);

#[tokio::test]
async fn a_hundred_commands_at_once_keep_their_output_apart() {
    let daemon = Daemon::start().await;
    let runs = (0..100).map(async |number| {
        let script = format!("echo {number}; head -c 100000 /dev/zero; exit {number}");
        (number, daemon.shell(&script).await.run().await)
    });
    for (number, run) in join_all(runs).await {
        let expected = format!("{number}\n");
        assert!(run.stdout.starts_with(expected.as_bytes()), "{number}");
        assert_eq!(run.stdout.len(), expected.len() + 100_000);
        assert_eq!(run.end["status"], format!("exit status {number}"));
    }
    assert_eq!(daemon.call("process.Process/List", json!({})).await.json(), json!({}));
    daemon.stop().await;
}

#[tokio::test]
async fn a_background_program_that_keeps_the_output_open_delays_the_end_by_a_moment_only() {
    let daemon = Daemon::start().await;
    let began = Instant::now();
    let run = daemon.shell("sleep 600 & echo started $!").await.run().await;
    assert!(began.elapsed() < PROMPTLY, "{:?}", began.elapsed());
    assert_eq!(run.end["status"], "exit status 0");
    let pid = run.stdout();
    let pid = pid.trim().strip_prefix("started ").expect("the script's only line").to_owned();
    end_background(&pid).await;
    daemon.stop().await;
}

#[tokio::test]
async fn a_background_program_may_print_for_ever_without_holding_anything_up() {
    let daemon = Daemon::start().await;
    // Were the pipe closed or full, it would not get as far as its mark.
    let folder = tempfile::tempdir().expect("a directory");
    let mark = folder.path().join("mark");
    let script =
        format!("(head -c 20000000 /dev/zero; : > {}; exec yes) & echo $! >&2", mark.display());
    let began = Instant::now();
    let run = daemon.shell(&script).await.run().await;
    assert!(began.elapsed() < PROMPTLY, "{:?}", began.elapsed());
    assert_eq!(run.end["status"], "exit status 0");
    let drained = async {
        while !mark.exists() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, drained).await.expect("its output is read on");
    end_background(String::from_utf8_lossy(&run.stderr).trim()).await;
    daemon.stop().await;
}

#[tokio::test]
async fn what_a_helper_says_last_still_arrives() {
    let daemon = Daemon::start().await;
    // The shell ends first: the pipe's reader is no child it waits for.
    let script = "exec bash -c 'exec > >(sleep 0.1; tr a-z A-Z); echo last words'";
    let run = daemon.shell(script).await.run().await;
    assert_eq!(run.stdout(), "LAST WORDS\n");
    daemon.stop().await;
}

#[tokio::test]
async fn a_deadline_ends_a_command_that_ignores_signals_and_takes_its_children_along() {
    let daemon = Daemon::start().await;
    let headers = [("connect-timeout-ms", "1000")];
    let script = "trap '' TERM INT HUP; sleep 600 & echo $!; while :; do sleep 600; done";
    let mut events = daemon.open_with("process.Process/Start", shell(script), &headers).await;
    let began = Instant::now();
    events.pid().await;
    let child = events.until("\n").await.stdout();
    assert_eq!(events.next().await, None);
    assert_eq!(events.error()["code"], "deadline_exceeded");
    assert!(began.elapsed() < PROMPTLY, "{:?}", began.elapsed());
    let child = process_id(child.trim());
    let gone = async {
        while rustix::process::test_kill_process(child).is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, gone).await.expect("the child is killed too");
    daemon.stop().await;
}

#[tokio::test]
async fn much_input_arrives_whole_through_one_stream_and_many_messages() {
    let daemon = Daemon::start().await;
    let request = json!({ "process": { "cmd": "wc", "args": ["-c"] }, "stdin": true });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    let piece = base64(&vec![b'x'; 1 << 20]);
    let mut body = envelope(&json!({ "start": { "process": { "pid": pid } } })).to_vec();
    for _ in 0..16 {
        body.extend_from_slice(&envelope(&json!({ "data": { "input": { "stdin": piece } } })));
    }
    let kind = "application/connect+json";
    let answer = daemon.post("/process.Process/StreamInput", kind, body).await;
    assert_eq!(answer.status.as_u16(), 200);
    assert!(!answer.text().contains("error"), "{}", answer.text());
    let input = json!({ "process": { "pid": pid }, "input": { "stdin": piece } });
    for _ in 0..4 {
        assert_eq!(daemon.call("process.Process/SendInput", input.clone()).await.json(), json!({}));
    }
    daemon.call("process.Process/CloseStdin", json!({ "process": { "pid": pid } })).await;
    assert_eq!(events.rest(pid).await.stdout(), format!("{}\n", 20 << 20));
    daemon.stop().await;
}

#[tokio::test]
async fn input_nobody_reads_waits_without_holding_up_the_daemon() {
    let daemon = Daemon::start().await;
    let request = json!({ "process": { "cmd": "sleep", "args": ["600"] }, "stdin": true });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    let select = json!({ "pid": pid });
    let input = json!({ "process": select, "input": { "stdin": base64(&vec![0; 1 << 20]) } });
    let written = daemon.call("process.Process/SendInput", input);
    let killed = async {
        assert_eq!(daemon.get("/health").await.status.as_u16(), 204);
        let signal = json!({ "process": select, "signal": "SIGNAL_SIGKILL" });
        daemon.call("process.Process/SendSignal", signal).await
    };
    let (written, killed) = tokio::join!(written, killed);
    assert_eq!(killed.json(), json!({}));
    assert_eq!(written.json()["code"], "not_found", "it ended during the write");
    assert_eq!(events.rest(pid).await.end["status"], "signal: killed");
    daemon.stop().await;
}

#[tokio::test]
async fn a_terminal_is_resized_while_it_prints() {
    let daemon = Daemon::start().await;
    let request = json!({
        "process": { "cmd": "/bin/sh", "args": ["-c", "trap 'stty size' WINCH; while :; do echo x; done"] },
        "pty": { "size": { "cols": 80, "rows": 24 } },
    });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    events.until("x").await;
    for columns in [90, 100, 110] {
        let size = json!({ "cols": columns, "rows": 30 });
        let update = json!({ "process": { "pid": pid }, "pty": { "size": size } });
        assert_eq!(daemon.call("process.Process/Update", update).await.json(), json!({}));
        events.until(&format!("30 {columns}")).await;
    }
    let signal = json!({ "process": { "pid": pid }, "signal": "SIGNAL_SIGKILL" });
    assert_eq!(daemon.call("process.Process/SendSignal", signal).await.json(), json!({}));
    assert_eq!(events.rest(pid).await.end["status"], "signal: killed");
    daemon.stop().await;
}

#[tokio::test]
async fn a_megabyte_of_environment_arrives_and_too_long_a_variable_is_refused_by_name() {
    let daemon = Daemon::start().await;
    let long = "v".repeat(100_000);
    let names = (0..10).map(|number| (format!("LONG_{number}"), Value::from(long.clone())));
    let envs: serde_json::Map<_, _> = names.collect();
    let process =
        json!({ "cmd": "/bin/sh", "args": ["-c", "echo ${#LONG_0} ${#LONG_9}"], "envs": envs });
    let request = json!({ "process": process, "stdin": false });
    let run = daemon.open("process.Process/Start", request).await.run().await;
    assert_eq!(run.stdout(), "100000 100000\n");

    let process = json!({ "cmd": "/bin/true", "envs": { "TOO_LONG": "v".repeat(200_000) } });
    let mut events = daemon.open("process.Process/Start", json!({ "process": process })).await;
    assert_eq!(events.next().await, None);
    assert_eq!(events.error()["code"], "invalid_argument");
    let message = events.error()["message"].as_str().expect("text");
    assert!(message.contains("128 KiB") && message.contains("/bin/true"), "{message}");
    daemon.stop().await;
}

fn process_id(text: &str) -> rustix::process::Pid {
    let pid = text.parse().unwrap_or_else(|_| panic!("not a process id: {text:?}"));
    rustix::process::Pid::from_raw(pid).expect("not zero")
}

/// Kills what a script left in the background, which must still run.
async fn end_background(text: &str) {
    let pid = process_id(text);
    assert!(rustix::process::test_kill_process(pid).is_ok(), "it still runs");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("it still runs");
}
