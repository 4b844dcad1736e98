//! What is measured of one server, in this order: nothing yet, one caller, many, ten thousand, and how
//! those end.

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Result, bail};

use super::super::report::{Figure, Target, median, percentile};
use super::client::{Api, NodeCaller, Page};
use crate::server::Server;

/// Creates of one caller, each killed before the next.
const SEQUENTIAL: usize = 1000;
/// Creates before anything is timed.
const WARM_UP: usize = 50;
/// Callers at the same time.
const CALLERS: u32 = 50;
/// How long they go on.
const SUSTAINED: Duration = Duration::from_secs(15);
/// How often the whole list is walked.
const WALKS: usize = 5;
/// How long the server is left alone with all that live.
const IDLE: Duration = Duration::from_secs(20);
/// From the time all are told their end to that end: longer than the telling takes.
const ENDS_IN: Duration = Duration::from_secs(20);
/// From that end until the last must be gone.
const ENDED_WITHIN: Duration = Duration::from_secs(120);

/// Everything, of a server that has no sandbox yet.
pub(super) fn all(server: &Server, node: &Path, live: u32) -> Result<Vec<Figure>> {
    let mut api = connect(server)?;
    for _ in 0..WARM_UP {
        let id = api.create()?;
        api.kill(&id)?;
    }
    let empty_mib = server.resident_mib()?;
    let mut figures = sequential(&mut api, node)?;
    figures.extend(sustained(server)?);
    let (creates, ids) = burst(server, live)?;
    figures.push(creates);
    let full_mib = server.resident_mib()?;
    figures.extend(pages(&mut api, live)?);
    figures.push(figure("resident, no sandbox", "MiB", empty_mib, None, None));
    let added = full_mib - empty_mib;
    let most = Some(Target::AtMost(100.0));
    figures.push(figure("resident, live sandboxes over none", "MiB", added, None, most));
    figures.extend(idle(server)?);
    figures.extend(expiry(server, node, &ids)?);
    Ok(figures)
}

fn connect(server: &Server) -> Result<Api> {
    Api::connect(&server.ready.api_url, &server.ready.api_key)
}

fn figure(
    what: &'static str,
    unit: &'static str,
    ours: f64,
    peer: Option<f64>,
    target: Option<Target>,
) -> Figure {
    Figure { what, unit, ours, peer, target, cpu_seconds_per_gb: None }
}

fn milliseconds(took: Duration) -> f64 {
    took.as_secs_f64() * 1000.0
}

/// Creates one after the other, beside the node's own create and the least a request costs; they
/// take turns, so that whatever else the machine does falls on all three.
fn sequential(api: &mut Api, node: &Path) -> Result<Vec<Figure>> {
    let mut node = NodeCaller::connect(node)?;
    let (mut creates, mut kills) = (Vec::new(), Vec::new());
    let (mut of_node, mut floors) = (Vec::new(), Vec::new());
    for _ in 0..SEQUENTIAL {
        let started = Instant::now();
        let id = api.create()?;
        let created = Instant::now();
        api.kill(&id)?;
        let killed = Instant::now();
        api.health()?;
        floors.push(milliseconds(killed.elapsed()));
        creates.push(milliseconds(created - started));
        kills.push(milliseconds(killed - created));
        of_node.push(milliseconds(node.create_and_kill()?));
    }
    let p99 = |values: &mut [f64]| percentile(values, 99);
    Ok(vec![
        figure(
            "create, p50; beside the node's",
            "ms",
            median(&mut creates),
            Some(median(&mut of_node)),
            Some(Target::AtMost(3.0)),
        ),
        figure(
            "create, p99; beside the node's",
            "ms",
            p99(&mut creates),
            Some(p99(&mut of_node)),
            Some(Target::AtMost(20.0)),
        ),
        figure(
            "kill, p50; beside GET /health",
            "ms",
            median(&mut kills),
            Some(median(&mut floors)),
            None,
        ),
    ])
}

/// Lets all callers do `work` until it says that it is over; answers how often it was done and how
/// long it took.
fn together(
    server: &Server,
    work: impl Fn(&mut Api) -> Result<bool> + Sync,
) -> Result<(u32, Duration)> {
    let done = AtomicU32::new(0);
    let failure = Mutex::new(None);
    let mut callers = (0..CALLERS).map(|_| connect(server)).collect::<Result<Vec<_>>>()?;
    let started = Instant::now();
    std::thread::scope(|scope| {
        for api in &mut callers {
            scope.spawn(|| {
                loop {
                    match work(api) {
                        Ok(true) => done.fetch_add(1, Ordering::Relaxed),
                        Ok(false) => return,
                        Err(error) => {
                            if let Ok(mut failure) = failure.lock() {
                                failure.get_or_insert(error);
                            }
                            return;
                        }
                    };
                }
            });
        }
    });
    let took = started.elapsed();
    match failure.into_inner() {
        Ok(None) => Ok((done.into_inner(), took)),
        Ok(Some(error)) => Err(error),
        Err(_) => bail!("a caller panicked"),
    }
}

fn per_second((count, took): (u32, Duration)) -> f64 {
    f64::from(count) / took.as_secs_f64()
}

/// Creates at full speed, each killed at once, so that the number of sandboxes stays bounded.
fn sustained(server: &Server) -> Result<Vec<Figure>> {
    let end = Instant::now() + SUSTAINED / 3;
    let floor = together(server, |api| {
        api.health()?;
        Ok(Instant::now() < end)
    })?;
    let latencies = Mutex::new(Vec::new());
    let used = server.processor_ms()?;
    let end = Instant::now() + SUSTAINED;
    let creates = together(server, |api| {
        let started = Instant::now();
        let id = api.create()?;
        let took = milliseconds(started.elapsed());
        api.kill(&id)?;
        if let Ok(mut latencies) = latencies.lock() {
            latencies.push(took);
        }
        Ok(Instant::now() < end)
    })?;
    let used = (server.processor_ms()? - used) / f64::from(creates.0);
    let mut latencies = latencies.into_inner().unwrap_or_default();
    Ok(vec![
        figure(
            "creates a second, 50 callers, each killed; beside GET /health",
            "1/s",
            per_second(creates),
            Some(per_second(floor)),
            Some(Target::AtLeast(1000.0)),
        ),
        figure("processor time of the server, a create and its kill", "ms", used, None, None),
        figure("create of 50 callers, p99", "ms", percentile(&mut latencies, 99), None, None),
    ])
}

/// Creates at full speed until `live` sandboxes live; answers their ids too.
fn burst(server: &Server, live: u32) -> Result<(Figure, Vec<String>)> {
    let begun = AtomicU32::new(0);
    let ids = Mutex::new(Vec::new());
    let creates = together(server, |api| {
        if begun.fetch_add(1, Ordering::Relaxed) >= live {
            return Ok(false);
        }
        let id = api.create()?;
        if let Ok(mut ids) = ids.lock() {
            ids.push(id);
        }
        Ok(true)
    })?;
    let target = Some(Target::AtLeast(1000.0));
    let what = "creates a second, 50 callers, none killed";
    let figure = figure(what, "1/s", per_second(creates), None, target);
    Ok((figure, ids.into_inner().unwrap_or_default()))
}

/// What the server does with nobody asking: were anything to walk all sandboxes now and then, it
/// would show here.
fn idle(server: &Server) -> Result<Vec<Figure>> {
    let (used, began) = (server.processor_ms()?, Instant::now());
    pause(IDLE);
    let used = server.processor_ms()? - used;
    let share = used / milliseconds(began.elapsed()) * 100.0;
    Ok(vec![figure("processor, all live and nobody asks", "% of one", share, None, None)])
}

#[expect(clippy::disallowed_methods, reason = "the time itself is what is measured over")]
fn pause(time: Duration) {
    std::thread::sleep(time);
}

fn unix_ms() -> Result<i64> {
    #[expect(clippy::disallowed_methods, reason = "ends of sandboxes are on the wall clock")]
    let now = SystemTime::now();
    Ok(i64::try_from(now.duration_since(UNIX_EPOCH)?.as_millis())?)
}

/// Gives all sandboxes one end, to the millisecond, and times how long after it the last one is gone,
/// undo steps and all, as the node says.
fn expiry(server: &Server, node: &Path, ids: &[String]) -> Result<Vec<Figure>> {
    let mut node = NodeCaller::connect(node)?;
    let end_at = unix_ms()? + i64::try_from(ENDS_IN.as_millis())?;
    for id in ids {
        node.set_end(id, end_at)?;
    }
    let left_ms = u64::try_from(end_at - unix_ms()?).unwrap_or(0);
    if left_ms == 0 {
        bail!("telling {} sandboxes their end took longer than {ENDS_IN:?}", ids.len());
    }
    pause(Duration::from_millis(left_ms.saturating_sub(500)));
    let before = node.sandboxes()?;
    if usize::try_from(before) != Ok(ids.len()) {
        bail!("{before} sandboxes were left before their end, of {}", ids.len());
    }
    let used = server.processor_ms()?;
    let gone = loop {
        let (left, late_ms) = (node.sandboxes()?, unix_ms()? - end_at);
        if left == 0 {
            break late_ms;
        }
        if late_ms > i64::try_from(ENDED_WITHIN.as_millis())? {
            bail!("{left} sandboxes are left {late_ms} ms after their end");
        }
        pause(Duration::from_millis(2));
    };
    let used = server.processor_ms()? - used;
    let gone_ms = f64::from(u32::try_from(gone)?);
    let each_us = used * 1000.0 / f64::from(u32::try_from(ids.len())?);
    Ok(vec![
        figure("all end in one millisecond: the last is gone after", "ms", gone_ms, None, None),
        figure("processor time of one such end", "us", each_us, None, None),
    ])
}

/// Every page of the list of all, without a filter and with one that all pass.
fn pages(api: &mut Api, live: u32) -> Result<Vec<Figure>> {
    let mut times = |filter: &str| -> Result<Vec<f64>> {
        let mut times = Vec::new();
        for _ in 0..WALKS {
            let pages = api.walk(filter)?;
            let seen: usize = pages.iter().map(|page: &Page| page.sandboxes).sum();
            if u32::try_from(seen) != Ok(live) {
                bail!("{seen} sandboxes were listed, and {live} live");
            }
            times.extend(pages.iter().map(|page| milliseconds(page.took)));
        }
        Ok(times)
    };
    let mut plain = times("")?;
    let mut filtered = times("&metadata=bench%3Dcontrol&state=running")?;
    let most = Some(Target::AtMost(20.0));
    Ok(vec![
        figure("page of 100 of all live, p50", "ms", median(&mut plain), None, most),
        figure("page of 100 of all live, p99", "ms", percentile(&mut plain, 99), None, most),
        figure("the same by metadata, p50", "ms", median(&mut filtered), None, most),
        figure("the same by metadata, p99", "ms", percentile(&mut filtered, 99), None, most),
    ])
}
