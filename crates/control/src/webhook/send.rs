//! One try of one delivery over HTTP.

use std::error::Error as _;
use std::sync::Arc;
use std::time::Duration;

use belljar_domain::Secret;
use http::{HeaderMap, HeaderName, HeaderValue, header};
use reqwest::{Client, ClientBuilder, Response, Url};
use tokio::sync::OnceCell;

use super::attempt::Outcome;
use super::guard::{Guard, NotPublic};
use super::signature;
use crate::outgoing::client_builder;

const WEBHOOK_ID: HeaderName = HeaderName::from_static("e2b-webhook-id");
const DELIVERY_ID: HeaderName = HeaderName::from_static("e2b-delivery-id");
const SIGNATURE_VERSION: HeaderName = HeaderName::from_static("e2b-signature-version");
const SIGNATURE: HeaderName = HeaderName::from_static("e2b-signature");

const USER_AGENT: &str = concat!("belljar/", env!("CARGO_PKG_VERSION"));
/// From asking for the name to an open connection, within the deadline of the whole try.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// Idle connections kept to one receiver, and how long.
const IDLE_PER_HOST: usize = 2;
const IDLE_TIME: Duration = Duration::from_secs(30);
/// How much of an answer's body is read, so that its connection can be used again.
const MAX_ANSWER_BYTES: usize = 4 << 10;

/// What is sent, and where.
#[derive(Debug, Clone)]
pub(crate) struct Parcel {
    pub(crate) webhook_id: String,
    pub(crate) delivery_id: String,
    pub(crate) url: String,
    pub(crate) secret: Secret<String>,
    /// The event as JSON.
    pub(crate) body: Vec<u8>,
}

/// Sends parcels. The connections of all teams come from one pool, keyed by address.
#[derive(Debug)]
pub(crate) struct Sender {
    guard: Guard,
    deadline: Duration,
    /// Made at the first delivery: most servers have no webhooks, and trust anchors take time and
    /// memory.
    client: OnceCell<Client>,
}

impl Sender {
    /// Sends nothing yet. `deadline` bounds one try, from the name to the end of the answer.
    pub(crate) fn new(guard: Guard, deadline: Duration) -> Sender {
        Sender { guard, deadline, client: OnceCell::new() }
    }

    /// Tries once. Ends within the deadline. Cancel-safe: the receiver may have got it or not.
    pub(crate) async fn send(&self, parcel: Parcel) -> Outcome {
        match tokio::time::timeout(self.deadline, self.try_send(parcel)).await {
            Ok(Ok(status)) => Outcome::Answered(status),
            Ok(Err(reason)) => Outcome::Failed(reason),
            Err(_) => {
                Outcome::Failed(format!("no whole answer within {} ms", self.deadline.as_millis()))
            }
        }
    }

    async fn try_send(&self, parcel: Parcel) -> Result<u16, String> {
        let url: Url = parcel.url.parse().map_err(|_| "the URL is not valid".to_owned())?;
        self.guard.check(&url).map_err(|e| e.to_string())?;
        let client = self.client.get_or_try_init(|| client(self.guard)).await?;
        let request = client.post(url).headers(headers(&parcel)?).body(parcel.body);
        let response = request.send().await.map_err(|e| explain(&e))?;
        let status = response.status().as_u16();
        read_some(response).await;
        Ok(status)
    }
}

fn headers(parcel: &Parcel) -> Result<HeaderMap, String> {
    let value = |text: &str| HeaderValue::from_str(text).map_err(|e| e.to_string());
    let signature = signature::sign(&parcel.secret, &parcel.body);
    Ok(HeaderMap::from_iter([
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (WEBHOOK_ID, value(&parcel.webhook_id)?),
        (DELIVERY_ID, value(&parcel.delivery_id)?),
        (SIGNATURE_VERSION, HeaderValue::from_static(signature::VERSION)),
        (SIGNATURE, value(&signature)?),
    ]))
}

/// What a receiver says beside its status is of no use; how it ends does not matter.
async fn read_some(mut response: Response) {
    let mut read = 0;
    while read < MAX_ANSWER_BYTES {
        match response.chunk().await {
            Ok(Some(chunk)) => read += chunk.len(),
            Ok(None) | Err(_) => return,
        }
    }
}

async fn client(guard: Guard) -> Result<Client, String> {
    // Reading trust anchors blocks.
    let built = tokio::task::spawn_blocking(move || {
        let builder = client_builder().map_err(|e| e.to_string())?;
        settings(builder, guard).build().map_err(|e| explain(&e))
    });
    built.await.unwrap_or_else(|_| Err("the HTTP client could not be made".to_owned()))
}

fn settings(builder: ClientBuilder, guard: Guard) -> ClientBuilder {
    builder
        .dns_resolver(Arc::new(guard))
        // Deliveries have tries of their own.
        .retry(reqwest::retry::never())
        .user_agent(USER_AGENT)
        .connect_timeout(CONNECT_TIME)
        .pool_max_idle_per_host(IDLE_PER_HOST)
        .pool_idle_timeout(IDLE_TIME)
}

/// The innermost causes in words, without the URL: its path may be a secret.
fn explain(error: &reqwest::Error) -> String {
    let mut cause = error.source();
    let mut innermost = None;
    while let Some(error) = cause {
        if let Some(refused) = error.downcast_ref::<NotPublic>() {
            return refused.to_string();
        }
        innermost = Some(error.to_string());
        cause = error.source();
    }
    let stage = if error.is_connect() {
        "connect to the receiver"
    } else if error.is_builder() {
        "set the HTTP client up"
    } else {
        "send to the receiver"
    };
    match innermost {
        Some(reason) => format!("{stage}: {reason}"),
        None => stage.to_owned(),
    }
}
