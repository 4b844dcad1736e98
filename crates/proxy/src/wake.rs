//! Paused sandboxes that traffic resumes: the door to whoever can do it.
//!
//! A request for a sandbox without a route asks there, and is held until the sandbox runs or is
//! refused. Source of the rules: `contract/e2b-wire.md` section 3.6.

use std::future::Future;
use std::pin::Pin;

use belljar_domain::{SandboxId, Secret};
use http::request::Parts;

use crate::routing::ENVD_PORT;

const ACCESS_TOKEN: &str = "x-access-token";

/// Resumes sandboxes.
pub trait Wake: Send + Sync + 'static {
    /// Resumes the paused sandbox `id`, if traffic like `visitor`'s may, and waits until its route is
    /// published. Asked once for every request without a route, so an unknown id must be cheap, and
    /// any number of calls for one sandbox must resume it once.
    ///
    /// # Errors
    /// [`Asleep`] when there is no route afterwards.
    fn wake<'a>(&'a self, id: &'a SandboxId, visitor: Visitor) -> Waking<'a>;
}

/// A call of [`Wake::wake`] under way.
pub type Waking<'a> = Pin<Box<dyn Future<Output = Result<(), Asleep>> + Send + 'a>>;

/// Who asks for a paused sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Visitor {
    /// Whether the request is for the guest daemon.
    pub for_daemon: bool,
    /// What it shows for that: its header `X-Access-Token`.
    pub access_token: Option<Secret<String>>,
}

/// Why a paused sandbox was not resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Asleep {
    /// There is none, or none that traffic resumes.
    NotFound,
    /// The visitor may not use it.
    NotPermitted,
    /// It is being paused or resumed, and that takes too long.
    Changing,
    /// Its team has as many sandboxes as it may.
    AtLimit {
        /// Sandboxes the team may have running.
        limit: u32,
    },
    /// It could not be done now.
    Unavailable,
}

impl Visitor {
    /// Of a request for `port`.
    pub(crate) fn of(parts: &Parts, port: u64) -> Visitor {
        let token = parts.headers.get(ACCESS_TOKEN).and_then(|value| value.to_str().ok());
        Visitor {
            for_daemon: port == u64::from(ENVD_PORT),
            access_token: token.map(|token| Secret::new(token.to_owned())),
        }
    }
}
