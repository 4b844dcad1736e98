//! Callers of the control plane and of its node, each with one keep-alive connection.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::http::Connection;

/// Sandboxes on one page: the most a page holds. Source: contract section 1.2.
const PAGE: usize = 100;
/// When sandboxes of the node alone would end, were they not killed: in the year 2100.
const END_AT_UNIX_MS: u64 = 4_102_444_800_000;
/// What a sandbox of the benchmark is created with.
const CREATE: &[u8] = br#"{"templateID":"base","timeout":3600,"metadata":{"bench":"control"}}"#;

/// A caller of the REST API.
pub(super) struct Api {
    connection: Connection,
    key: String,
}

#[derive(Deserialize)]
struct Created {
    #[serde(rename = "sandboxID")]
    id: String,
}

/// One page of a list.
pub(super) struct Page {
    pub(super) took: Duration,
    pub(super) sandboxes: usize,
    next: Option<String>,
}

impl Api {
    /// Connects to a server on this machine.
    pub(super) fn connect(url: &str, key: &str) -> Result<Api> {
        let port = url.rsplit(':').next().and_then(|port| port.parse().ok());
        let connection = Connection::open(port.with_context(|| format!("{url} has no port"))?)?;
        Ok(Api { connection, key: key.to_owned() })
    }

    fn call(&mut self, method: &str, target: &str, body: &[u8]) -> Result<Vec<u8>> {
        let headers = [("x-api-key", self.key.as_str()), ("content-type", "application/json")];
        self.connection.send(method, target, &headers, body)?;
        let mut answer = Vec::new();
        self.connection
            .answer(|bytes| answer.extend_from_slice(bytes))
            .with_context(|| format!("{method} {target}"))?;
        Ok(answer)
    }

    /// The least a request can cost.
    pub(super) fn health(&mut self) -> Result<()> {
        self.call("GET", "/health", b"").map(drop)
    }

    /// Creates a sandbox; answers its id.
    pub(super) fn create(&mut self) -> Result<String> {
        let answer = self.call("POST", "/v2/sandboxes", CREATE)?;
        Ok(serde_json::from_slice::<Created>(&answer)?.id)
    }

    pub(super) fn kill(&mut self, id: &str) -> Result<()> {
        self.call("DELETE", &format!("/sandboxes/{id}"), b"").map(drop)
    }

    /// Walks a whole list; `filter` is put in each page's query.
    pub(super) fn walk(&mut self, filter: &str) -> Result<Vec<Page>> {
        let mut pages = Vec::new();
        let mut next: Option<String> = None;
        loop {
            let token = next.map_or(String::new(), |token| format!("&nextToken={token}"));
            let page = self.page(&format!("/v2/sandboxes?limit={PAGE}{filter}{token}"))?;
            next = page.next.clone();
            pages.push(page);
            if next.is_none() {
                return Ok(pages);
            }
        }
    }

    fn page(&mut self, target: &str) -> Result<Page> {
        let started = Instant::now();
        let answer = self.call("GET", target, b"")?;
        let took = started.elapsed();
        let next = self.connection.header("x-next-token").map(str::to_owned);
        let listed: Vec<Value> = serde_json::from_slice(&answer)?;
        Ok(Page { took, sandboxes: listed.len(), next })
    }
}

/// A caller of the node's RPC, as control is one.
pub(super) struct NodeCaller {
    connection: Connection,
    template: Value,
    count: u32,
}

impl NodeCaller {
    pub(super) fn connect(socket: &Path) -> Result<NodeCaller> {
        let connection = Connection::open_unix(socket)?;
        let mut caller = NodeCaller { connection, template: Value::Null, count: 0 };
        let listed = caller.call("ListTemplates", &json!({}))?;
        caller.template = listed["templates"][0].clone();
        if caller.template.is_null() {
            bail!("the node has no template");
        }
        Ok(caller)
    }

    fn call(&mut self, procedure: &str, body: &Value) -> Result<Value> {
        let target = format!("/belljar.node.v1.NodeService/{procedure}");
        let headers = [("content-type", "application/json")];
        self.connection.send("POST", &target, &headers, body.to_string().as_bytes())?;
        let mut answer = Vec::new();
        self.connection
            .answer(|bytes| answer.extend_from_slice(bytes))
            .with_context(|| procedure.to_owned())?;
        Ok(serde_json::from_slice(&answer)?)
    }

    /// How many sandboxes it has.
    pub(super) fn sandboxes(&mut self) -> Result<u64> {
        let described = self.call("Describe", &json!({}))?;
        // The JSON form of a message leaves zeros out.
        Ok(described["load"]["sandboxCount"].as_u64().unwrap_or(0))
    }

    /// Moves the end of a sandbox.
    pub(super) fn set_end(&mut self, id: &str, end_at_unix_ms: i64) -> Result<()> {
        let request = json!({ "sandboxId": id, "endAtUnixMs": end_at_unix_ms.to_string() });
        self.call("SetSandboxEnd", &request).map(drop)
    }

    /// Creates a sandbox and kills it; answers how long the create took.
    pub(super) fn create_and_kill(&mut self) -> Result<Duration> {
        self.count += 1;
        let id = format!("ibench{:014}", self.count);
        let request = json!({
            "sandboxId": id,
            "executionId": format!("00000000-0000-4000-8000-{:012}", self.count),
            "templateId": self.template["templateId"],
            "buildId": self.template["buildId"],
            "endAtUnixMs": END_AT_UNIX_MS.to_string(),
        });
        let started = Instant::now();
        self.call("CreateSandbox", &request)?;
        let took = started.elapsed();
        self.call("KillSandbox", &json!({ "sandboxId": id }))?;
        Ok(took)
    }
}
