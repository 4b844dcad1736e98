//! Every operation of the OpenAPI document, with what a team has to put into its path and what its
//! callers have to show.

use http::{HeaderMap, HeaderName, HeaderValue, Method};
use serde_json::{Value, json};

use super::client::Answer;
use super::node::TEMPLATE_ID;
use super::{ADMIN_TOKEN, Rig};

/// One operation as the document describes it.
pub(crate) struct Operation {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) described: Value,
    /// The least its body may be, so that no answer is about the body.
    pub(crate) body: String,
    /// The ways to say who is asking; each is what has to be shown together.
    pub(crate) ways: Vec<Vec<String>>,
}

impl Operation {
    /// Whether `scheme` alone opens it.
    pub(crate) fn takes(&self, scheme: &str) -> bool {
        self.ways.iter().any(|way| way == &[scheme])
    }

    pub(crate) fn has_body(&self) -> bool {
        self.described.get("requestBody").is_some()
    }
}

/// Reads the document.
pub(crate) async fn operations(rig: &Rig) -> Vec<Operation> {
    let document = rig.control.client.get("/openapi.json").await.json();
    let mut all = Vec::new();
    for (path, item) in document["paths"].as_object().expect("paths") {
        for (method, described) in item.as_object().expect("operations") {
            let schema = &described["requestBody"]["content"]["application/json"]["schema"];
            let ways = described["security"].as_array().into_iter().flatten();
            let schemes = |way: &Value| way.as_object().expect("schemes").keys().cloned().collect();
            all.push(Operation {
                method: method.to_ascii_uppercase().parse().expect("a method"),
                path: path.clone(),
                body: example(&document, schema).to_string(),
                ways: ways.map(schemes).collect(),
                described: described.clone(),
            });
        }
    }
    all
}

fn example(document: &Value, schema: &Value) -> Value {
    if let Some(target) = schema["$ref"].as_str() {
        let pointer = target.strip_prefix('#').expect("within the document");
        return example(document, document.pointer(pointer).expect("it is there"));
    }
    if let Some(first) = schema["enum"].as_array().and_then(|values| values.first()) {
        return first.clone();
    }
    if let Some(choices) = schema["oneOf"].as_array() {
        return example(document, choices.last().expect("a choice"));
    }
    let kind = schema["type"].as_array().map_or(&schema["type"], |kinds| &kinds[0]);
    match kind.as_str() {
        Some("string") => json!("example"),
        Some("integer" | "number") => json!(60),
        Some("boolean") => json!(true),
        Some("array") => json!([]),
        _ => {
            let required = schema["required"].as_array().into_iter().flatten();
            let fields = required.map(|name| {
                let name = name.as_str().expect("a name").to_owned();
                let value = example(document, &schema["properties"][&name]);
                (name, value)
            });
            fields.collect::<serde_json::Map<_, _>>().into()
        }
    }
}

/// What a team has, and the ids of it.
pub(crate) struct Owned {
    pub(crate) sandbox: String,
    pub(crate) team: String,
    pub(crate) key: String,
    pub(crate) user: String,
    pub(crate) token: String,
    token_text: String,
    pub(crate) webhook: String,
    node: String,
}

impl Owned {
    /// Makes one of everything for the rig's first team.
    pub(crate) async fn make(rig: &Rig) -> Owned {
        let body = r#"{"templateID":"base","timeout":3600,"metadata":{"secret":"first team's"}}"#;
        let sandbox = rig.create(body).await;
        let snapshots = format!("/sandboxes/{sandbox}/snapshots");
        assert_eq!(rig.control.client.post(&snapshots, "").await.status, 201);
        let team = rig.control.store.ensure_team("default").await.expect("it is there");
        let team = team.id.to_string();
        let keys = admin(rig, &format!("/admin/teams/{team}/api-keys")).await;
        let (user, token_text) = rig.user("first@example.org").await;
        let member = format!("/admin/teams/{team}/members/{user}");
        let member = rig.admin("PUT", &member, json!({"isDefault": true})).await;
        assert_eq!(member.status, 200, "{}", member.text);
        let tokens = admin(rig, &format!("/admin/users/{user}/access-tokens")).await;
        let hook = json!({
            "name": "first team's hook", "url": "https://hooks.example.org/", "enabled": false,
            "events": ["sandbox.lifecycle.killed"], "signatureSecret": "first team's signature",
        });
        let hook = rig.control.client.post("/events/webhooks", &hook.to_string()).await;
        assert_eq!(hook.status, 201, "{}", hook.text);
        let text = |value: &Value| value.as_str().expect("an id").to_owned();
        Owned {
            sandbox,
            key: text(&keys[0]["id"]),
            token: text(&tokens[0]["id"]),
            webhook: text(&hook.json()["id"]),
            node: admin(rig, "/nodes").await[0]["id"].as_str().unwrap_or("node").to_owned(),
            team,
            user,
            token_text,
        }
    }

    /// `path` with the team's own ids in it.
    pub(crate) fn filled(&self, path: &str) -> String {
        let mut before = "";
        let segments = path.split('/').map(|segment| {
            let whose = std::mem::replace(&mut before, segment);
            if !segment.starts_with('{') {
                return segment;
            }
            match whose {
                "sandboxes" => &self.sandbox,
                "templates" | "aliases" => TEMPLATE_ID,
                "teams" => &self.team,
                "api-keys" => &self.key,
                "users" | "members" => &self.user,
                "access-tokens" => &self.token,
                "webhooks" => &self.webhook,
                "deliveries" => "00000000-0000-4000-8000-000000000000",
                "nodes" => &self.node,
                "tiers" => "base",
                // A test that guessed would pass without looking.
                _ => panic!("which of a team's ids belongs into {path}?"),
            }
        });
        segments.collect::<Vec<_>>().join("/")
    }

    /// What to show for `operation`: nothing where it is open, `None` where only a token of an
    /// identity provider would do.
    pub(crate) fn credentials(&self, rig: &Rig, operation: &Operation) -> Option<HeaderMap> {
        if operation.ways.is_empty() {
            return Some(HeaderMap::new());
        }
        operation.ways.iter().find_map(|way| {
            let shown = way.iter().map(|scheme| match scheme.as_str() {
                "ApiKeyAuth" => Some(("x-api-key", rig.control.client.key.clone())),
                "AccessTokenAuth" => Some(("authorization", format!("Bearer {}", self.token_text))),
                "AdminApiKeyAuth" => Some(("x-admin-token", ADMIN_TOKEN.to_owned())),
                "AdminTeamAuth" => Some(("x-team-id", self.team.clone())),
                _ => None,
            });
            shown.map(|shown| shown.map(|(name, value)| header(name, &value))).collect()
        })
    }

    /// Everything of the team that can be told apart, to compare before and after.
    pub(crate) async fn state(&self, rig: &Rig) -> Value {
        let client = &rig.control.client;
        let ids = |list: Value| -> Vec<Value> {
            list.as_array().expect("a list").iter().map(|item| item["id"].clone()).collect()
        };
        let (team, user) = (&self.team, &self.user);
        json!({
            "sandbox": client.get(&format!("/sandboxes/{}", self.sandbox)).await.json(),
            "list": client.get("/v2/sandboxes").await.json(),
            "snapshots": client.get("/snapshots").await.json(),
            "kept": rig.node.state.kept(),
            "webhooks": client.get("/events/webhooks").await.json(),
            "team": admin(rig, &format!("/admin/teams/{team}")).await,
            "members": admin(rig, &format!("/admin/teams/{team}/members")).await,
            "keys": ids(admin(rig, &format!("/admin/teams/{team}/api-keys")).await),
            "tokens": ids(admin(rig, &format!("/admin/users/{user}/access-tokens")).await),
            "creates": rig.node.state.creates.lock().expect("no panic holds it").len(),
            "end": rig.node.state.end_of(&self.sandbox),
        })
    }
}

async fn admin(rig: &Rig, path: &str) -> Value {
    let answer: Answer = rig.admin("GET", path, Value::Null).await;
    assert_eq!(answer.status, 200, "{path}: {}", answer.text);
    answer.json()
}

/// One header.
pub(crate) fn header(name: &'static str, value: &str) -> (HeaderName, HeaderValue) {
    (HeaderName::from_static(name), HeaderValue::try_from(value).expect("a header value"))
}
