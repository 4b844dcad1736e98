//! The node service over its real socket, on the fake runtime.

#[path = "../../sandbox/tests/support/mod.rs"]
mod support;

use std::time::Duration;

use belljar_daemon::{OnError, Scope};
use belljar_domain::{ExecutionId, SandboxId, Tier};
use belljar_node::Config;
use belljar_sandbox::admission::Limits;
use belljar_wire::refusal::Refusal;
use belljar_wire::rpc::belljar::node::v1 as pb;
use connectrpc::client::{ClientConfig, Http2Connection, SharedHttp2Connection};
use connectrpc::{ConnectError, ErrorCode};
use http::Uri;
use support::{PATIENCE, Rig};

const HOUR: Duration = Duration::from_secs(3600);

struct Node {
    rig: Rig,
    scope: Scope,
    client: pb::NodeServiceClient<SharedHttp2Connection>,
}

impl Node {
    async fn start(limits: impl FnOnce(Limits) -> Limits) -> Node {
        let rig = Rig::new(8).await;
        let limits = limits(rig.limits());
        Node::start_on(rig, limits).await
    }

    async fn start_on(rig: Rig, limits: Limits) -> Node {
        let scope = Scope::root("node");
        let (sandboxes, _) = rig.open(limits, &scope.child("sandboxes")).await;
        let socket = rig.dir.path().join("node.sock");
        let config = Config {
            commit: "abc".to_owned(),
            node_id: "one".to_owned(),
            socket: socket.clone(),
            tier: Tier::Fake,
            tier_reason: "a test".to_owned(),
            reclaimed_sandboxes: 0,
        };
        let (ready, is_ready) = tokio::sync::oneshot::channel();
        let inner = scope.clone();
        scope.spawn_shielded("node", OnError::FailScope, async move {
            let served = belljar_node::serve(config, sandboxes.clone(), inner, move || {
                ready.send(()).expect("the test waits for it");
            });
            let served = served.await;
            assert!(sandboxes.close(PATIENCE).await, "sandboxes are left");
            served
        });
        is_ready.await.expect("it serves");
        let authority = Uri::from_static("http://node");
        let connection =
            Http2Connection::builder().lazy_unix(&socket, authority.clone()).shared(16);
        let client = pb::NodeServiceClient::new(connection, ClientConfig::new(authority).proto());
        Node { rig, scope, client }
    }

    fn request(&self, terms: &str) -> pb::CreateSandboxRequest {
        pb::CreateSandboxRequest {
            sandbox_id: SandboxId::random().to_string(),
            execution_id: ExecutionId::random().to_string(),
            build_id: self.rig.build_id.to_string(),
            template_id: self.rig.template_id.to_string(),
            end_at_unix_ms: self.rig.clock.now().plus(HOUR).0,
            terms: terms.to_owned(),
            ..pb::CreateSandboxRequest::default()
        }
    }

    async fn create(&self, request: pb::CreateSandboxRequest) -> Result<String, ConnectError> {
        let answer = self.client.create_sandbox(request).await?.into_owned();
        Ok(answer.sandbox.into_option().expect("a sandbox").sandbox_id)
    }

    async fn stop(self) -> Rig {
        drop(self.client);
        assert!(self.scope.close(PATIENCE).await, "the node did not stop");
        self.rig.assert_nothing_left();
        self.rig
    }
}

#[tokio::test]
async fn a_refusal_reaches_the_caller_with_its_reason() {
    let node = Node::start(|limits| Limits { vcpus: 2, ..limits }).await;
    node.create(node.request("")).await.expect("create");
    let error = node.create(node.request("")).await.expect_err("no processors are left");
    assert_eq!(Refusal::of(&error), Some(Refusal::Cpu));
    assert_eq!(error.code, ErrorCode::ResourceExhausted);
    let mut request = node.request("");
    request.build_id = "00000000-0000-4000-8000-000000000000".to_owned();
    let error = node.create(request).await.expect_err("no such build");
    assert_eq!((Refusal::of(&error), error.code), (Some(Refusal::NoTemplate), ErrorCode::NotFound));
    let draining = pb::NodeStatus::NODE_STATUS_DRAINING;
    let status = pb::SetNodeStatusRequest { status: draining.into(), ..Default::default() };
    node.client.set_node_status(status).await.expect("drain");
    let error = node.create(node.request("")).await.expect_err("it drains");
    assert_eq!(
        (Refusal::of(&error), error.code),
        (Some(Refusal::Draining), ErrorCode::Unavailable)
    );
    let error = node
        .client
        .set_node_status(pb::SetNodeStatusRequest::default())
        .await
        .expect_err("no status is none");
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    let describe = pb::DescribeRequest::default();
    let said = node.client.describe(describe).await.expect("describe").into_owned();
    assert_eq!(said.status, draining);
    assert_eq!((said.commit.as_str(), said.service_instance_id.len()), ("abc", 32));
    let load = said.load.into_option().expect("load");
    assert_eq!((load.sandbox_count, load.allocated_vcpus, load.create_successes), (1, 2, 1));
    assert_eq!((load.create_fails, said.capacity.vcpus), (0, 2));
    node.stop().await;
}

#[tokio::test]
async fn terms_come_back_and_long_lists_come_in_pages() {
    let node = Node::start(|limits| limits).await;
    let error = node.create(node.request(&"x".repeat((1 << 20) + 1))).await.expect_err("too long");
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    assert!(error.message.is_some_and(|text| text.contains("`terms`")));
    let terms = "x".repeat(1 << 20);
    for _ in 0..4 {
        node.create(node.request(&terms)).await.expect("create");
    }
    let (mut seen, mut pages, mut after) = (Vec::new(), 0, String::new());
    loop {
        let request = pb::ListSandboxesRequest {
            after_sandbox_id: after,
            ..pb::ListSandboxesRequest::default()
        };
        let page = node.client.list_sandboxes(request).await.expect("list").into_owned();
        assert!(page.sandboxes.iter().all(|info| info.terms == terms));
        seen.extend(page.sandboxes.into_iter().map(|info| info.sandbox_id));
        pages += 1;
        after = page.next_after_sandbox_id;
        if after.is_empty() {
            break;
        }
    }
    assert!(seen.is_sorted() && seen.len() == 4 && pages == 2, "{seen:?} on {pages} pages");
    let rig = node.stop().await;
    assert_eq!(rig.count("untold"), 4, "a stop is told of later");
}

#[tokio::test]
async fn figures_are_asked_for_one_by_one_or_all_at_once() {
    let node = Node::start(|limits| limits).await;
    let one = node.create(node.request("")).await.expect("create");
    let two = node.create(node.request("")).await.expect("create");
    let ask = async |ids: &[&str], latest_only| {
        let request = pb::SandboxMetricsRequest {
            sandbox_ids: ids.iter().map(|&id| id.to_owned()).collect(),
            latest_only,
            ..pb::SandboxMetricsRequest::default()
        };
        let answer = node.client.sandbox_metrics(request).await;
        answer.map(|answer| answer.into_owned().sandboxes)
    };
    assert_eq!(ask(&[], true).await.expect("all").len(), 2);
    assert_eq!(ask(&[&one, &two], true).await.expect("both").len(), 2);
    let history = ask(&[&one], false).await.expect("one");
    assert_eq!((history.len(), history[0].samples[0].cpu_count), (1, 2));
    assert!(ask(&["iabsent"], true).await.expect("nobody").is_empty());
    for (ids, latest_only) in [(vec![], false), (vec![&*one, &*two], false), (vec!["../x"], true)] {
        let error = ask(&ids, latest_only).await.expect_err("it cannot be");
        assert_eq!(error.code, ErrorCode::InvalidArgument, "{ids:?}");
    }
    node.stop().await;
}

#[tokio::test]
async fn ends_that_were_not_told_are_listed_until_they_are_forgotten() {
    let node = Node::start(|limits| limits).await;
    let id = node.create(node.request("mine")).await.expect("create");
    let rig = node.stop().await;
    let limits = rig.limits();
    let node = Node::start_on(rig, limits).await;
    let list = async || {
        let request = pb::ListReclaimedRequest::default();
        node.client.list_reclaimed(request).await.expect("list").into_owned().sandboxes
    };
    let ends = list().await;
    assert_eq!((ends.len(), &*ends[0].sandbox_id, &*ends[0].terms), (1, &*id, "mine"));
    assert_eq!(ends[0].reason, "shutdown");
    let forget = |execution: &str| pb::ForgetReclaimedRequest {
        execution_ids: vec![execution.to_owned()],
        ..pb::ForgetReclaimedRequest::default()
    };
    let error = node.client.forget_reclaimed(forget("../ledger")).await.expect_err("no id");
    assert_eq!(error.code, ErrorCode::InvalidArgument);
    node.client.forget_reclaimed(forget(&ends[0].execution_id)).await.expect("forget");
    assert!(list().await.is_empty());
    node.stop().await;
}
