//! The sandbox's file system: content over HTTP, everything else over RPC. What a call may do is
//! said in `files/reach.rs`.

mod changes;
pub mod compose;
pub mod download;
pub mod entry;
mod erase;
mod form;
mod gzip;
mod metadata;
pub mod path;
mod ranges;
mod reach;
mod relocate;
mod sending;
pub mod service;
mod tree;
pub mod upload;
mod watch;

use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::Deserialize;

use crate::accounts::User;
use crate::auth::{self, AuthError};
use crate::http_api::json_error;
use crate::state::State;

/// The query of both file routes.
///
/// Source: `contract/e2b-wire.md` section 2.1.
#[derive(Debug, Default, Deserialize)]
pub struct FilesQuery {
    path: Option<String>,
    username: Option<String>,
    signature: Option<String>,
    signature_expiration: Option<String>,
}

/// A refused file request: its status and the message of its body.
#[derive(Debug)]
pub struct Refusal {
    status: StatusCode,
    message: String,
}

impl Refusal {
    fn new(status: StatusCode, message: impl Into<String>) -> Refusal {
        Refusal { status, message: message.into() }
    }

    fn bad_request(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::BAD_REQUEST, message)
    }

    fn internal(message: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        json_error(self.status, &self.message)
    }
}

impl From<AuthError> for Refusal {
    fn from(error: AuthError) -> Refusal {
        Refusal::new(StatusCode::UNAUTHORIZED, error.to_string())
    }
}

impl From<crate::task::JobLost> for Refusal {
    fn from(lost: crate::task::JobLost) -> Refusal {
        Refusal::internal(format!("failed to {lost}"))
    }
}

/// Checks token or signature, then finds the user the request is for.
pub(crate) fn authorise(
    state: &State,
    headers: &http::HeaderMap,
    operation: auth::Operation,
    query: &FilesQuery,
) -> Result<User, Refusal> {
    let expiration = match &query.signature_expiration {
        Some(text) => Some(
            text.parse::<i64>()
                .map_err(|_| Refusal::bad_request("signature_expiration is not a number"))?,
        ),
        None => None,
    };
    let signed = auth::Signed {
        path: query.path.as_deref().unwrap_or_default(),
        username: query.username.as_deref().unwrap_or_default(),
        signature: query.signature.as_deref(),
        expiration,
    };
    auth::check_signed(state, headers, operation, signed)?;
    Ok(auth::find_user(state, query.username.as_deref())?)
}
