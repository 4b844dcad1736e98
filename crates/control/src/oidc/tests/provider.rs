//! A provider that serves two documents, and keys to sign with.

use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Redirect, Response};
use axum::routing::get;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use belljar_daemon::{OnError, Scope};
use http::StatusCode;
use jsonwebtoken::jwk::{AlgorithmParameters, Jwk};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};
use tokio::net::TcpListener;

/// A key made for these tests; making one takes an unoptimised build half a minute.
const RSA_KEY: &str = include_str!("../testdata/rsa-key.der.base64");
/// What comes before 32 random bytes in the PKCS #8 form of a key. Source: RFC 8410 section 7.
const ED25519_HEAD: &str = "302e020100300506032b657004220420";
/// The same for P-256. Source: RFC 5915 section 3, RFC 5480 section 2.1.1.
const P256_HEAD: &str = "3041020100301306072a8648ce3d020106082a8648ce3d030107042730250201010420";

/// A private key and what its tokens say of it.
#[derive(Clone)]
pub(super) struct Signer {
    key: EncodingKey,
    algorithm: Algorithm,
    id: Option<String>,
    names_algorithm: bool,
}

impl Signer {
    pub(super) fn rsa(id: &str, algorithm: Algorithm) -> Signer {
        let text: String = RSA_KEY.split_whitespace().collect();
        let key = EncodingKey::from_rsa_der(&STANDARD.decode(text).expect("base64"));
        Signer { key, algorithm, id: Some(id.to_owned()), names_algorithm: true }
    }

    pub(super) fn ed25519(id: &str) -> Signer {
        let key = EncodingKey::from_ed_der(&with_random(ED25519_HEAD));
        Signer { key, algorithm: Algorithm::EdDSA, id: Some(id.to_owned()), names_algorithm: true }
    }

    pub(super) fn p256(id: &str) -> Signer {
        let key = EncodingKey::from_ec_der(&with_random(P256_HEAD));
        Signer { key, algorithm: Algorithm::ES256, id: Some(id.to_owned()), names_algorithm: true }
    }

    /// The same key, published without saying what it is for.
    pub(super) fn of_any_algorithm(&self) -> Signer {
        Signer { names_algorithm: false, ..self.clone() }
    }

    pub(super) fn named(&self, id: &str) -> Signer {
        Signer { id: Some(id.to_owned()), ..self.clone() }
    }

    pub(super) fn unnamed(&self) -> Signer {
        Signer { id: None, ..self.clone() }
    }

    pub(super) fn sign(&self, claims: &Value) -> String {
        let mut head = Header::new(self.algorithm);
        head.kid = self.id.clone();
        jsonwebtoken::encode(&head, claims, &self.key).expect("a token")
    }

    fn public(&self) -> Jwk {
        let mut jwk = Jwk::from_encoding_key(&self.key, self.algorithm).expect("a public key");
        jwk.common.key_id = self.id.clone();
        if !self.names_algorithm {
            jwk.common.key_algorithm = None;
        }
        jwk
    }

    pub(super) fn modulus_text(&self) -> String {
        match self.public().algorithm {
            AlgorithmParameters::RSA(key) => key.n,
            _ => panic!("not an RSA key"),
        }
    }

    /// The public key as anybody can have it.
    pub(super) fn public_document(&self) -> Vec<u8> {
        serde_json::to_vec(&self.public()).expect("a document")
    }
}

fn with_random(head: &str) -> Vec<u8> {
    let mut key = hex::decode(head).expect("hex");
    key.extend(rand::random::<[u8; 32]>());
    key
}

/// A provider on a port of its own.
pub(super) struct Provider {
    pub(super) url: String,
    state: Arc<Said>,
}

#[derive(Default)]
struct Said {
    discovery: Mutex<String>,
    keys: Mutex<String>,
    failure: Mutex<Option<u16>>,
    hangs: Mutex<bool>,
    asked: Mutex<usize>,
}

impl Provider {
    pub(super) async fn start(scope: &Scope) -> Provider {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let url = format!("http://{}", listener.local_addr().expect("its address"));
        let state = Arc::new(Said::default());
        let elsewhere = Redirect::temporary("http://127.0.0.1:1/jwks");
        let router = Router::new()
            .route("/.well-known/openid-configuration", get(discovery))
            .route("/jwks", get(keys))
            .route("/moved", get(|| async { Redirect::temporary("/jwks") }))
            .route("/redirect", get(|| async { elsewhere }))
            .with_state(state.clone());
        scope.spawn("provider", OnError::Log, async move { axum::serve(listener, router).await });
        Provider { url, state }
    }

    pub(super) fn discovery(&self) -> Value {
        json!({"issuer": self.url, "jwks_uri": format!("{}/jwks", self.url)})
    }

    pub(super) fn keys(&self) -> Value {
        let keys = self.state.keys.lock().expect("no panic holds it");
        serde_json::from_str(&keys).expect("keys")
    }

    /// From now on these are the provider's keys.
    pub(super) fn publish(&self, signers: &[&Signer]) {
        let keys: Vec<_> = signers.iter().map(|signer| signer.public()).collect();
        self.say(&self.discovery().to_string(), &json!({"keys": keys}).to_string());
    }

    /// From now on these are the provider's documents.
    pub(super) fn say(&self, discovery: &str, keys: &str) {
        discovery.clone_into(&mut self.state.discovery.lock().expect("no panic holds it"));
        keys.clone_into(&mut self.state.keys.lock().expect("no panic holds it"));
    }

    /// From now on it answers this status, or what it should.
    pub(super) fn fail(&self, status: Option<u16>) {
        *self.state.failure.lock().expect("no panic holds it") = status;
    }

    /// From now on it does not answer.
    pub(super) fn hang(&self) {
        *self.state.hangs.lock().expect("no panic holds it") = true;
    }

    /// How often its keys were asked for.
    pub(super) fn asked(&self) -> usize {
        *self.state.asked.lock().expect("no panic holds it")
    }
}

async fn discovery(State(said): State<Arc<Said>>) -> Response {
    let hangs = *said.hangs.lock().expect("no panic holds it");
    if hangs {
        std::future::pending::<Infallible>().await;
    }
    let failure = *said.failure.lock().expect("no panic holds it");
    match failure {
        Some(status) => StatusCode::from_u16(status).expect("a status").into_response(),
        None => said.discovery.lock().expect("no panic holds it").clone().into_response(),
    }
}

async fn keys(State(said): State<Arc<Said>>) -> Response {
    *said.asked.lock().expect("no panic holds it") += 1;
    said.keys.lock().expect("no panic holds it").clone().into_response()
}
