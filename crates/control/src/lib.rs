//! The control plane: the public REST API, teams and keys, and which sandbox runs where.
//!
//! One process-wide table of live sandboxes answers every request; it follows the nodes, which own
//! the truth. The store (SQLite or PostgreSQL) is written behind it and read at start, so that
//! creating a sandbox waits for its node alone:
//!
//! ```text
//!  REST ──► lifecycle ──► node RPC
//!              │  ▲
//!              ▼  │ watch + reconcile
//!            live table ──► routes (proxy)
//!              │
//!              ▼ bounded queue
//!            store
//! ```
#![forbid(unsafe_code)]

mod access;
mod api;
mod app;
mod cidr;
mod config;
mod copies;
mod creation;
mod creation_rate;
mod event;
mod idempotency;
mod keys;
mod lifecycle;
mod limits;
mod live;
mod metrics;
mod node;
mod nodes;
mod oidc;
mod outgoing;
mod pause;
mod peer;
mod placement;
mod prune;
mod rates;
mod reconcile;
mod resume;
mod route;
mod serve;
mod snapshots;
mod store;
mod team;
mod templates;
mod terms;
mod token;
mod unsettled;
mod usage;
mod wake;
mod webhook;
mod writer;

pub use cidr::{Cidr, CidrError};
pub use config::{Config, Deps, WebhookConfig};
pub use keys::{
    AccessToken, AdminToken, AdminTokenError, ApiKey, Credential, CredentialError, CredentialKind,
};
pub use limits::Limits;
pub use node::NodeCallError;
pub use oidc::{OidcIssuer, OidcIssuerError};
pub use rates::{Rate, RateError, Rates};
pub use route::{Route, RouteSink};
pub use serve::{ServeError, serve};
pub use store::{Claim, Database, DatabaseError, Store, StoreError};
pub use team::{CredentialId, Team, TeamId, UserId};
pub use wake::{Asleep, WakeCaller, WakeDoor, wake_door};
