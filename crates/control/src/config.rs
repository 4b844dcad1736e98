//! What the control plane is told at start.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::cidr::Cidr;
use crate::keys::AdminToken;
use crate::oidc::OidcIssuer;
use crate::rates::Rates;
use crate::route::RouteSink;
use crate::store::Store;
use crate::wake::WakeDoor;

/// Settings. The defaults are those of `belljar up`.
#[derive(Debug, Clone)]
pub struct Config {
    /// Domain clients reach sandboxes under, told to them in answers. `None` leaves the choice to
    /// the client (plain HTTP on localhost).
    pub public_domain: Option<String>,
    /// Longest time to live one request of a team in the tier `local` may ask for. Written to that
    /// tier at start, as the next one.
    pub max_sandbox_length: Duration,
    /// Sandboxes a team in the tier `local` may have running or starting.
    pub max_concurrent_sandboxes: u32,
    /// Whose bearer tokens are accepted. Those with the same URL are one issuer of several audiences.
    pub oidc: Vec<OidcIssuer>,
    /// Proxies in front of this server, whose `X-Forwarded-For` is believed. The address they name
    /// counts where addresses count: team allow-lists and request rates.
    pub trusted_proxies: Vec<Cidr>,
    /// How often what teams use is sampled.
    pub usage_interval: Duration,
    /// Whether anybody may read `/metrics`; else the operator only.
    pub metrics_public: bool,
    /// Requests taken of a team and from an address.
    pub rates: Rates,
    /// How long [`crate::serve`] waits for the nodes to answer. It goes on without those that do
    /// not, and gives up when none does.
    pub node_wait: Duration,
    /// How often the live table is compared with each node when nothing else asks for it.
    pub reconcile_interval: Duration,
    /// How long runs that have ended stay in the store.
    pub runs_kept: Duration,
    /// How long open requests get to finish when the scope is cancelled.
    pub shutdown_grace: Duration,
    /// How events are sent to teams' own servers.
    pub webhooks: WebhookConfig,
    /// How often events that are too old are removed.
    pub event_prune_interval: Duration,
}

/// How events are delivered. Source of the defaults: contract section 1.7.
#[derive(Debug, Clone)]
pub struct WebhookConfig {
    /// Lets webhooks reach private, loopback and link-local addresses. Whoever can make one then
    /// reaches what this machine reaches.
    pub allow_private: bool,
    /// How long one try may take, from the name to the end of the answer.
    pub deadline: Duration,
    /// Tries after the first.
    pub retries: u32,
    /// Wait before each of them; at most an hour.
    pub retry_wait: Duration,
    /// How often due deliveries are looked for that nobody told of: those of other servers, and
    /// those that are tried again.
    pub poll_interval: Duration,
}

impl Default for WebhookConfig {
    fn default() -> Self {
        WebhookConfig {
            allow_private: false,
            deadline: Duration::from_secs(10),
            retries: 3,
            retry_wait: Duration::from_secs(10),
            poll_interval: Duration::from_secs(1),
        }
    }
}

impl Default for Config {
    fn default() -> Self {
        Config {
            public_domain: None,
            max_sandbox_length: Duration::from_secs(24 * 3600),
            max_concurrent_sandboxes: 100,
            oidc: Vec::new(),
            trusted_proxies: Vec::new(),
            usage_interval: Duration::from_secs(5),
            metrics_public: false,
            rates: Rates::default(),
            node_wait: Duration::from_secs(30),
            reconcile_interval: Duration::from_secs(60),
            runs_kept: Duration::from_secs(30 * 24 * 3600),
            shutdown_grace: Duration::from_secs(10),
            webhooks: WebhookConfig::default(),
            event_prune_interval: Duration::from_secs(600),
        }
    }
}

/// What the control plane works with.
pub struct Deps {
    /// Unix sockets of the nodes' RPC servers, at least one.
    pub node_sockets: Vec<PathBuf>,
    /// Where routes of live sandboxes go.
    pub routes: Arc<dyn RouteSink>,
    /// What the operator shows in `X-Admin-Token`; `None` lets nobody in by that way.
    pub admin_token: Option<AdminToken>,
    /// Where traffic asks for paused sandboxes; `None` resumes none by traffic.
    pub wake: Option<WakeDoor>,
    /// The store. The caller closes it after [`crate::serve`] has returned.
    pub store: Store,
}
