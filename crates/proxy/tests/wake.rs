//! Requests for a sandbox that has no route are held while it is resumed.

mod support;

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use belljar_domain::SandboxId;
use belljar_proxy::{Asleep, Config, MemoryCatalog, Visitor, Wake, Waking};
use hyper::Request;
use hyper::body::Incoming;
use support::{Guest, Rig, all_text, get, guest_ip, soon, target, text};
use tokio::sync::watch;

/// Resumes as it is told to, at `ip`.
struct Sleeper {
    catalog: Arc<MemoryCatalog>,
    ip: Ipv4Addr,
    outcome: Result<(), Asleep>,
    held: watch::Sender<bool>,
    asked: AtomicUsize,
    woken: AtomicBool,
    visitors: Mutex<Vec<Visitor>>,
}

impl Wake for Sleeper {
    fn wake<'a>(&'a self, id: &'a SandboxId, visitor: Visitor) -> Waking<'a> {
        Box::pin(async move {
            self.asked.fetch_add(1, Ordering::SeqCst);
            self.visitors.lock().expect("no panic holds it").push(visitor);
            let mut held = self.held.subscribe();
            held.wait_for(|held| !held).await.expect("it outlives its calls");
            // One resume for all of them, and so one route.
            if self.outcome.is_ok() && !self.woken.swap(true, Ordering::SeqCst) {
                self.catalog.publish(id, target(self.ip, "secret"));
            }
            self.outcome
        })
    }
}

async fn hello(_request: Request<Incoming>) -> hyper::Response<support::Body> {
    text("hello")
}

async fn start(outcome: Result<(), Asleep>, held: bool) -> (Rig, Arc<Sleeper>) {
    let ip = guest_ip();
    let mut sleeper = None;
    let rig = Rig::start_waking(Config::default(), |catalog| {
        let made = Arc::new(Sleeper {
            catalog,
            ip,
            outcome,
            held: watch::channel(held).0,
            asked: AtomicUsize::new(0),
            woken: AtomicBool::new(false),
            visitors: Mutex::default(),
        });
        sleeper = Some(Arc::clone(&made));
        made
    })
    .await;
    (rig, sleeper.expect("it was made"))
}

#[tokio::test]
async fn requests_wait_for_the_resume_and_go_on() {
    let (rig, sleeper) = start(Ok(()), true).await;
    let guest = Guest::start(&rig, sleeper.ip, 0, hello).await;
    let id = SandboxId::random();
    let host = guest.host(&id);
    let ask = async |host: &str| {
        let mut client = rig.http1().await;
        let response = client.send_request(get(host, "/")).await.expect("a response");
        all_text(response).await
    };
    let release = async {
        soon("both are held", async {
            while sleeper.asked.load(Ordering::SeqCst) < 2 {
                tokio::task::yield_now().await;
            }
        })
        .await;
        sleeper.held.send_replace(false);
    };
    let (first, second, ()) = tokio::join!(ask(&host), ask(&host), release);
    assert_eq!((first.as_str(), second.as_str()), ("hello", "hello"));
    // With a route nobody is asked.
    assert_eq!(ask(&host).await, "hello");
    assert_eq!(sleeper.asked.load(Ordering::SeqCst), 2);
    rig.stop().await;
}

#[tokio::test]
async fn refusals_have_the_contracts_statuses_and_texts() {
    for (why, status, words) in [
        (Asleep::NotFound, 502, "The sandbox was not found"),
        (
            Asleep::NotPermitted,
            403,
            "This sandbox can't be resumed with the credentials provided. Check your access token \
             and try again.",
        ),
        (Asleep::Changing, 409, "The sandbox is still transitioning. Try again in a moment."),
        (Asleep::AtLimit { limit: 7 }, 429, "concurrent E2B sandboxes (7)"),
        (Asleep::Unavailable, 503, "The sandbox could not be resumed"),
    ] {
        let (rig, sleeper) = start(Err(why), false).await;
        let id = SandboxId::random();
        let mut client = rig.http1().await;
        let request = get(&format!("8080-{id}.example.com"), "/");
        let response = client.send_request(request).await.expect("a response");
        assert_eq!(response.status(), status, "{why:?}");
        let body = all_text(response).await;
        assert!(body.contains(words) && body.contains(id.as_str()), "{why:?}: {body}");
        assert!(!sleeper.visitors.lock().expect("no panic holds it")[0].for_daemon);
        rig.stop().await;
    }
}

#[tokio::test]
async fn the_daemons_visitors_show_their_token_and_its_own_routes_wake_nobody() {
    let (rig, sleeper) = start(Err(Asleep::NotPermitted), false).await;
    let host = format!("49983-{}.example.com", SandboxId::random());
    for (path, token) in [("/files", Some("t0ken")), ("/health", None), ("/init", Some("t0ken"))] {
        let mut request = get(&host, path);
        if let Some(token) = token {
            let value = token.parse().expect("a header value");
            request.headers_mut().insert("x-access-token", value);
        }
        let mut client = rig.http1().await;
        let response = client.send_request(request).await.expect("a response");
        assert_eq!(response.status(), if path == "/init" { 502 } else { 403 }, "{path}");
    }
    let visitors = sleeper.visitors.lock().expect("no panic holds it").clone();
    let shown = visitors.iter().map(|visitor| {
        assert!(visitor.for_daemon);
        visitor.access_token.as_ref().map(|token| token.expose().clone())
    });
    assert_eq!(shown.collect::<Vec<_>>(), [Some("t0ken".to_owned()), None]);
    rig.stop().await;
}
