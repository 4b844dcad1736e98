//! What an idle sandbox of the fake runtime costs this process. Alone in its program, because the
//! measure is the program's own memory.

#[path = "support/mod.rs"]
mod support;

use std::time::Duration;

use belljar_daemon::Scope;
use belljar_runtime::fake::Step;
use support::{PATIENCE, Rig};

/// Sandboxes measured: enough that what is there once does not count.
const SANDBOXES: u32 = 2000;
/// A twentieth more than was measured in a build that is not optimised. With what control and
/// proxy hold, ten thousand fit 100 MiB by far.
const EACH_MAX_BYTES: u64 = 6_000;

/// Bytes of memory this process has, statm(5).
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").expect("procfs");
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok());
    pages.expect("a number of pages") * 4096
}

#[tokio::test]
async fn an_idle_sandbox_costs_a_few_kilobytes() {
    let (rig, scope) = (Rig::new(SANDBOXES + 100).await, Scope::root("test"));
    let (sandboxes, _) = rig.open(rig.limits(), &scope).await;
    let later = rig.clock.now().plus(Duration::from_secs(3600));
    // The first ones fill what is there once.
    for _ in 0..100 {
        sandboxes.create(rig.request(later)).await.expect("create");
    }
    let before = resident_bytes();
    for _ in 0..SANDBOXES {
        sandboxes.create(rig.request(later)).await.expect("create");
    }
    let each = resident_bytes().saturating_sub(before) / u64::from(SANDBOXES);
    println!("an idle sandbox costs {each} bytes");
    assert!(each <= EACH_MAX_BYTES, "an idle sandbox costs {each} bytes");
    assert_eq!(rig.faults.reached(Step::Restore), SANDBOXES + 100);
    assert!(scope.close(3 * PATIENCE).await);
    rig.assert_nothing_left();
}
