//! The verifier against a provider of this process: real HTTP, real keys.

mod provider;
mod real;

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use belljar_daemon::{Scope, clock};
use belljar_domain::Kind;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Value, json};

use super::provider::Timing;
use super::{OidcIssuer, OidcIssuerError, Subject, Verifier, VerifyError};
use provider::{Provider, Signer};

const AUDIENCE: &str = "belljar";

/// A provider, a verifier that trusts it, and the scope both end with.
struct Rig {
    provider: Provider,
    verifier: Verifier,
    scope: Scope,
}

impl Rig {
    async fn start(keys: &[&Signer]) -> Rig {
        let eager = Timing { unknown_key: Duration::ZERO, ..quick() };
        Rig::with(keys, eager).await
    }

    async fn with(keys: &[&Signer], timing: Timing) -> Rig {
        let scope = Scope::root("test oidc");
        let provider = Provider::start(&scope).await;
        provider.publish(keys);
        let issuer = OidcIssuer::parse(&provider.url, AUDIENCE).expect("an issuer");
        let verifier = Verifier::with_timing(&[issuer], &scope, timing).expect("a verifier");
        Rig { provider, verifier, scope }
    }

    /// Claims that are in order.
    fn claims(&self) -> Value {
        let now = clock::now().0 / 1000;
        json!({
            "iss": self.provider.url, "sub": "user-1", "aud": AUDIENCE,
            "iat": now, "exp": now + 300, "email": "u@example.com", "email_verified": true,
        })
    }

    /// The outcome of a token whose claims `change` has changed.
    async fn outcome(
        &self,
        signer: &Signer,
        change: impl FnOnce(&mut Value),
    ) -> Result<Subject, VerifyError> {
        let mut claims = self.claims();
        change(&mut claims);
        self.verifier.verify(&signer.sign(&claims)).await
    }

    async fn stop(self) {
        assert!(self.scope.close(Duration::from_secs(10)).await, "something goes on");
    }
}

fn quick() -> Timing {
    Timing {
        after_failure: Duration::ZERO,
        fetch_limit: Duration::from_secs(5),
        ..Timing::default()
    }
}

#[tokio::test]
async fn tokens_of_every_key_type_are_accepted() {
    let rsa = [
        Algorithm::RS256,
        Algorithm::RS384,
        Algorithm::RS512,
        Algorithm::PS256,
        Algorithm::PS384,
        Algorithm::PS512,
    ]
    .map(|algorithm| Signer::rsa("rsa", algorithm));
    let (ed, p256) = (Signer::ed25519("ed"), Signer::p256("p256"));
    let rig = Rig::start(&[&rsa[0].of_any_algorithm(), &ed, &p256]).await;
    for signer in rsa.iter().chain([&ed, &p256]) {
        let subject = rig.outcome(signer, |_| {}).await.expect("it is good");
        let email = Some("u@example.com".to_owned());
        let expected =
            Subject { issuer: rig.provider.url.clone(), subject: "user-1".into(), email };
        assert_eq!(subject, expected);
    }
    assert_eq!(rig.provider.asked(), 1, "the keys are kept");
    rig.stop().await;
}

#[tokio::test]
async fn claims_that_are_not_in_order_are_refused() {
    type Change = Box<dyn FnOnce(&mut Value)>;
    let key = Signer::ed25519("a");
    let rig = Rig::start(&[&key]).await;
    let now = clock::now().0 / 1000;
    let set = |name: &'static str, value: Value| -> Change {
        Box::new(move |claims| claims[name] = value)
    };
    let cases: Vec<(Change, &str)> = vec![
        (set("exp", json!(now - 61)), "has expired"),
        (set("exp", json!("soon")), "`exp`"),
        (set("exp", Value::Null), "`exp`"),
        (set("nbf", json!(now + 120)), "not valid yet"),
        (set("nbf", json!([])), "`nbf`"),
        (set("iat", json!(now + 120)), "not valid yet"),
        (set("aud", json!("another")), "`aud`"),
        (set("aud", json!(["x", "y"])), "`aud`"),
        (set("aud", Value::Null), "`aud`"),
        (set("sub", Value::Null), "`sub`"),
        (set("sub", json!("")), "`sub`"),
        (set("sub", json!(7)), "`sub`"),
        (set("sub", json!("a\nb")), "`sub`"),
        (set("sub", json!("x".repeat(256))), "`sub`"),
        (set("iss", json!("https://elsewhere.example")), "issuer"),
        (set("iss", json!(format!("{}/", rig.provider.url))), "issuer"),
        (set("iss", Value::Null), "not a JSON web token"),
    ];
    for (change, expected) in cases {
        let refused = rig.outcome(&key, change).await.expect_err(expected);
        assert!(refused.to_string().contains(expected), "{refused} is not about {expected}");
        assert_eq!(refused.kind(), Kind::Unauthenticated);
    }
    rig.stop().await;
}

#[tokio::test]
async fn clocks_may_differ_by_a_minute_and_audiences_be_several() {
    let key = Signer::ed25519("a");
    let rig = Rig::start(&[&key]).await;
    let now = clock::now().0 / 1000;
    type Edit<'a> = Box<dyn FnOnce(&mut Value) + 'a>;
    let good: Vec<Edit<'_>> = vec![
        Box::new(|claims| claims["exp"] = json!(now - 50)),
        Box::new(|claims| claims["nbf"] = json!(now + 50)),
        Box::new(|claims| claims["iat"] = json!(now as f64 + 50.5)),
        Box::new(|claims| claims["aud"] = json!(["other", AUDIENCE])),
    ];
    for change in good {
        rig.outcome(&key, change).await.expect("it is good");
    }
    rig.stop().await;
}

#[tokio::test]
async fn an_address_nobody_verified_is_not_given_on() {
    let key = Signer::ed25519("a");
    let rig = Rig::start(&[&key]).await;
    for verified in [json!(false), Value::Null, json!("false"), json!(1)] {
        let subject = rig.outcome(&key, |claims| claims["email_verified"] = verified).await;
        assert_eq!(subject.expect("it is good").email, None);
    }
    let subject = rig.outcome(&key, |claims| claims["email_verified"] = json!("true")).await;
    assert_eq!(subject.expect("it is good").email.as_deref(), Some("u@example.com"));
    let subject = rig.outcome(&key, |claims| claims["email"] = json!("a\r\nb")).await;
    assert_eq!(subject.expect("it is good").email, None);
    rig.stop().await;
}

#[tokio::test]
async fn the_key_decides_on_the_algorithm() {
    let rsa = Signer::rsa("rsa", Algorithm::RS256);
    let ed = Signer::ed25519("ed");
    let rig = Rig::start(&[&rsa, &ed]).await;
    // Signed with the public key as if it were a shared secret: the classic.
    for secret in [rsa.public_document(), rsa.modulus_text().into_bytes()] {
        let mut head = Header::new(Algorithm::HS256);
        head.kid = Some("rsa".to_owned());
        let key = EncodingKey::from_secret(&secret);
        let forged = jsonwebtoken::encode(&head, &rig.claims(), &key).expect("a token");
        let refused = rig.verifier.verify(&forged).await.expect_err("a forgery");
        assert!(matches!(refused, VerifyError::Algorithm | VerifyError::Key), "{refused}");
    }
    // The key says RS256, so not even another algorithm of its type will do.
    let other = Signer::rsa("rsa", Algorithm::PS256);
    let refused = rig.outcome(&other, |_| {}).await.expect_err("the wrong algorithm");
    assert!(matches!(refused, VerifyError::Algorithm), "{refused}");
    // The right algorithm under the name of another type's key.
    let renamed = ed.named("rsa");
    let refused = rig.outcome(&renamed, |_| {}).await.expect_err("the wrong type");
    assert!(matches!(refused, VerifyError::Algorithm), "{refused}");
    rig.stop().await;
}

#[tokio::test]
async fn unsigned_and_damaged_tokens_are_refused() {
    let key = Signer::ed25519("a");
    let rig = Rig::start(&[&key]).await;
    let good = key.sign(&rig.claims());
    let (message, signature) = good.rsplit_once('.').expect("a token");
    let (_, body) = message.split_once('.').expect("a token");
    let head = |json: Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let none = head(json!({"alg": "none"}));
    let damaged = vec![
        String::new(),
        "a.b".to_owned(),
        "a.b.c".to_owned(),
        format!("{good}.{signature}"),
        format!("{none}.{body}."),
        format!("{none}.{body}.{signature}"),
        format!("{message}."),
        format!("{message}.{}", signature.chars().rev().collect::<String>()),
        format!("{}.{body}.{signature}", head(json!({"alg": "EdDSA", "kid": "a", "x": 1}))),
        format!("{}.{body}.{signature}", head(json!({"alg": "EdDSA", "crit": ["x"]}))),
        format!("{}.{body}.{signature}", head(json!({"alg": "EdDSA", "typ": "logout+jwt"}))),
        format!("{}.{body}.{signature}", head(json!({"alg": "EdDSA", "typ": 7}))),
        format!("{good}{}", "A".repeat(20_000)),
        "é".repeat(100),
    ];
    for token in damaged {
        let refused = rig.verifier.verify(&token).await.expect_err("it is damaged");
        assert_eq!(refused.kind(), Kind::Unauthenticated, "{token}");
    }
    rig.verifier.verify(&good).await.expect("the good one still is");
    rig.stop().await;
}

#[tokio::test]
async fn a_new_key_is_found_and_a_withdrawn_one_forgotten() {
    let (old, new) = (Signer::ed25519("old"), Signer::p256("new"));
    let rig = Rig::start(&[&old]).await;
    rig.outcome(&old, |_| {}).await.expect("it is good");
    rig.provider.publish(&[&new]);
    rig.outcome(&new, |_| {}).await.expect("the new key is found");
    let refused = rig.outcome(&old, |_| {}).await.expect_err("its key is gone");
    assert!(matches!(refused, VerifyError::Key), "{refused}");
    // A key of another make under a known name.
    let refused = rig.outcome(&Signer::p256("new"), |_| {}).await.expect_err("a stranger");
    assert!(matches!(refused, VerifyError::Signature), "{refused}");
    rig.stop().await;
}

#[tokio::test]
async fn a_token_without_key_name_needs_a_choice_of_one() {
    let (ed, first, second) =
        (Signer::ed25519("ed"), Signer::p256("first"), Signer::p256("second"));
    let rig = Rig::start(&[&ed, &first, &second]).await;
    rig.outcome(&ed.unnamed(), |_| {}).await.expect("one key fits");
    let refused = rig.outcome(&first.unnamed(), |_| {}).await.expect_err("two fit");
    assert!(matches!(refused, VerifyError::Key), "{refused}");
    rig.stop().await;
}

#[tokio::test]
async fn unknown_keys_do_not_have_the_provider_asked_at_will() {
    let known = Signer::ed25519("known");
    let rig = Rig::with(&[&known], quick()).await;
    rig.outcome(&known, |_| {}).await.expect("it is good");
    for attempt in 0..50 {
        let stranger = Signer::ed25519(&format!("unknown-{attempt}"));
        let refused = rig.outcome(&stranger, |_| {}).await.expect_err("nobody knows it");
        assert!(matches!(refused, VerifyError::Key), "{refused}");
    }
    assert_eq!(rig.provider.asked(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn many_callers_share_one_fetch() {
    let key = Signer::ed25519("a");
    let rig = Rig::with(&[&key], quick()).await;
    let token = key.sign(&rig.claims());
    let all = futures::future::join_all((0..50).map(|_| rig.verifier.verify(&token))).await;
    assert!(all.iter().all(Result::is_ok));
    assert_eq!(rig.provider.asked(), 1);
    rig.stop().await;
}

#[tokio::test]
async fn old_keys_are_fetched_again_behind_the_answer_and_too_old_ones_not_believed() {
    let key = Signer::ed25519("a");
    let rig = Rig::with(&[&key], Timing { refresh: Duration::ZERO, ..quick() }).await;
    rig.outcome(&key, |_| {}).await.expect("it is good");
    rig.provider.fail(Some(500));
    rig.outcome(&key, |_| {}).await.expect("the known keys will do");
    rig.stop().await;

    let rig = Rig::with(&[&key], Timing { max_age: Duration::from_nanos(1), ..quick() }).await;
    rig.provider.fail(Some(500));
    let refused = rig.outcome(&key, |_| {}).await.expect_err("nothing is known");
    assert_eq!(refused.kind(), Kind::Unavailable);
    rig.stop().await;
}

#[tokio::test]
async fn a_provider_that_does_not_answer_is_not_the_callers_fault() {
    let key = Signer::ed25519("a");
    let rig = Rig::with(&[&key], quick()).await;
    for failure in [500, 404, 301, 204] {
        rig.provider.fail(Some(failure));
        let refused = rig.outcome(&key, |_| {}).await.expect_err("no keys");
        assert_eq!(refused.kind(), Kind::Unavailable, "{failure}");
    }
    rig.provider.fail(None);
    rig.outcome(&key, |_| {}).await.expect("it recovers");
    let nobody = OidcIssuer::parse("http://127.0.0.1:1", AUDIENCE).expect("an issuer");
    let verifier = Verifier::with_timing(&[nobody], &rig.scope, quick()).expect("a verifier");
    let mut claims = rig.claims();
    claims["iss"] = json!("http://127.0.0.1:1");
    let refused = verifier.verify(&key.sign(&claims)).await.expect_err("nobody is there");
    assert_eq!(refused.kind(), Kind::Unavailable);
    rig.stop().await;
}

#[tokio::test]
async fn a_provider_that_hangs_is_given_up() {
    let key = Signer::ed25519("a");
    let limit = Duration::from_millis(200);
    let rig = Rig::with(&[&key], Timing { fetch_limit: limit, ..quick() }).await;
    rig.provider.hang();
    let refused = rig.outcome(&key, |_| {}).await.expect_err("no keys");
    assert_eq!(refused.kind(), Kind::Unavailable);
    rig.stop().await;
}

#[tokio::test]
async fn documents_that_are_not_what_they_should_be_are_refused() {
    let key = Signer::ed25519("a");
    let rig = Rig::with(&[&key], quick()).await;
    let good = rig.provider.discovery();
    let keys = rig.provider.keys();
    let with = |name: &str, value: &str| {
        let mut changed = good.clone();
        changed[name] = json!(value);
        changed.to_string()
    };
    let (url, huge) = (rig.provider.url.clone(), " ".repeat(300_000));
    let many = json!({"keys": vec![keys["keys"][0].clone(); 65]}).to_string();
    let short = json!({"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]}).to_string();
    let secret = json!({"keys": [{"kty": "oct", "k": "AAAA", "alg": "HS256"}]}).to_string();
    let cases = [
        (with("issuer", "https://elsewhere.example"), keys.to_string()),
        (with("jwks_uri", "http://elsewhere.example/jwks"), keys.to_string()),
        (with("jwks_uri", "file:///etc/passwd"), keys.to_string()),
        (with("jwks_uri", &format!("{url}/redirect")), keys.to_string()),
        ("[]".to_owned(), keys.to_string()),
        (format!("{good}{huge}"), keys.to_string()),
        (good.to_string(), format!("{keys}{huge}")),
        (good.to_string(), "[".repeat(5_000)),
        (good.to_string(), json!({"keys": []}).to_string()),
        (good.to_string(), many),
        (good.to_string(), short),
        (good.to_string(), secret),
    ];
    for (discovery, keys) in cases {
        rig.provider.say(&discovery, &keys);
        let refused = rig.outcome(&key, |_| {}).await.expect_err(&discovery);
        assert_eq!(refused.kind(), Kind::Unavailable, "{discovery:.300} {keys:.300}");
    }
    rig.provider.say(&with("jwks_uri", &format!("{url}/moved")), &keys.to_string());
    rig.outcome(&key, |_| {}).await.expect("a redirect within the host is followed");
    rig.stop().await;
}

#[tokio::test]
async fn without_an_issuer_no_token_is_good() {
    let scope = Scope::root("test oidc");
    let verifier = Verifier::new(&[], &scope).expect("a verifier");
    assert!(!verifier.is_configured());
    let key = Signer::ed25519("a");
    let refused = verifier.verify(&key.sign(&json!({"iss": "https://x.example"}))).await;
    assert!(matches!(refused, Err(VerifyError::Issuer)));
    assert!(scope.close(Duration::from_secs(10)).await);
}

#[test]
fn issuers_are_https_or_of_this_machine() {
    for url in [
        "https://login.example.com",
        "https://x.example/realms/a",
        "http://localhost:8080",
        "http://127.0.0.1:1/x",
        "http://[::1]:9",
    ] {
        assert_eq!(OidcIssuer::parse(url, "a").expect("an issuer").url(), url);
    }
    let parse = |url: &str| OidcIssuer::parse(url, "a").expect_err("no issuer");
    for url in ["http://login.example.com", "http://10.0.0.1", "ftp://localhost"] {
        assert!(matches!(parse(url), OidcIssuerError::Insecure(_)), "{url}");
    }
    for url in ["", "login.example.com", "data:x", "https://"] {
        assert!(matches!(parse(url), OidcIssuerError::Url(_)), "{url}");
    }
    for url in [
        "https://u@x.example",
        "https://:p@x.example",
        "https://x.example?a",
        "https://x.example#a",
    ] {
        assert!(matches!(parse(url), OidcIssuerError::Extras(_)), "{url}");
    }
    let no_audience = OidcIssuer::parse("https://x.example", " ");
    assert!(matches!(no_audience, Err(OidcIssuerError::Audience(_))));
}
