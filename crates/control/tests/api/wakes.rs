//! Traffic that resumes sandboxes.

use belljar_control::{Asleep, Config};
use belljar_daemon::clock;
use belljar_domain::{SandboxId, Secret};

use crate::pauses::paused;
use crate::support::{Rig, config};

const AUTO: &str =
    r#"{"templateID":"base","timeout":600,"autoPause":true,"autoResume":{"enabled":true}}"#;
const SHORT: &str =
    r#"{"templateID":"base","timeout":20,"autoPause":true,"autoResume":{"enabled":true}}"#;

fn id(text: &str) -> SandboxId {
    text.parse().expect("an id")
}

#[tokio::test]
async fn traffic_resumes_what_was_created_so_once_and_for_long_enough() {
    let rig = Rig::start().await;
    for (create, seconds) in [(AUTO, 600), (SHORT, 300)] {
        let name = paused(&rig, create).await;
        let asked_at = clock::now().0;
        let before = rig.node.state.creates.lock().expect("no panic holds it").len();
        let asleep = id(&name);
        let wakes = (0..20).map(|_| rig.control.wake.wake(&asleep, false, None));
        for outcome in futures::future::join_all(wakes).await {
            assert_eq!(outcome, Ok(()));
        }
        assert!(rig.control.routes.get(&name).is_some());
        let creates = rig.node.state.creates.lock().expect("no panic holds it").len();
        assert_eq!(creates, before + 1);
        let lives = rig.node.state.end_of(&name) - asked_at;
        assert!((0..5_000).contains(&(lives - seconds * 1000)), "{lives}");
    }
    rig.stop().await;
}

#[tokio::test]
async fn who_may_not_use_it_does_not_wake_it() {
    let rig = Rig::start_with(Config { max_concurrent_sandboxes: 1, ..config() }).await;
    let wake = rig.control.wake.clone();
    let other = paused(&rig, r#"{"templateID":"base","timeout":600,"autoPause":true}"#).await;
    assert_eq!(wake.wake(&id(&other), false, None).await, Err(Asleep::NotFound));
    assert_eq!(wake.wake(&id("inone"), false, None).await, Err(Asleep::NotFound));
    let name = paused(&rig, AUTO).await;
    let wrong = Some(Secret::new("0".repeat(64)));
    for token in [None, wrong] {
        let refused = wake.wake(&id(&name), true, token).await;
        assert_eq!(refused, Err(Asleep::NotPermitted));
    }
    let token = rig.control.client.get(&format!("/sandboxes/{name}")).await.json();
    let token = token["envdAccessToken"].as_str().expect("a token").to_owned();
    let running = rig.create(AUTO).await;
    let at_limit = wake.wake(&id(&name), true, Some(Secret::new(token.clone()))).await;
    assert_eq!(at_limit, Err(Asleep::AtLimit { limit: 1 }));
    // One that runs is left as it is.
    let end = rig.node.state.end_of(&running);
    assert_eq!(wake.wake(&id(&running), false, None).await, Ok(()));
    assert_eq!(rig.node.state.end_of(&running), end);
    assert_eq!(rig.control.client.delete(&format!("/sandboxes/{running}")).await.status, 204);
    assert_eq!(wake.wake(&id(&name), true, Some(Secret::new(token))).await, Ok(()));
    rig.stop().await;
}

#[tokio::test]
async fn what_would_have_to_boot_sleeps_on() {
    let rig = Rig::start().await;
    let name = rig.create(AUTO).await;
    let pause = format!("/sandboxes/{name}/pause");
    assert_eq!(rig.control.client.post(&pause, r#"{"memory":false}"#).await.status, 204);
    assert_eq!(rig.control.wake.wake(&id(&name), false, None).await, Err(Asleep::NotFound));
    rig.stop().await;
}
