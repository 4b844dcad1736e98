//! `process.Process`.

use std::collections::VecDeque;

use http::Method;
use http_body_util::Full;
use serde_json::{Value, json};

use super::client::{Daemon, SOON, base64, envelope, kinds, shell};
use belljar_envd::Settings;

#[tokio::test]
async fn output_and_exit_code_arrive_in_order() {
    let daemon = Daemon::start().await;
    let run = daemon.shell("echo out; echo err >&2; exit 7").await.run().await;
    assert!(run.pid > 1);
    assert_eq!(run.stdout, b"out\n");
    assert_eq!(run.stderr, b"err\n");
    assert_eq!(
        run.end,
        json!({ "exitCode": 7, "exited": true, "status": "exit status 7",
                "error": "exit status 7" })
    );
    let run = daemon.shell("true").await.run().await;
    assert_eq!(run.end, json!({ "exited": true, "status": "exit status 0" }));
    daemon.stop().await;
}

#[tokio::test]
async fn large_output_is_whole_and_in_bounded_pieces() {
    let daemon = Daemon::start().await;
    let script = "head -c 3000000 /dev/zero | tr '\\0' 'x'";
    let mut events = daemon.shell(script).await;
    events.pid().await;
    let mut total = 0;
    while let Some(message) = events.next().await {
        if let Some(piece) = message["event"]["data"]["stdout"].as_str() {
            assert!(piece.len() <= 32 * 1024 * 4 / 3 + 4, "{}", piece.len());
            total += piece.len() / 4 * 3 - piece.bytes().filter(|b| *b == b'=').count();
        }
    }
    assert_eq!(total, 3_000_000);
    daemon.stop().await;
}

#[tokio::test]
async fn input_is_written_until_it_is_closed() {
    let daemon = Daemon::start().await;
    let request = json!({ "process": { "cmd": "cat" }, "stdin": true });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    let process = json!({ "pid": pid });
    for text in ["one\n", "two\n"] {
        let input = json!({ "process": process, "input": { "stdin": base64(text.as_bytes()) } });
        let answer = daemon.call("process.Process/SendInput", input).await;
        assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({})));
    }
    let close = json!({ "process": process });
    let answer = daemon.call("process.Process/CloseStdin", close).await;
    assert_eq!(answer.json(), json!({}));
    let run = events.rest(pid).await;
    assert_eq!(run.stdout, b"one\ntwo\n");
    assert_eq!(run.end["status"], "exit status 0");

    let input = json!({ "process": process, "input": { "stdin": base64(b"late") } });
    let answer = daemon.call("process.Process/SendInput", input).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (404, &json!("not_found")));
    daemon.stop().await;
}

#[tokio::test]
async fn input_streams_through_one_request() {
    let daemon = Daemon::start().await;
    let request = json!({ "process": { "cmd": "cat" }, "tag": "sink" });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    let mut body = Vec::new();
    for message in [
        json!({ "start": { "process": { "tag": "sink" } } }),
        json!({ "data": { "input": { "stdin": base64(b"a") } } }),
        json!({ "keepalive": {} }),
        json!({ "data": { "input": { "stdin": base64(b"b\n") } } }),
    ] {
        body.extend_from_slice(&envelope(&message));
    }
    let path = "/process.Process/StreamInput";
    let kind = "application/connect+json";
    let answer = daemon.post(path, kind, body).await;
    assert_eq!(answer.status.as_u16(), 200);
    assert!(answer.text().contains("{}"));
    daemon.call("process.Process/CloseStdin", json!({ "process": { "pid": pid } })).await;
    assert_eq!(events.rest(pid).await.stdout, b"ab\n");

    let body = envelope(&json!({ "data": { "input": { "stdin": base64(b"a") } } }));
    let answer = daemon.post(path, kind, body).await;
    assert!(answer.text().contains("invalid_argument"), "{}", answer.text());
    daemon.stop().await;
}

#[tokio::test]
async fn a_process_that_closed_its_input_and_lives_is_still_there() {
    let daemon = Daemon::start().await;
    let request = json!({
        "process": { "cmd": "/bin/sh", "args": ["-c", "exec <&-; echo up; sleep 600 & wait"] },
        "stdin": true,
    });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    events.until("up").await;
    let input = json!({ "process": { "pid": pid }, "input": { "stdin": base64(b"x") } });
    let answer = daemon.call("process.Process/SendInput", input).await;
    assert_eq!(answer.json()["code"], "failed_precondition", "{}", answer.text());
    daemon.stop().await;
}

#[tokio::test]
async fn a_process_without_input_reads_nothing() {
    let daemon = Daemon::start().await;
    let mut events = daemon.shell("cat; echo done; exec sleep 600").await;
    let pid = events.pid().await;
    events.until("done").await;
    let input = json!({ "process": { "pid": pid }, "input": { "stdin": base64(b"x") } });
    let answer = daemon.call("process.Process/SendInput", input).await;
    assert_eq!(answer.json()["code"], "failed_precondition");
    daemon.stop().await;
}

#[tokio::test]
async fn killing_ends_the_whole_group_and_says_so() {
    let daemon = Daemon::start().await;
    let mut events = daemon.shell("sleep 600 & echo up; sleep 600; echo never").await;
    let pid = events.pid().await;
    events.until("up").await;
    let signal = json!({ "process": { "pid": pid }, "signal": "SIGNAL_SIGKILL" });
    let answer = daemon.call("process.Process/SendSignal", signal.clone()).await;
    assert_eq!((answer.status.as_u16(), answer.json()), (200, json!({})));
    let run = events.rest(pid).await;
    assert_eq!(
        run.end,
        json!({ "exitCode": -1, "status": "signal: killed", "error": "signal: killed" })
    );
    let answer = daemon.call("process.Process/SendSignal", signal).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["code"]), (404, &json!("not_found")));
    let unknown = json!({ "process": { "pid": 4_000_000 }, "signal": "SIGNAL_SIGKILL" });
    let answer = daemon.call("process.Process/SendSignal", unknown).await;
    assert_eq!(answer.json()["code"], "not_found");
    daemon.stop().await;
}

#[tokio::test]
async fn terminating_lets_the_process_answer() {
    let daemon = Daemon::start().await;
    let script = "trap 'echo bye; exit 3' TERM; echo up; while :; do read x; done";
    let request = json!({ "process": { "cmd": "/bin/sh", "args": ["-c", script] } });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    events.until("up").await;
    let signal = json!({ "process": { "pid": pid }, "signal": "SIGNAL_SIGTERM" });
    daemon.call("process.Process/SendSignal", signal).await;
    let run = events.rest(pid).await;
    assert_eq!((run.stdout(), &run.end["exitCode"]), ("bye\n".to_owned(), &json!(3)));
    daemon.stop().await;
}

#[tokio::test]
async fn the_deadline_kills_the_process_and_each_reader_learns_its_part() {
    let daemon = Daemon::start().await;
    let headers = [("connect-timeout-ms", "1000")];
    let request = shell("echo up; sleep 600");
    let mut caller = daemon.open_with("process.Process/Start", request, &headers).await;
    let pid = caller.pid().await;
    let select = json!({ "process": { "pid": pid } });
    let listener = daemon.open("process.Process/Connect", select).await;
    assert_eq!(caller.until("up").await.stdout, b"up\n");
    // Whoever set the deadline hears of the deadline, everyone else how the process ended.
    assert_eq!(caller.next().await, None);
    assert_eq!(caller.error()["code"], "deadline_exceeded");
    let end = listener.run().await.end;
    assert_eq!((&end["status"], &end["exitCode"]), (&json!("signal: killed"), &json!(-1)));
    daemon.stop().await;
}

#[tokio::test]
async fn others_listen_in_and_leaving_kills_nothing() {
    let daemon = Daemon::start().await;
    let request = json!({ "process": { "cmd": "/bin/sh", "args": ["-c", "cat; exit 5"] },
                          "tag": "shared" });
    let mut first = daemon.open("process.Process/Start", request).await;
    let pid = first.pid().await;
    let select = json!({ "process": { "tag": "shared" } });
    let mut second = daemon.open("process.Process/Connect", select).await;
    assert_eq!(second.pid().await, pid);
    drop(first);

    let list = daemon.call("process.Process/List", json!({})).await.json();
    let processes = list["processes"].as_array().expect("a list");
    assert_eq!(processes.len(), 1);
    assert_eq!(processes[0]["pid"], json!(pid));
    assert_eq!(processes[0]["tag"], "shared");
    assert_eq!(processes[0]["config"]["cmd"], "/bin/sh");

    let input = json!({ "process": { "pid": pid }, "input": { "stdin": base64(b"hi\n") } });
    daemon.call("process.Process/SendInput", input).await;
    second.until("hi").await;
    daemon.call("process.Process/CloseStdin", json!({ "process": { "pid": pid } })).await;
    assert_eq!(second.rest(pid).await.end["exitCode"], 5);

    // It ended, is no longer listed, and can still be asked how it ended.
    assert_eq!(daemon.call("process.Process/List", json!({})).await.json(), json!({}));
    let late = daemon.open("process.Process/Connect", json!({ "process": { "pid": pid } })).await;
    let late = late.run().await;
    assert_eq!((late.pid, &late.end["exitCode"]), (pid, &json!(5)));
    daemon.stop().await;
}

#[tokio::test]
async fn an_unknown_process_cannot_be_joined() {
    let daemon = Daemon::start().await;
    let select = json!({ "process": { "pid": 4_000_000 } });
    let mut events = daemon.open("process.Process/Connect", select).await;
    assert_eq!(events.next().await, None);
    assert_eq!(events.error()["code"], "not_found");
    daemon.stop().await;
}

#[tokio::test]
async fn a_terminal_has_a_size_and_takes_input() {
    let daemon = Daemon::start().await;
    let request = json!({
        "process": { "cmd": "/bin/sh", "envs": { "PS1": "$ " } },
        "pty": { "size": { "cols": 100, "rows": 40 } },
    });
    let mut events = daemon.open("process.Process/Start", request).await;
    let pid = events.pid().await;
    let process = json!({ "pid": pid });
    let line =
        |text: &str| json!({ "process": process, "input": { "pty": base64(text.as_bytes()) } });
    daemon.call("process.Process/SendInput", line("stty size; tty\n")).await;
    let seen = events.until("/dev/pts/").await;
    assert!(String::from_utf8_lossy(&seen.pty).contains("40 100"), "{seen:?}");

    let update = json!({ "process": process, "pty": { "size": { "cols": 111, "rows": 22 } } });
    daemon.call("process.Process/Update", update).await;
    daemon.call("process.Process/SendInput", line("stty size\n")).await;
    events.until("22 111").await;

    let answer = daemon.call("process.Process/CloseStdin", json!({ "process": process })).await;
    assert_eq!(answer.json()["code"], "unknown");
    let message = answer.json()["message"].as_str().expect("text").to_owned();
    assert!(
        message.ends_with("cannot close stdin for PTY process — send Ctrl+D (0x04) instead"),
        "{message}"
    );
    let stdin = json!({ "process": process, "input": { "stdin": base64(b"x") } });
    let answer = daemon.call("process.Process/SendInput", stdin).await;
    assert_eq!(answer.json()["code"], "failed_precondition");

    daemon.call("process.Process/SendInput", line("exit 9\n")).await;
    assert_eq!(events.rest(pid).await.end["exitCode"], 9);
    daemon.stop().await;
}

#[tokio::test]
async fn the_environment_is_layered() {
    let daemon = Daemon::start().await;
    let body =
        json!({ "envVars": { "LAYER": "global", "ONLY_GLOBAL": "1", "PATH": "/bin:/usr/bin" } });
    let answer = daemon.post("/init", "application/json", body.to_string()).await;
    assert_eq!(answer.status.as_u16(), 204);
    let request = json!({
        "process": { "cmd": "/usr/bin/env", "envs": { "LAYER": "request" } }, "stdin": false,
    });
    let run = daemon.open("process.Process/Start", request).await.run().await;
    let stdout = run.stdout();
    let lines: Vec<&str> = stdout.lines().collect();
    let user = super::client::own_user();
    for expected in [
        "LAYER=request",
        "ONLY_GLOBAL=1",
        "PATH=/bin:/usr/bin",
        "E2B_SANDBOX=true",
        &format!("USER={user}"),
        &format!("LOGNAME={user}"),
    ] {
        assert!(lines.contains(&expected), "{expected} in {lines:?}");
    }
    assert!(lines.iter().any(|line| line.starts_with("HOME=/")));
    // Nothing of the daemon's own environment.
    assert!(!lines.iter().any(|line| line.starts_with("CARGO")), "{lines:?}");
    daemon.stop().await;
}

#[tokio::test]
async fn the_directory_is_the_requests_then_the_templates() {
    let workdir = tempfile::tempdir().expect("a directory");
    let workdir = workdir.path().canonicalize().expect("there");
    let shown = workdir.to_string_lossy().into_owned();
    let settings = Settings { default_workdir: Some(shown.clone()), ..super::client::settings() };
    let daemon = Daemon::with(settings).await;
    let run = daemon.shell("pwd").await.run().await;
    assert_eq!(run.stdout(), format!("{shown}\n"));
    let request = json!({ "process": { "cmd": "pwd", "cwd": "/usr" }, "stdin": false });
    let run = daemon.open("process.Process/Start", request).await.run().await;
    assert_eq!(run.stdout(), "/usr\n");

    let request = json!({ "process": { "cmd": "pwd", "cwd": "/no/where" } });
    let mut events = daemon.open("process.Process/Start", request).await;
    assert_eq!(events.next().await, None);
    assert_eq!(events.error()["code"], "invalid_argument");
    assert_eq!(events.error()["message"], "cwd '/no/where' does not exist");
    daemon.stop().await;
}

#[tokio::test]
async fn a_program_that_is_not_there_is_refused() {
    let daemon = Daemon::start().await;
    let request = json!({ "process": { "cmd": "/no/such/program" } });
    let mut events = daemon.open("process.Process/Start", request).await;
    assert_eq!(events.next().await, None);
    assert_eq!(events.error()["code"], "invalid_argument");
    daemon.stop().await;
}

#[tokio::test]
async fn silence_is_broken_by_keepalives() {
    let daemon = Daemon::start().await;
    let headers = [("keepalive-ping-interval", "1")];
    let request = shell("exec sleep 600");
    let mut events = daemon.open_with("process.Process/Start", request, &headers).await;
    let mut seen = VecDeque::new();
    for _ in 0..2 {
        seen.push_back(events.next().await.expect("an event"));
    }
    assert_eq!(kinds(&seen), ["start", "keepalive"]);
    daemon.stop().await;
}

#[tokio::test]
async fn a_reader_that_stalls_holds_its_process_back_and_loses_nothing() {
    let daemon = Daemon::start().await;
    // Far more than the socket buffers and queues on the way can hold.
    let script = "head -c 40000000 /dev/zero; echo; echo end >&2";
    let mut stalled = daemon.shell(script).await;
    let pid = stalled.pid().await;
    let late = daemon.open("process.Process/Connect", json!({ "process": { "pid": pid } })).await;
    drop(late);
    // The process cannot have ended: nobody has read its output.
    let list = daemon.call("process.Process/List", json!({})).await.json();
    assert_eq!(list["processes"].as_array().map(Vec::len), Some(1));
    let run = stalled.rest(pid).await;
    assert_eq!(run.stdout.len(), 40_000_001);
    assert_eq!(run.stderr, b"end\n");
    daemon.stop().await;
}

#[tokio::test]
async fn background_programs_outlive_the_shell() {
    let daemon = Daemon::start().await;
    let script = "sleep 600 >/dev/null 2>&1 & echo $!";
    let run = daemon.shell(script).await.run().await;
    assert_eq!(run.end["status"], "exit status 0");
    let pid: i32 = run.stdout().trim().parse().expect("a process id");
    let pid = rustix::process::Pid::from_raw(pid).expect("not zero");
    assert!(rustix::process::test_kill_process(pid).is_ok(), "it still runs");
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).expect("still there");
    daemon.stop().await;
}

#[tokio::test]
async fn stopping_the_daemon_kills_what_it_started() {
    let daemon = Daemon::start().await;
    let mut events = daemon.shell("echo up; exec sleep 600").await;
    let pid = events.pid().await;
    events.until("up").await;
    daemon.stop().await;
    let pid = i32::try_from(pid).expect("small");
    let pid = rustix::process::Pid::from_raw(pid).expect("not zero");
    let gone = async {
        while rustix::process::test_kill_process(pid).is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(SOON, gone).await.expect("gone");
}

#[tokio::test]
async fn malformed_requests_are_refused_politely() {
    let daemon = Daemon::start().await;
    let path = "/process.Process/List";
    let answer = daemon.post(path, "application/json", "{nonsense").await;
    assert_eq!(answer.status.as_u16(), 400);
    assert_eq!(answer.json()["code"], "invalid_argument");
    let answer = daemon.call("process.Process/Nothing", json!({})).await;
    assert_eq!(answer.status.as_u16(), 404);
    let answer = daemon.call("process.Process/SendInput", json!({})).await;
    assert_eq!(answer.json()["code"], "invalid_argument");
    let request = daemon.request(Method::POST, path).header("content-type", "text/plain");
    let answer = daemon.fetch(request.body(Full::default()).expect("valid")).await;
    assert_eq!(answer.status.as_u16(), 415);
    daemon.stop().await;
}

#[tokio::test]
async fn an_unknown_user_is_refused_by_every_method() {
    let daemon = Daemon::start().await;
    for (method, body) in [
        ("process.Process/List", json!({})),
        ("filesystem.Filesystem/Stat", json!({ "path": "/" })),
    ] {
        let request = daemon
            .request(Method::POST, &format!("/{method}"))
            .header("content-type", "application/json")
            .header("authorization", format!("Basic {}", base64(b"nobody-here:")));
        let body = Full::from(Value::to_string(&body));
        let answer = daemon.fetch(request.body(body).expect("valid")).await;
        assert_eq!(answer.status.as_u16(), 401);
        assert_eq!(answer.json()["code"], "unauthenticated");
        assert_eq!(answer.json()["message"], "invalid username: 'nobody-here'");
    }
    daemon.stop().await;
}
