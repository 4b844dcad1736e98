//! The OpenAPI document holds what the contract asks for, and no more without a reason.

use std::collections::BTreeSet;

use http::Method;
use serde_json::Value;

use crate::support::Rig;

/// Every operation can get these. Source: contract section 1.2.
const ALWAYS: [u64; 3] = [401, 429, 500];
/// Needs nobody to ask, so no more than its success is promised.
const OPEN: [&str; 1] = ["/health"];

fn contract() -> Value {
    serde_json::from_str(include_str!("../fixtures/contract.json")).expect("the fixture is JSON")
}

async fn document(rig: &Rig) -> Value {
    rig.control.client.get("/openapi.json").await.json()
}

fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

fn texts(value: &Value) -> BTreeSet<&str> {
    list(value).map(|text| text.as_str().expect("text")).collect()
}

fn name(operation: &Value) -> (&str, &str) {
    let text = |field: &str| operation[field].as_str().expect("text");
    (text("method"), text("path"))
}

/// `path` and the document's operation there, if it has one.
fn described<'a>(document: &'a Value, method: &str, path: &str) -> Option<&'a Value> {
    document["paths"].get(path)?.get(method.to_ascii_lowercase())
}

/// Names of the statuses an operation of the fixture has.
fn statuses(operation: &Value, path: &str) -> BTreeSet<u64> {
    let own = list(&operation["success"]).chain(list(&operation["other"]));
    let mut all: BTreeSet<u64> = own.map(|s| s.as_u64().expect("a status")).collect();
    if !OPEN.contains(&path) {
        all.extend(ALWAYS);
    }
    all
}

/// Every property of a schema, and those it always has; what it is put together from included.
fn properties<'a>(
    document: &'a Value,
    schema: &'a Value,
) -> (BTreeSet<&'a str>, BTreeSet<&'a str>) {
    let (mut all, mut required) = (BTreeSet::new(), BTreeSet::new());
    let mut open = vec![schema];
    while let Some(schema) = open.pop() {
        if let Some(target) = schema["$ref"].as_str() {
            let pointer = target.strip_prefix('#').expect("within the document");
            open.push(document.pointer(pointer).expect("it is there"));
        }
        open.extend(list(&schema["allOf"]));
        required.extend(texts(&schema["required"]));
        all.extend(schema["properties"].as_object().into_iter().flatten().map(|(k, _)| k.as_str()));
    }
    (all, required)
}

/// The schema a reference, a nullable reference or a list of references names; lists in brackets.
fn named(schema: &Value) -> String {
    if let Some(target) = schema["$ref"].as_str() {
        return target.rsplit('/').next().expect("a name").to_owned();
    }
    if schema["type"] == "array" {
        return format!("[{}]", named(&schema["items"]));
    }
    list(&schema["oneOf"]).map(named).find(|name| !name.is_empty()).unwrap_or_default()
}

#[tokio::test]
async fn what_the_contract_asks_for_is_there() {
    let rig = Rig::start().await;
    let document = document(&rig).await;
    rig.stop().await;
    let contract = contract();
    let mut compared = 0;
    for wanted in list(&contract["operations"]).filter(|o| o.get("later").is_none()) {
        let (method, path) = name(wanted);
        let found = described(&document, method, path);
        let found = found.unwrap_or_else(|| panic!("{method} {path} is not in the document"));
        compared += 1;
        for (place, names) in [("query", &wanted["query"]), ("header", &wanted["takes"])] {
            let found: BTreeSet<&str> = list(&found["parameters"])
                .filter(|parameter| parameter["in"] == place)
                .map(|parameter| parameter["name"].as_str().expect("a name"))
                .collect();
            assert_eq!(texts(names), found, "{method} {path}: in the {place}");
        }
        for status in statuses(wanted, path) {
            let answer = &found["responses"][status.to_string()];
            assert!(answer.is_object(), "{method} {path}: {status} is not described");
        }
        let success = wanted["success"][0].to_string();
        let success = &found["responses"][success];
        for header in texts(&wanted["headers"]) {
            assert!(success["headers"][header].is_object(), "{method} {path}: header {header}");
        }
        if let Some(schema) = wanted["answer"].as_str() {
            let found = named(&success["content"]["application/json"]["schema"]);
            assert_eq!(found, schema, "{method} {path}: answer");
        }
        let body = named(&found["requestBody"]["content"]["application/json"]["schema"]);
        assert_eq!(body, wanted["body"].as_str().unwrap_or_default(), "{method} {path}: body");
    }
    assert!(compared >= 15, "only {compared} operations are compared");
}

#[tokio::test]
async fn shapes_have_the_fields_of_the_contract() {
    let rig = Rig::start().await;
    let document = document(&rig).await;
    rig.stop().await;
    let contract = contract();
    let schemas = contract["schemas"].as_object().expect("schemas");
    for (name, wanted) in schemas {
        let schema = &document["components"]["schemas"][name];
        assert!(schema.is_object(), "{name} is not in the document");
        let (found, required) = properties(&document, schema);
        let mut all = texts(&wanted["required"]);
        all.extend(texts(&wanted["optional"]));
        let beyond = texts(&contract["beyond"]["schemas"][name]);
        let extra: BTreeSet<&str> = found.difference(&all).copied().collect();
        assert_eq!(extra, beyond, "{name}: fields the contract does not have");
        let missing: Vec<&&str> = all.difference(&found).collect();
        assert!(missing.is_empty(), "{name} lacks {missing:?}");
        assert_eq!(required, texts(&wanted["required"]), "{name}: what is always there");
    }
}

#[tokio::test]
async fn what_is_beyond_the_contract_has_a_reason() {
    let rig = Rig::start().await;
    let document = document(&rig).await;
    rig.stop().await;
    let contract = contract();
    let beyond = &contract["beyond"];
    let (mut operations, mut used) = (BTreeSet::new(), BTreeSet::new());
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, operation) in item.as_object().expect("operations") {
            let method = method.to_ascii_uppercase();
            let wanted = list(&contract["operations"]).find(|o| name(o) == (&method, path));
            let Some(wanted) = wanted else {
                operations.insert(format!("{method} {path}"));
                continue;
            };
            let promised = statuses(wanted, path);
            for status in operation["responses"].as_object().expect("answers").keys() {
                if !promised.contains(&status.parse().expect("a status")) {
                    used.insert(status.clone());
                }
            }
        }
    }
    let reasons = |part: &str| -> BTreeSet<String> {
        let reasons = beyond[part].as_object().expect("reasons").iter();
        reasons
            .map(|(name, reason)| {
                assert!(reason.as_str().is_some_and(|r| r.len() > 10), "{name}: no reason");
                name.clone()
            })
            .collect()
    };
    assert_eq!(operations, reasons("operations"));
    assert_eq!(used, reasons("statuses"));
}

#[tokio::test]
async fn what_comes_later_says_so() {
    let rig = Rig::start().await;
    let document = document(&rig).await;
    let contract = contract();
    let sandbox = rig.create(r#"{"templateID":"base"}"#).await;
    for wanted in list(&contract["operations"]).filter(|o| o["later"].is_string()) {
        let (method, path) = name(wanted);
        assert!(
            described(&document, method, path).is_none(),
            "{method} {path} is served: take `later` from its line of the fixture"
        );
        let of_sandbox = path.replace("/sandboxes/{id}", &format!("/sandboxes/{sandbox}"));
        let concrete = of_sandbox.replace(['{', '}'], "");
        let method: Method = method.parse().expect("a method");
        let answer = rig.control.client.send(method.clone(), &concrete, "{}").await;
        if answer.status == 404 {
            answer.assert_error(404, "no such route");
        } else {
            answer.assert_error(501, "is not supported by this server yet");
        }
    }
    let nobodys = "/sandboxes/i00000000000000000000/network";
    let answer = rig.control.client.send(Method::PUT, nobodys, "{}").await;
    answer.assert_error(404, "doesn't exist");
    rig.stop().await;
}
