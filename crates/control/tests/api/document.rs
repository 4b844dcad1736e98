//! The OpenAPI document and what is served say the same.

use std::collections::BTreeSet;
use std::path::Path;

use http::Method;
use serde_json::Value;

use crate::support::Rig;

/// Every method a path can have in the document.
const METHODS: [Method; 5] =
    [Method::GET, Method::PUT, Method::POST, Method::DELETE, Method::PATCH];

/// A path of the document with something in place of its parameters.
fn concrete(path: &str) -> String {
    let segments = path.split('/').map(|s| if s.starts_with('{') { "x" } else { s });
    segments.collect::<Vec<_>>().join("/")
}

fn paths(document: &Value) -> impl Iterator<Item = (&String, &Value)> {
    document["paths"].as_object().expect("paths").iter()
}

fn operations(document: &Value) -> impl Iterator<Item = (String, &Value)> {
    paths(document).flat_map(|(path, item)| {
        let operations = item.as_object().expect("operations").iter();
        operations.map(move |(method, operation)| (format!("{method} {path}"), operation))
    })
}

#[tokio::test]
async fn what_is_described_is_served_and_nothing_else_on_those_paths() {
    let rig = Rig::start().await;
    let client = &rig.control.client;
    let document = client.get("/openapi.json").await;
    assert_eq!(document.headers["content-type"], "application/json");
    let document = document.json();
    for (path, item) in paths(&document) {
        for method in &METHODS {
            let answer = client.send(method.clone(), &concrete(path), "").await;
            let what = format!("{method} {path}: {} {}", answer.status, answer.text);
            if item.get(method.as_str().to_ascii_lowercase()).is_some() {
                let is_there = answer.status != 404 || !answer.text.contains("no such route");
                assert!(is_there && !matches!(answer.status, 405 | 501), "{what}");
            } else if answer.status != 501 {
                answer.assert_error(405, "no such route");
                let allowed = answer.headers["allow"].to_str().expect("text");
                assert!(!allowed.contains(method.as_str()), "{what}: allowed {allowed}");
            }
        }
    }
    rig.stop().await;
}

/// The other direction: a route can only be mounted together with its description.
#[test]
fn no_route_is_mounted_without_a_description() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![src.clone()];
    let mut mounts = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of sources") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                // Tests serve what they need, and that is nobody's API.
                if path.file_name().is_none_or(|name| name != "tests") {
                    folders.push(path);
                }
                continue;
            }
            let text = std::fs::read_to_string(&path).expect("a source file");
            let plain = [".route(", ".route_service(", ".nest(", ".nest_service("];
            if plain.iter().any(|call| text.contains(call)) {
                mounts.push(path.strip_prefix(&src).expect("below it").to_owned());
            }
        }
    }
    // What answers 501 is not described: see there.
    assert_eq!(mounts, [Path::new("api/later.rs")]);
}

#[tokio::test]
async fn every_operation_is_described_whole() {
    let rig = Rig::start().await;
    let document = rig.control.client.get("/openapi.json").await.json();
    rig.stop().await;
    let mut ids = BTreeSet::new();
    for (name, operation) in operations(&document) {
        let id = operation["operationId"].as_str().expect("an id");
        assert!(ids.insert(id.to_owned()), "{name}: {id} is another's");
        assert!(operation["summary"].is_string(), "{name} says nothing of itself");
        let mut described: BTreeSet<&str> = BTreeSet::new();
        for parameter in operation["parameters"].as_array().into_iter().flatten() {
            let description = parameter["description"].as_str().unwrap_or_default();
            assert!(!description.is_empty(), "{name}: {parameter}");
            if parameter["in"] == "path" {
                described.insert(parameter["name"].as_str().expect("a name"));
            }
        }
        let in_path: BTreeSet<&str> = name
            .split(['{', '}'])
            .enumerate()
            .filter(|(n, _)| n % 2 == 1)
            .map(|(_, p)| p)
            .collect();
        assert_eq!(described, in_path, "{name}: parameters in the path");
        for (status, answer) in operation["responses"].as_object().expect("answers") {
            assert!(
                !answer["description"].as_str().unwrap_or_default().is_empty(),
                "{name} {status}"
            );
            let body = &answer["content"]["application/json"]["schema"]["$ref"];
            let is_error = status.starts_with(['4', '5']);
            assert_eq!(body == "#/components/schemas/Error", is_error, "{name} {status}: {body}");
        }
    }
}

/// Every reference leads somewhere, so that generators of clients can read it.
#[tokio::test]
async fn every_reference_leads_somewhere() {
    let rig = Rig::start().await;
    let document = rig.control.client.get("/openapi.json").await.json();
    rig.stop().await;
    let mut open = vec![&document];
    let mut seen = 0;
    while let Some(value) = open.pop() {
        match value {
            Value::Array(items) => open.extend(items),
            Value::Object(fields) => {
                open.extend(fields.values());
                if let Some(Value::String(target)) = fields.get("$ref") {
                    let pointer = target.strip_prefix('#').expect("within the document");
                    assert!(document.pointer(pointer).is_some(), "{target} is not there");
                    seen += 1;
                }
            }
            _ => {}
        }
    }
    assert!(seen > 50, "only {seen} references");
    let schemes = document["components"]["securitySchemes"].as_object().expect("schemes");
    for (name, operation) in operations(&document) {
        for requirement in operation["security"].as_array().into_iter().flatten() {
            for scheme in requirement.as_object().expect("schemes").keys() {
                assert!(schemes.contains_key(scheme), "{name}: {scheme} is not described");
            }
        }
    }
}
