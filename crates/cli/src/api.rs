//! A small client of our own REST API, for the user commands.

use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use belljar_domain::Secret;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper::body::Bytes;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::preset::Local;
use crate::server_file::Server;

/// Largest answer read, in bytes: 100 listed sandboxes with metadata stay far below it.
const ANSWER_MAX_BYTES: usize = 64 << 20;
/// A create waits for a guest; nothing takes longer.
const DEADLINE: Duration = Duration::from_secs(90);

/// The server a user command talks to.
#[derive(Debug, Clone)]
pub(crate) struct Target {
    pub(crate) api_url: String,
    pub(crate) sandbox_url: String,
    pub(crate) api_key: String,
}

impl Target {
    /// The SDKs' variables where all are set, else the server of this data folder.
    pub(crate) fn find(local: &Local, env: &SdkEnv) -> Result<Target> {
        if let (Some(api_url), Some(sandbox_url), Some(api_key)) =
            (&env.api_url, &env.sandbox_url, &env.api_key)
        {
            let own = |text: &String| text.trim_end_matches('/').to_owned();
            return Ok(Target {
                api_url: own(api_url),
                sandbox_url: own(sandbox_url),
                api_key: api_key.clone(),
            });
        }
        Target::of_server(local)
    }

    /// The running server of this data folder and its key.
    pub(crate) fn of_server(local: &Local) -> Result<Target> {
        let server = Server::read(local)?;
        let key_file = local.key_file();
        let api_key = std::fs::read_to_string(&key_file)
            .with_context(|| format!("failed to read the API key in {}", key_file.display()))?;
        Ok(Target {
            api_url: server.api_url,
            sandbox_url: server.sandbox_url,
            api_key: api_key.trim().to_owned(),
        })
    }
}

/// The variables the official SDKs read, as far as these commands use them too.
#[derive(Debug, Clone, Default)]
pub(crate) struct SdkEnv {
    pub(crate) api_url: Option<String>,
    pub(crate) sandbox_url: Option<String>,
    pub(crate) api_key: Option<String>,
}

#[derive(Deserialize)]
struct ApiError {
    message: String,
}

/// The REST client.
pub(crate) struct Api {
    base: String,
    /// The header that says who asks.
    credential: (&'static str, Secret<String>),
    http: Client<HttpConnector, Full<Bytes>>,
}

impl Api {
    pub(crate) fn new(target: Target) -> Api {
        Api::with(target.api_url, ("x-api-key", Secret::new(target.api_key)))
    }

    /// A client that acts as whoever runs the server.
    pub(crate) fn of_operator(api_url: String, token: &Secret<String>) -> Api {
        Api::with(api_url, ("x-admin-token", token.clone()))
    }

    fn with(base: String, credential: (&'static str, Secret<String>)) -> Api {
        Api { base, credential, http: Client::builder(TokioExecutor::new()).build_http() }
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T> {
        match self.call(Method::GET, path, None).await? {
            (StatusCode::OK, body) => read(path, &body),
            (status, body) => Err(refused(status, &body)),
        }
    }

    /// Reads what may be gone; `None` when it is.
    pub(crate) async fn find<T: DeserializeOwned>(&self, path: &str) -> Result<Option<T>> {
        match self.call(Method::GET, path, None).await? {
            (StatusCode::OK, body) => read(path, &body).map(Some),
            (StatusCode::NOT_FOUND, _) => Ok(None),
            (status, body) => Err(refused(status, &body)),
        }
    }

    /// Deletes; `false` when it was not there.
    pub(crate) async fn delete(&self, path: &str) -> Result<bool> {
        match self.call(Method::DELETE, path, None).await? {
            (status, _) if status.is_success() => Ok(true),
            (StatusCode::NOT_FOUND, _) => Ok(false),
            (status, body) => Err(refused(status, &body)),
        }
    }

    /// Sends JSON and reads JSON.
    pub(crate) async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<T> {
        self.send(Method::POST, path, body).await
    }

    /// Changes a part of what is there.
    pub(crate) async fn patch<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<T> {
        self.send(Method::PATCH, path, body).await
    }

    /// Makes something be as it is described.
    pub(crate) async fn put<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<T> {
        self.send(Method::PUT, path, body).await
    }

    async fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &serde_json::Value,
    ) -> Result<T> {
        let (status, answer) = self.call(method, path, Some(body.to_string())).await?;
        if !status.is_success() {
            return Err(refused(status, &answer));
        }
        read(path, &answer)
    }

    async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<String>,
    ) -> Result<(StatusCode, Bytes)> {
        let url = format!("{}{path}", self.base);
        let request = Request::builder()
            .method(method)
            .uri(&url)
            .header(self.credential.0, self.credential.1.expose())
            .header("content-type", "application/json")
            .body(Full::from(body.unwrap_or_default()))
            .with_context(|| format!("failed to build a request to {url}"))?;
        let exchange = async {
            let answer = self.http.request(request).await.map_err(|e| {
                anyhow!(e).context(format!(
                    "failed to reach the server at {}: is `belljar up` running?",
                    self.base
                ))
            })?;
            let status = answer.status();
            let body = Limited::new(answer.into_body(), ANSWER_MAX_BYTES)
                .collect()
                .await
                .map_err(|e| anyhow!("failed to read the answer of {url}: {e}"))?;
            Ok((status, body.to_bytes()))
        };
        match tokio::time::timeout(DEADLINE, exchange).await {
            Ok(outcome) => outcome,
            Err(_) => bail!("the server at {} gave no answer in {DEADLINE:?}", self.base),
        }
    }
}

fn read<T: DeserializeOwned>(path: &str, body: &[u8]) -> Result<T> {
    serde_json::from_slice(body).with_context(|| format!("failed to read the answer to {path}"))
}

fn refused(status: StatusCode, body: &[u8]) -> anyhow::Error {
    let message = serde_json::from_slice::<ApiError>(body)
        .map_or_else(|_| "no further words".to_owned(), |e| e.message);
    anyhow!("the server answered {}: {message}", status.as_u16())
}
