//! The real control plane over real sockets, and the little it needs around it.

pub(crate) mod client;
pub(crate) mod node;
pub(crate) mod receiver;
pub(crate) mod walk;

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use belljar_control::{ApiKey, Config, Deps, Route, RouteSink, ServeError, Store, WakeCaller};
use belljar_daemon::{OnError, Scope};
use belljar_domain::SandboxId;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

use client::{Answer, Client};
use node::FakeNode;

/// The operator's token.
pub(crate) const ADMIN_TOKEN: &str = "0123456789abcdef0123456789abcdef";
/// Longer than anything here takes, shorter than anybody waits.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Remembers routes as a proxy would.
#[derive(Default)]
pub(crate) struct Routes(Mutex<HashMap<String, Route>>);

impl RouteSink for Routes {
    fn publish(&self, id: &SandboxId, route: Route) {
        self.0.lock().expect("no panic holds it").insert(id.to_string(), route);
    }

    fn withdraw(&self, id: &SandboxId) {
        self.0.lock().expect("no panic holds it").remove(id.as_str());
    }
}

impl Routes {
    pub(crate) fn get(&self, id: &str) -> Option<Route> {
        self.0.lock().expect("no panic holds it").get(id).cloned()
    }
}

/// A control plane that runs.
pub(crate) struct Control {
    pub(crate) routes: Arc<Routes>,
    pub(crate) wake: WakeCaller,
    pub(crate) address: SocketAddr,
    pub(crate) client: Client,
    pub(crate) store: Store,
    scope: Scope,
    outcome: oneshot::Receiver<Result<(), ServeError>>,
}

impl Control {
    /// Starts one over the store and the node socket in `dir`; returns once it answers.
    pub(crate) async fn start(dir: &Path, config: Config) -> Control {
        Control::start_on(dir, vec![dir.join("node.sock")], config).await
    }

    /// Starts one over the store in `dir` and the nodes at `node_sockets`.
    pub(crate) async fn start_on(
        dir: &Path,
        node_sockets: Vec<PathBuf>,
        config: Config,
    ) -> Control {
        let store = Store::open(&dir.join("control.db")).await.expect("a store");
        let team = store.ensure_team("default").await.expect("a team");
        let key = ApiKey::random();
        store.add_key(&team.id, &key).await.expect("a key");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let address = listener.local_addr().expect("its address");
        let routes = Arc::new(Routes::default());
        let (wake, door) = belljar_control::wake_door();
        let deps = Deps {
            node_sockets,
            routes: routes.clone() as Arc<dyn RouteSink>,
            admin_token: Some(ADMIN_TOKEN.parse().expect("an admin token")),
            wake: Some(door),
            store: store.clone(),
        };
        let scope = Scope::root("test control");
        let (done, outcome) = oneshot::channel();
        let serving = belljar_control::serve(config, deps, listener, scope.clone());
        scope.spawn_shielded("serve", OnError::Log, async move {
            let _unheard = done.send(serving.await);
            Ok::<(), Infallible>(())
        });
        let client = Client::new(address, &key.expose());
        let control = Control { routes, wake, address, client, store, scope, outcome };
        let health = control.client.get("/health").await;
        assert_eq!((health.status, health.text.as_str()), (200, "Health check successful"));
        control
    }

    /// Stops it, and checks that everything it began has ended.
    pub(crate) async fn stop(self) {
        assert!(self.scope.close(PATIENCE).await, "the control plane did not stop");
        self.outcome.await.expect("serve returned").expect("serve went well");
        self.store.close().await;
    }
}

/// A node and a control plane in a folder of their own.
pub(crate) struct Rig {
    pub(crate) dir: TempDir,
    pub(crate) node: FakeNode,
    pub(crate) control: Control,
}

impl Rig {
    pub(crate) async fn start() -> Rig {
        Rig::start_with(config()).await
    }

    pub(crate) async fn start_with(config: Config) -> Rig {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let node = FakeNode::start(&dir.path().join("node.sock")).await;
        let control = Control::start(dir.path(), config).await;
        Rig { dir, node, control }
    }

    pub(crate) async fn stop(self) {
        self.control.stop().await;
        self.node.stop().await;
    }

    /// One request of the operator.
    pub(crate) async fn admin(&self, method: &str, path: &str, body: Value) -> Answer {
        let method = method.parse().expect("a method");
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let headers = [("x-admin-token", ADMIN_TOKEN)];
        self.control.client.ask(method, path, &headers, &body).await
    }

    /// Makes a team with the operator's routes: its id and a client with a key of its own.
    pub(crate) async fn team(&self, body: Value) -> (String, Client) {
        let made = self.admin("POST", "/admin/teams", body).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let id = made.json()["teamID"].as_str().expect("an id").to_owned();
        let path = format!("/admin/teams/{id}/api-keys");
        let key = self.admin("POST", &path, json!({"name": "test"})).await;
        assert_eq!(key.status, 201, "{}", key.text);
        let key = key.json()["key"].as_str().expect("a key").to_owned();
        (id, Client::new(self.control.address, &key))
    }

    /// Makes a user with an access token: their id and the token.
    pub(crate) async fn user(&self, email: &str) -> (String, String) {
        let made = self.admin("POST", "/admin/users", json!({"email": email})).await;
        assert_eq!(made.status, 201, "{}", made.text);
        let id = made.json()["id"].as_str().expect("an id").to_owned();
        let path = format!("/admin/users/{id}/access-tokens");
        let token = self.admin("POST", &path, json!({"name": "test"})).await;
        assert_eq!(token.status, 201, "{}", token.text);
        (id, token.json()["token"].as_str().expect("a token").to_owned())
    }

    /// Creates a sandbox and returns its id.
    pub(crate) async fn create(&self, body: &str) -> String {
        let answer = self.control.client.post("/v2/sandboxes", body).await;
        assert_eq!(answer.status, 201, "{}", answer.text);
        answer.json()["sandboxID"].as_str().expect("an id").to_owned()
    }
}

pub(crate) fn config() -> Config {
    Config { max_concurrent_sandboxes: 1000, ..Config::default() }
}

/// Waits until `check` holds.
pub(crate) async fn eventually<F, Fut>(what: &str, mut check: F)
where
    F: FnMut() -> Fut,
    Fut: Future<Output = bool>,
{
    let mut ticks = tokio::time::interval(Duration::from_millis(10));
    let held = async {
        while !check().await {
            ticks.tick().await;
        }
    };
    tokio::time::timeout(PATIENCE, held).await.unwrap_or_else(|_| panic!("never: {what}"));
}
