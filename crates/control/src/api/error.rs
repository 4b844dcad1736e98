//! Error answers: one table from kinds to statuses, one JSON shape, the contract's texts.
//!
//! A client sees the public message only. What else is known is logged here, once.

use std::time::Duration;

use axum::Json;
use axum::response::{IntoResponse, Response};
use belljar_domain::Kind;
use belljar_wire::rest;
use http::{HeaderName, HeaderValue, StatusCode, header};
use tracing::warn;

use crate::copies::CopyError;
use crate::creation::CreateError;
use crate::idempotency::KeyTaken;
use crate::lifecycle::EndError;
use crate::node::NodeCallError;
use crate::pause::PauseError;
use crate::resume::ResumeError;
use crate::store::StoreError;
use crate::templates::ResolveError;
use crate::webhook::terms::TermsError;

/// Tells the Python SDK whether to try again; it believes it over the status. The JS SDK looks at
/// `Retry-After` on 429 only. Source: contract section 1.1.
const SHOULD_RETRY: HeaderName = HeaderName::from_static("should-retry");

/// An answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ApiError {
    status: StatusCode,
    message: String,
    error_code: Option<&'static str>,
    retry: Option<Retry>,
}

/// A wait as clients take it: whole seconds, never too few.
fn whole_seconds(wait: Duration) -> u32 {
    u32::try_from(wait.as_millis().div_ceil(1000)).unwrap_or(u32::MAX).max(1)
}

/// What a client should do about a failed request, where it cannot be told from the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Retry {
    /// Send it again after this many seconds.
    After(u32),
    /// Do not: the answer would be the same.
    Never,
}

/// The one table from kinds to HTTP statuses.
fn status_of(kind: Kind) -> StatusCode {
    match kind {
        Kind::Invalid => StatusCode::BAD_REQUEST,
        Kind::Unauthenticated => StatusCode::UNAUTHORIZED,
        Kind::Forbidden => StatusCode::FORBIDDEN,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Conflict => StatusCode::CONFLICT,
        Kind::Quota => StatusCode::TOO_MANY_REQUESTS,
        Kind::Unavailable | Kind::Cancelled => StatusCode::SERVICE_UNAVAILABLE,
        Kind::Timeout => StatusCode::GATEWAY_TIMEOUT,
        Kind::Internal => StatusCode::INTERNAL_SERVER_ERROR,
    }
}

impl ApiError {
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let retry = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(Retry::After(1));
        ApiError { status, message: message.into(), error_code: None, retry }
    }

    pub(crate) fn of_kind(kind: Kind, message: impl Into<String>) -> Self {
        Self::new(status_of(kind), message)
    }

    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::of_kind(Kind::Invalid, message)
    }

    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::of_kind(Kind::NotFound, message)
    }

    pub(crate) fn forbidden(message: impl Into<String>) -> Self {
        Self::of_kind(Kind::Forbidden, message)
    }

    /// `id` as the client spelled it.
    pub(crate) fn no_sandbox(id: &str) -> Self {
        Self::not_found(format!("Sandbox \"{id}\" doesn't exist or you don't have access to it"))
    }

    /// `reason` completes the text SDKs turn into their authentication error.
    pub(crate) fn unauthorized(reason: &str) -> Self {
        Self::of_kind(
            Kind::Unauthenticated,
            format!(
                "error in openapi3filter.SecurityRequirementsError: \
                 security requirements failed: {reason}"
            ),
        )
    }

    /// Something here broke; the log says what.
    pub(super) fn internal() -> Self {
        Self::of_kind(Kind::Internal, "internal server error").coded("internal_server_error")
    }

    fn coded(mut self, error_code: &'static str) -> Self {
        self.error_code = Some(error_code);
        self
    }

    /// Another try may go well, `seconds` from now.
    pub(crate) fn retry_after(mut self, seconds: u32) -> Self {
        self.retry = Some(Retry::After(seconds));
        self
    }

    /// Another try would go the same way.
    fn final_word(mut self) -> Self {
        self.retry = Some(Retry::Never);
        self
    }

    /// No node has room now.
    fn no_room() -> Self {
        Self::of_kind(
            Kind::Unavailable,
            "there is no room for another sandbox at the moment; try again",
        )
        .coded("sandbox_capacity_unavailable")
        .retry_after(1)
    }

    /// The answer to a failed change of the sandbox the client calls `id`.
    pub(crate) fn of_end(error: &EndError, id: &str) -> Self {
        Self::of_sandbox(error.kind(), error, id)
    }

    /// The answer to a pause of the sandbox the client calls `id` that did not come about.
    pub(crate) fn of_pause(error: &PauseError, id: &str) -> Self {
        match error {
            PauseError::NotFound => Self::no_sandbox(id),
            PauseError::Already => {
                Self::of_kind(Kind::Conflict, format!("Sandbox \"{id}\" is already paused"))
            }
            PauseError::Busy => Self::still_changing(),
            PauseError::GuestUnresponsive(e) => Self::unresponsive(e),
            PauseError::NoRoom(e) => Self::no_disk(e),
            PauseError::Node(e) => Self::of_sandbox(e.kind(), e, id),
            PauseError::Mixup | PauseError::TaskBroke => {
                log(error);
                Self::internal()
            }
        }
    }

    /// The answer to a resume of the sandbox the client calls `id` that did not come about.
    pub(crate) fn of_resume(error: ResumeError, id: &str) -> Self {
        match error {
            ResumeError::NotFound => Self::no_sandbox(id),
            ResumeError::Runs => Self::of_kind(
                Kind::Conflict,
                format!("Sandbox \"{id}\" is already running"),
            ),
            ResumeError::Busy => Self::still_changing(),
            ResumeError::NeedsColdBoot => Self::of_kind(
                Kind::Conflict,
                format!(
                    "the guest of sandbox \"{id}\" did not answer when it was paused, so its memory \
                     is not resumed; resume it with 'memory' false to boot it from its disk"
                ),
            )
            .coded("sandbox_snapshot_guest_agent_unresponsive")
            .final_word(),
            ResumeError::NodeAway => {
                log(&error);
                Self::of_kind(
                    Kind::Unavailable,
                    "the node that keeps the paused sandbox is away; try again",
                )
            }
            ResumeError::EndedEarly => {
                log(&error);
                Self::of_kind(
                    Kind::Unavailable,
                    "the sandbox ended while it was resuming, and is paused as before; try again",
                )
            }
            ResumeError::Place(e) => e.into(),
            ResumeError::Extend(e) => Self::of_end(&e, id),
            ResumeError::Node(e) => Self::of_start(&e),
            ResumeError::Mixup | ResumeError::TaskBroke => {
                log(&error);
                Self::internal()
            }
        }
    }

    /// The answer to a resume its node did not do; the sandbox is paused as before.
    fn of_start(error: &NodeCallError) -> Self {
        log(error);
        match error.kind() {
            Kind::Quota | Kind::Unavailable | Kind::Cancelled => Self::no_room(),
            Kind::Timeout => Self::of_kind(
                Kind::Timeout,
                "the sandbox did not resume in time, and is paused as before; try again",
            )
            .coded("sandbox_placement_timeout")
            .retry_after(5),
            Kind::Conflict => Self::still_changing(),
            Kind::Invalid
            | Kind::NotFound
            | Kind::Forbidden
            | Kind::Unauthenticated
            | Kind::Internal => {
                Self::of_kind(Kind::Internal, "the sandbox could not be resumed, and is paused")
                    .coded("sandbox_create_failed")
                    .final_word()
            }
        }
    }

    /// The answer to a copy of the sandbox the client calls `id` that did not come about; `cannot` says
    /// of a paused one what it cannot.
    pub(crate) fn of_copy(error: CopyError, id: &str, cannot: &str) -> Self {
        match error {
            CopyError::NotFound => Self::no_sandbox(id),
            CopyError::Paused => Self::of_kind(
                Kind::Conflict,
                format!("Sandbox '{id}' is paused and {cannot}; resume it first"),
            ),
            CopyError::Busy => Self::still_changing(),
            CopyError::TooOld { version } => Self::bad_request(format!(
                "the sandbox's guest daemon {version} is too old for this: it must be 0.5.0 or \
                 later; build the template again"
            )),
            CopyError::GuestUnresponsive(e) => Self::unresponsive(&e),
            CopyError::NoRoom(e) => Self::no_disk(&e),
            CopyError::Node(e) => Self::of_sandbox(e.kind(), &e, id),
            CopyError::TeamGone => {
                Self::forbidden("team forbidden: the team is gone, or was blocked meanwhile")
            }
            CopyError::Store(e) => e.into(),
            CopyError::Mixup | CopyError::TaskBroke => {
                log(&error);
                Self::internal()
            }
        }
    }

    fn still_changing() -> Self {
        Self::of_kind(Kind::Conflict, "the sandbox is still changing; try again").retry_after(1)
    }

    fn unresponsive(error: &NodeCallError) -> Self {
        log(error);
        Self::of_kind(
            Kind::Unavailable,
            "the sandbox's guest does not answer, so nothing was done; it runs on",
        )
    }

    fn no_disk(error: &NodeCallError) -> Self {
        log(error);
        Self::of_kind(
            Kind::Unavailable,
            "there is no room on the node to save the sandbox; it runs on",
        )
    }

    /// As one of several answers in one body.
    pub(crate) fn into_body(self) -> rest::Error {
        rest::Error {
            code: self.status.as_u16(),
            message: self.message,
            error_code: self.error_code.map(str::to_owned),
        }
    }

    /// The answer to a failed request about the sandbox the client calls `id`.
    pub(crate) fn of_sandbox(kind: Kind, error: &dyn std::error::Error, id: &str) -> Self {
        match kind {
            Kind::NotFound => Self::no_sandbox(id),
            Kind::Internal => {
                log(error);
                Self::internal()
            }
            kind => {
                log(error);
                Self::of_kind(kind, "the sandbox's node did not do it; try again")
            }
        }
    }

    /// The answer to a question a node did not answer; `message` tells the client so.
    pub(crate) fn of_node(error: &NodeCallError, message: &str) -> Self {
        log(error);
        match error.kind() {
            kind @ (Kind::Timeout | Kind::Unavailable | Kind::Cancelled) => {
                Self::of_kind(kind, message)
            }
            _ => Self::internal(),
        }
    }

    /// The answer to a create the node did not do.
    fn of_create(error: &NodeCallError) -> Self {
        if error.kind() == Kind::Invalid {
            return Self::bad_request(error.message());
        }
        log(error);
        // The node's own room is not the team's quota: another try may find some.
        match error.kind() {
            Kind::Quota | Kind::Unavailable | Kind::Cancelled => Self::no_room(),
            Kind::Timeout => Self::of_kind(
                Kind::Timeout,
                "the sandbox did not start in time, and was given up; try again",
            )
            .coded("sandbox_placement_timeout")
            .retry_after(5),
            Kind::Conflict | Kind::Forbidden | Kind::Unauthenticated => {
                Self::of_kind(Kind::Internal, "the node refused to create the sandbox")
                    .coded("sandbox_create_refused")
                    .final_word()
            }
            Kind::Invalid | Kind::NotFound | Kind::Internal => {
                Self::of_kind(Kind::Internal, "the sandbox could not be created")
                    .coded("sandbox_create_failed")
                    .final_word()
            }
        }
    }
}

/// Logs an error with its causes.
fn log(error: &dyn std::error::Error) {
    let mut causes = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    let reason = causes.join(": ");
    warn!(error = %error, reason, "request failed");
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        log(&error);
        match error.kind() {
            Kind::Internal => Self::internal(),
            kind => Self::of_kind(kind, "the server's store is not available; try again"),
        }
    }
}

impl From<TermsError> for ApiError {
    fn from(error: TermsError) -> Self {
        Self::of_kind(error.kind(), error.to_string())
    }
}

impl From<ResolveError> for ApiError {
    fn from(error: ResolveError) -> Self {
        Self::of_kind(error.kind(), error.to_string())
    }
}

impl From<KeyTaken> for ApiError {
    fn from(taken: KeyTaken) -> Self {
        match taken {
            KeyTaken::Mismatch => Self::new(
                StatusCode::UNPROCESSABLE_ENTITY,
                "the header 'Idempotency-Key' holds a key that another request was sent with; \
                 use a new key for a new request",
            )
            .coded("idempotency_request_mismatch")
            .final_word(),
            KeyTaken::InProgress => Self::of_kind(
                Kind::Conflict,
                "the request with this idempotency key is still running; try again",
            )
            .coded("idempotency_in_progress")
            .retry_after(1),
            KeyTaken::OutcomeUnknown => Self::of_kind(
                Kind::Conflict,
                "what became of the request with this idempotency key is not known yet; try again",
            )
            .coded("idempotency_outcome_unknown")
            .retry_after(1),
        }
    }
}

impl From<CreateError> for ApiError {
    fn from(error: CreateError) -> Self {
        let kind = error.kind();
        match error {
            CreateError::Template(e) => e.into(),
            CreateError::AtLimit(e) => Self::of_kind(
                kind,
                format!(
                    "you have reached the maximum number of concurrent E2B sandboxes ({}); \
                     kill some, or ask who runs this server for a higher limit",
                    e.limit
                ),
            )
            // A place comes free when somebody ends a sandbox, which waiting does not bring about.
            .final_word(),
            CreateError::NoNode => {
                log(&error);
                Self::no_room()
            }
            CreateError::NoCompatibleNode => {
                log(&error);
                Self::of_kind(
                    kind,
                    "no node can run the template: it has to be built again for the nodes there are",
                )
                .coded("sandbox_no_compatible_node")
                .final_word()
            }
            CreateError::Key(taken) => taken.into(),
            CreateError::Store(e) => e.into(),
            CreateError::TeamClosed => {
                Self::forbidden("team forbidden: the team is gone, or was blocked meanwhile")
            }
            CreateError::TooBig(e) => Self::of_kind(kind, e.to_string()),
            CreateError::TooFast(e) => Self::of_kind(
                kind,
                format!(
                    "this team may begin {} sandboxes a second; wait, or ask who runs this \
                     server for a higher limit",
                    e.per_second
                ),
            )
            .retry_after(whole_seconds(e.wait)),
            CreateError::Node(e) => Self::of_create(&e),
            CreateError::EndedEarly(_) => {
                log(&error);
                Self::of_kind(kind, "the sandbox ended while it was starting")
                    .coded("sandbox_create_failed")
            }
            CreateError::Mixup | CreateError::TaskBroke => {
                log(&error);
                Self::internal()
            }
        }
    }
}

/// Why a request was refused or failed, in one word of a bounded list: what the figures count.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Refusal(pub(crate) &'static str);

impl ApiError {
    fn reason(&self) -> Refusal {
        Refusal(self.error_code.unwrap_or(match self.status.as_u16() {
            401 => "unauthenticated",
            403 => "forbidden",
            404 => "not_found",
            409 => "conflict",
            429 => "limited",
            500 => "internal",
            501 => "not_supported",
            503 => "unavailable",
            504 => "timeout",
            _ => "invalid",
        }))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let reason = self.reason();
        let (status, retry) = (self.status, self.retry);
        let mut response = (status, Json(self.into_body())).into_response();
        response.extensions_mut().insert(reason);
        let headers = response.headers_mut();
        match retry {
            Some(Retry::After(seconds)) => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("true"));
                headers.insert(header::RETRY_AFTER, HeaderValue::from(seconds));
            }
            Some(Retry::Never) => {
                headers.insert(SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            None => {}
        }
        response
    }
}
