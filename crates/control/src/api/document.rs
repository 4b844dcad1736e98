//! The OpenAPI document: what is served, described by the code that serves it.
//!
//! A handler carries `#[utoipa::path(…)]` and is mounted with `routes!`, so that a route without
//! description cannot exist. What is the same for many routes is added here and not repeated there:
//! who may call ([`guarded`]), the answers every such call can get, and the one error body.

use std::sync::Arc;

use axum::response::{IntoResponse, Response};
use axum::{Extension, Router};
use belljar_wire::rest;
use bytes::Bytes;
use http::header;
use utoipa::openapi::path::{Operation, Parameter, PathItem};
use utoipa::openapi::schema::{Array, Object, Schema, SchemaType, Type};
use utoipa::openapi::security::{ApiKey, ApiKeyValue, HttpAuthScheme, HttpBuilder, SecurityScheme};
use utoipa::openapi::{self, OpenApi, RefOr, Response as Described, SecurityRequirement};
use utoipa::{OpenApi as _, PartialSchema as _, ToSchema as _};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::app::App;

/// Routes and what describes them.
pub(crate) type Routes = OpenApiRouter<Arc<App>>;

/// Names of the ways to say who is asking. Source: contract section 1.1.
const API_KEY: &str = "ApiKeyAuth";
const ACCESS_TOKEN: &str = "AccessTokenAuth";
const PROVIDER: &str = "AuthProviderBearerAuth";
const PROVIDER_TEAM: &str = "AuthProviderTeamAuth";
const ADMIN: &str = "AdminApiKeyAuth";
const ADMIN_TEAM: &str = "AdminTeamAuth";

/// Who may call a group of routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Access {
    /// A team, by any of the ways to name one.
    Team,
    /// Somebody who manages a team: its users and the operator, not its keys.
    Member,
    /// A user, whichever of their teams is meant.
    User,
    /// A user who has signed in.
    SignedIn,
    /// Whoever runs the server.
    Operator,
}

impl Access {
    /// The alternatives; each is what one request has to carry together.
    fn alternatives(self) -> &'static [&'static [&'static str]] {
        match self {
            Access::Team => &[&[API_KEY], &[ADMIN, ADMIN_TEAM], &[PROVIDER, PROVIDER_TEAM]],
            Access::Member => &[&[ADMIN, ADMIN_TEAM], &[PROVIDER, PROVIDER_TEAM]],
            Access::User => &[&[ACCESS_TOKEN], &[PROVIDER]],
            Access::SignedIn => &[&[PROVIDER]],
            Access::Operator => &[&[ADMIN]],
        }
    }

    fn requirements(self) -> Vec<SecurityRequirement> {
        let all_of = |schemes: &&[&str]| {
            schemes.iter().fold(SecurityRequirement::default(), |requirement, scheme| {
                requirement.add::<_, _, &str>(*scheme, [])
            })
        };
        self.alternatives().iter().map(all_of).collect()
    }
}

/// Answers every guarded route can give.
const GUARDED: &[(&str, &str)] = &[
    ("400", "The path, a parameter, a header or the body is not valid; the message names it"),
    ("401", "Who is asking is not known"),
    ("403", "The team is blocked, not the caller's, or not to be reached from this address"),
    ("429", "Too many requests, or a limit of the team is reached"),
    ("500", "The server failed"),
    ("503", "The server cannot do it at the moment; try again"),
];

/// Answers every route with a request body can give.
const WITH_BODY: &[(&str, &str)] = &[
    ("408", "The request body did not arrive in time"),
    ("413", "The request body is too large"),
    ("415", "The request body is not JSON, or is compressed"),
];

/// Describes every route of `routes` as open to `access` only. That it is so is for the layer
/// beside it to see to.
pub(crate) fn guarded(mut routes: Routes, access: Access) -> Routes {
    for (_, _, operation) in operations(routes.get_openapi_mut()) {
        operation.security = Some(access.requirements());
        add_answers(operation, GUARDED);
    }
    routes
}

#[derive(utoipa::OpenApi)]
#[openapi(
    info(
        title = "Belljar",
        description = "Sandboxes of a self-hosted Belljar server, over the API of the E2B SDKs. \
            Unknown parameters and fields are ignored. Before a request reaches an operation it \
            can be answered 404 (no such route), 405 (no such method), 414 or 431 (path or \
            headers too long), with the same error body.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    components(schemas(rest::Error)),
    tags(
        (name = "sandboxes", description = "Machines that run"),
        (name = "identity", description = "Teams, keys and tokens, as their owners see them"),
        (name = "admin", description = "What whoever runs the server does"),
        (name = "templates", description = "What sandboxes start from"),
        (name = "events", description = "What happened to sandboxes, and who is told"),
        (name = "teams", description = "What teams use"),
        (name = "server", description = "The server itself"),
    ),
)]
struct Frame;

/// What is the same whatever is served.
pub(crate) fn frame() -> Routes {
    OpenApiRouter::with_openapi(Frame::openapi())
}

/// Takes `routes` apart into a router that also serves the finished document.
pub(crate) fn serve(routes: Routes) -> Router<Arc<App>> {
    let (router, mut document) = routes.routes(routes!(openapi_json)).split_for_parts();
    finish(&mut document);
    let json = serde_json::to_vec(&document).expect("its keys are text and it has no cycles");
    router.layer(Extension(Json(json.into())))
}

/// The document as it is sent.
#[derive(Clone)]
struct Json(Bytes);

/// This document.
#[utoipa::path(
    get, path = "/openapi.json", tag = "server",
    responses((status = 200, description = "This document", body = Object)),
)]
async fn openapi_json(Extension(Json(json)): Extension<Json>) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], json).into_response()
}

/// Adds what follows from the rest: names of operations, the ways to say who is asking, answers to
/// bodies, and what error answers carry.
fn finish(document: &mut OpenApi) {
    for (method, path, operation) in operations(document) {
        operation.operation_id = Some(operation_id(method, &path));
        if operation.request_body.is_some() {
            add_answers(operation, WITH_BODY);
        }
        for parameter in operation.parameters.iter_mut().flatten() {
            if let RefOr::T(Parameter { schema: Some(RefOr::T(schema)), .. }) = parameter {
                never_null(schema);
            }
        }
        for (status, answer) in &mut operation.responses.responses {
            if let RefOr::T(answer) = answer {
                complete_error(status, answer);
            }
        }
    }
    let components = document.components.get_or_insert_default();
    let schemes = security_schemes().map(|(name, scheme)| (name.to_owned(), scheme.into()));
    components.security_schemes.extend(schemes);
}

/// Every operation with its method, in capitals, and its path.
fn operations(
    document: &mut OpenApi,
) -> impl Iterator<Item = (&'static str, String, &mut Operation)> {
    document.paths.paths.iter_mut().flat_map(|(path, item)| {
        let PathItem { get, put, post, delete, patch, .. } = item;
        let all =
            [("GET", get), ("PUT", put), ("POST", post), ("DELETE", delete), ("PATCH", patch)];
        all.into_iter().filter_map(|(method, o)| o.as_mut().map(|o| (method, path.clone(), o)))
    })
}

/// `GET /v2/sandboxes/{id}` becomes `getV2SandboxesId`: generated clients name functions by it, so
/// it must be unique and must not follow the names of handlers.
fn operation_id(method: &str, path: &str) -> String {
    let mut id = method.to_ascii_lowercase();
    for word in path.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()) {
        id.extend(word[..1].chars().map(|c| c.to_ascii_uppercase()));
        id.push_str(&word[1..]);
    }
    id
}

/// Adds the answers that the handler itself does not describe.
fn add_answers(operation: &mut Operation, answers: &[(&str, &str)]) {
    for (status, description) in answers {
        let known = operation.responses.responses.entry((*status).to_owned());
        known.or_insert_with(|| RefOr::T(Described::new(*description)));
    }
}

/// A parameter that may be left out is an `Option` in its description, but no text means null.
fn never_null(schema: &mut Schema) {
    let (Schema::Object(Object { schema_type, .. }) | Schema::Array(Array { schema_type, .. })) =
        schema
    else {
        if let Schema::OneOf(one_of) = schema {
            one_of.items.retain(|item| !is_null(item));
            if let [RefOr::T(only)] = one_of.items.as_slice() {
                *schema = only.clone();
            }
        }
        return;
    };
    if let SchemaType::Array(types) = schema_type {
        types.retain(|kind| *kind != Type::Null);
        if let [only] = types.as_slice() {
            *schema_type = SchemaType::Type(only.clone());
        }
    }
}

fn is_null(schema: &RefOr<Schema>) -> bool {
    let RefOr::T(Schema::Object(Object { schema_type, .. })) = schema else { return false };
    *schema_type == SchemaType::Type(Type::Null)
}

fn complete_error(status: &str, answer: &mut Described) {
    if !status.starts_with(['4', '5']) || !answer.content.is_empty() {
        return;
    }
    let body = openapi::Ref::from_schema_name(rest::Error::name());
    let body = openapi::ContentBuilder::new().schema(Some(body)).build();
    answer.content.insert("application/json".to_owned(), RefOr::T(body));
    if matches!(status, "429" | "503") {
        header(answer, "Retry-After", i32::schema(), "Seconds to wait before another try");
        header(answer, "Should-Retry", String::schema(), "`true` where another try can help");
    }
}

fn header(answer: &mut Described, name: &str, schema: RefOr<Schema>, description: &str) {
    let header = openapi::HeaderBuilder::new().schema(Some(schema)).description(Some(description));
    answer.headers.insert(name.to_owned(), RefOr::T(header.build()));
}

fn security_schemes() -> [(&'static str, SecurityScheme); 6] {
    let in_header = |name: &str, description: &str| {
        SecurityScheme::ApiKey(ApiKey::Header(ApiKeyValue::with_description(name, description)))
    };
    let bearer = |format: &str, description: &str| {
        let scheme = HttpBuilder::new().scheme(HttpAuthScheme::Bearer).bearer_format(format);
        SecurityScheme::Http(scheme.description(Some(description)).build())
    };
    [
        (API_KEY, in_header("X-API-Key", "A team's API key, `e2b_…`")),
        (ACCESS_TOKEN, bearer("sk_e2b_…", "A user's access token. Deprecated")),
        (PROVIDER, bearer("JWT", "A token of the identity provider this server trusts")),
        (PROVIDER_TEAM, in_header("X-Team-ID", "The team the user acts for, a UUID")),
        (ADMIN, in_header("X-Admin-Token", "The operator's token")),
        (ADMIN_TEAM, in_header("X-Team-ID", "The team the operator acts for, a UUID")),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_named_by_what_they_do() {
        for (method, path, id) in [
            ("GET", "/health", "getHealth"),
            ("POST", "/v2/sandboxes/{id}/connect", "postV2SandboxesIdConnect"),
            ("GET", "/openapi.json", "getOpenapiJson"),
            ("DELETE", "/api-keys/{id}", "deleteApiKeysId"),
        ] {
            assert_eq!(operation_id(method, path), id);
        }
    }

    /// Clients rely on the one error body and its headers, whoever described the answer.
    #[test]
    fn errors_get_the_one_body_and_successes_keep_theirs() {
        let mut busy = Described::new("busy");
        complete_error("503", &mut busy);
        let busy = serde_json::to_value(&busy).expect("JSON");
        let body = &busy["content"]["application/json"]["schema"]["$ref"];
        assert_eq!(body, "#/components/schemas/Error");
        assert_eq!(busy["headers"]["Retry-After"]["schema"]["type"], "integer");
        let mut done = Described::new("done");
        complete_error("204", &mut done);
        assert!(done.content.is_empty());
    }
}
