//! Lists of a team with many sandboxes: pages, filters and totals.

use std::collections::{BTreeMap, HashSet};

use serde_json::{Value, json};

use crate::support::Rig;

const MANY: usize = 250;

async fn page(rig: &Rig, query: &str) -> (Vec<String>, Option<String>, usize) {
    let answer = rig.control.client.get(&format!("/v2/sandboxes?{query}")).await;
    assert_eq!(answer.status, 200, "{query}: {}", answer.text);
    let ids = answer.json().as_array().expect("a list").iter().map(id).collect();
    let header = |name| answer.headers.get(name).map(|v| v.to_str().expect("text").to_owned());
    let total = header("x-total-running").expect("it is always there");
    (ids, header("x-next-token"), total.parse().expect("a number"))
}

fn id(sandbox: &Value) -> String {
    sandbox["sandboxID"].as_str().expect("an id").to_owned()
}

async fn all_pages(rig: &Rig, query: &str, limit: usize) -> (Vec<String>, usize) {
    let (mut seen, mut token, mut totals) = (Vec::new(), String::new(), HashSet::new());
    loop {
        let (ids, next, total) = page(rig, &format!("{query}&limit={limit}{token}")).await;
        assert!(ids.len() == limit || next.is_none(), "a page in the middle is full");
        seen.extend(ids);
        totals.insert(total);
        let Some(next) = next else { break };
        token = format!("&nextToken={next}");
    }
    assert_eq!(totals.len(), 1, "the total is the same on every page: {totals:?}");
    (seen, totals.into_iter().next().expect("there was a page"))
}

#[tokio::test]
async fn pages_of_many_cover_all_once_with_and_without_filters() {
    let rig = Rig::start().await;
    let mut by_color: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for n in 0..MANY {
        let color = ["red", "green", "blue"][n % 3];
        let body = json!({"templateID": "base", "metadata": {"color": color, "n": n.to_string()}});
        by_color.entry(color).or_default().push(rig.create(&body.to_string()).await);
    }
    let all: HashSet<&String> = by_color.values().flatten().collect();
    for order in ["asc", "desc"] {
        let (seen, total) = all_pages(&rig, &format!("order={order}"), 37).await;
        assert_eq!((seen.len(), total), (MANY, MANY));
        assert_eq!(seen.iter().collect::<HashSet<_>>(), all);
        for (color, made) in &by_color {
            let query = format!("order={order}&metadata=color%3D{color}");
            let (found, total) = all_pages(&rig, &query, 10).await;
            assert_eq!((found.len(), total), (made.len(), made.len()), "{query}");
            let in_order: Vec<_> = seen.iter().filter(|id| made.contains(id)).cloned().collect();
            assert_eq!(found, in_order, "{query}");
        }
    }
    let (one, next, total) = page(&rig, "metadata=n%3D7%26color%3Dgreen&template=base").await;
    assert_eq!((one.len(), next, total), (1, None, 1));
    rig.stop().await;
}

/// A time as text that sorts as the time does: fractions come without their last zeros.
fn sortable(time: &str) -> String {
    let time = time.trim_end_matches('Z');
    let (second, fraction) = time.split_once('.').unwrap_or((time, ""));
    format!("{second}.{fraction:0<9}")
}

#[tokio::test]
async fn started_after_includes_its_time_and_works_with_pages() {
    let rig = Rig::start().await;
    for _ in 0..20 {
        rig.create(r#"{"templateID":"base"}"#).await;
    }
    let listed = rig.control.client.get("/v2/sandboxes?order=asc").await.json();
    let listed = listed.as_array().expect("a list").clone();
    let from = listed[12]["startedAt"].as_str().expect("a time").to_owned();
    let expected: Vec<String> = listed
        .iter()
        .filter(|sandbox| {
            sortable(sandbox["startedAt"].as_str().expect("a time")) >= sortable(&from)
        })
        .map(id)
        .collect();
    assert!(expected.contains(&id(&listed[12])), "its own time is included");
    for (order, mut expected) in [("asc", expected.clone()), ("desc", expected)] {
        if order == "desc" {
            expected.reverse();
        }
        let query = format!("order={order}&startedAfter={from}");
        for limit in [1, 3, 100] {
            let (found, total) = all_pages(&rig, &query, limit).await;
            assert_eq!((&found, total), (&expected, expected.len()), "{query} by {limit}");
        }
    }
    rig.stop().await;
}

#[tokio::test]
async fn the_old_list_filters_by_metadata_only() {
    let rig = Rig::start().await;
    let red = rig.create(r#"{"templateID":"base","metadata":{"color":"red"}}"#).await;
    rig.create(r#"{"templateID":"base"}"#).await;
    let client = &rig.control.client;
    for (query, count) in [
        ("", 2),
        ("?template=nope", 2),
        ("?state=paused&limit=1&startedAfter=2999-01-01T00:00:00Z", 2),
        ("?metadata=color%3Dblue", 0),
    ] {
        let list = client.get(&format!("/sandboxes{query}")).await.json();
        assert_eq!(list.as_array().map(Vec::len), Some(count), "{query}");
    }
    let list = client.get("/sandboxes?metadata=color%3Dred").await.json();
    assert_eq!(list[0]["sandboxID"], json!(red));
    rig.stop().await;
}

#[tokio::test]
async fn metadata_has_a_limit() {
    let rig = Rig::start().await;
    let body = |bytes: usize| {
        json!({"templateID": "base", "metadata": {"a": "x".repeat(bytes)}}).to_string()
    };
    let client = &rig.control.client;
    for path in ["/sandboxes", "/v2/sandboxes"] {
        client.post(path, &body(65_536)).await.assert_error(400, "the field 'metadata'");
        assert_eq!(client.post(path, &body(65_000)).await.status, 201);
    }
    rig.stop().await;
}
