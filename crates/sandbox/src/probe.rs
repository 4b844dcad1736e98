//! Asking guests what they use.
//!
//! A guest is hostile: the question has a deadline, the answer a bound, and only so many are asked
//! at once. Each owner asks for its own sandbox, at times of its own, so that nothing ever walks
//! through all of them. Guests that did not answer are asked less often, and wait in a queue of
//! their own: however many keep silent, those that answer are asked in time.

use std::convert::Infallible;
use std::future::Future as _;
use std::io;
use std::net::Ipv4Addr;
use std::task::Poll;
use std::time::Duration;

use belljar_domain::Secret;
use belljar_wire::ENVD_PORT;
use belljar_wire::guest_metrics::{GuestMetrics, METRICS_MAX_BYTES};
use bytes::Bytes;
use http::{HeaderName, Request, StatusCode, header};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::MissedTickBehavior;
use tracing::debug;

use crate::metrics::{Figures, SAMPLE_EVERY, Sample};
use crate::table::Running;
use belljar_daemon::clock::Clock;

/// Guests asked at once, of those that answered last. An answer takes a millisecond.
const PROBES_MAX: usize = 32;
/// Guests asked at once, of those that did not. Each may take the whole deadline.
const DOUBTFUL_PROBES_MAX: usize = 8;
/// Longest pause before a silent guest is asked again: what is counted as a minute's sample.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// How long a guest may take: an emulated one that is busy takes its time.
const ANSWER_DEADLINE: Duration = Duration::from_secs(3);
/// Room for the answer's head.
const HEAD_MAX_BYTES: usize = 16 * 1024;
const ACCESS_TOKEN: HeaderName = HeaderName::from_static("x-access-token");

/// Bounds how many guests are asked at once.
#[derive(Debug)]
pub(crate) struct Places {
    answering: Semaphore,
    doubtful: Semaphore,
}

impl Default for Places {
    fn default() -> Self {
        let answering = Semaphore::new(PROBES_MAX);
        Places { answering, doubtful: Semaphore::new(DOUBTFUL_PROBES_MAX) }
    }
}

/// How far one guest's word to answer is taken.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Doubt {
    /// A failure adds two and an answer takes one away, so that a guest which answers every other
    /// time does not get back to those that always do.
    strikes: u32,
}

impl Doubt {
    const STRIKES_MAX: u32 = 8;

    fn answered(&mut self) {
        self.strikes = self.strikes.saturating_sub(1);
    }

    fn failed(&mut self) {
        self.strikes = (self.strikes + 2).min(Doubt::STRIKES_MAX);
    }

    fn queue(self, places: &Places) -> &Semaphore {
        if self.strikes == 0 { &places.answering } else { &places.doubtful }
    }

    /// How long after a failure the next question comes.
    fn pause(self) -> Duration {
        (SAMPLE_EVERY * 2_u32.pow(self.strikes / 2)).min(PAUSE_MAX)
    }
}

/// A guest to ask.
#[derive(Debug)]
pub(crate) struct Target {
    pub(crate) address: Ipv4Addr,
    pub(crate) access_token: Option<Secret<String>>,
}

/// Why a guest gave no figures.
#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("connect to the guest")]
    Connect(#[source] io::Error),
    #[error("put the question")]
    Question(#[source] http::Error),
    #[error("ask the guest")]
    Ask(#[source] hyper::Error),
    #[error("ask the guest: it answered {0}")]
    Status(StatusCode),
    #[error("read the answer: {0}")]
    Body(String),
    #[error("understand the answer")]
    Parse(#[source] serde_json::Error),
    #[error("hear from the guest in time")]
    TimedOut,
}

/// Asks a guest every [`SAMPLE_EVERY`] and keeps the answers, until it is dropped; one that does not
/// answer up to every [`PAUSE_MAX`]. Cancel-safe.
pub(crate) async fn sample(
    running: &Running,
    target: Target,
    places: &Places,
    clock: &Clock,
) -> Infallible {
    // Sandboxes that start together must not ask together.
    tokio::time::sleep(SAMPLE_EVERY.mul_f64(rand::random())).await;
    let mut ticks = tokio::time::interval(SAMPLE_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    let mut doubt = Doubt::default();
    loop {
        ticks.tick().await;
        // The semaphores are never closed; without them the question would only be unbounded.
        let place = doubt.queue(places).acquire().await;
        let at = clock.now();
        // On the heap: most of the time nobody is asked, and a question is large.
        let asking = Box::pin(ask(&target, ENVD_PORT));
        let answer = tokio::time::timeout(ANSWER_DEADLINE, asking).await;
        drop(place);
        match answer.unwrap_or(Err(ProbeError::TimedOut)) {
            Ok(figures) => {
                doubt.answered();
                running.samples.add(Sample { at, figures });
            }
            // A guest may be frozen, busy or broken: that is its user's business.
            Err(e) => {
                let (sandbox_id, error) = (&running.info.sandbox_id, crate::registry::chain(&e));
                debug!(%sandbox_id, error, "no figures");
                doubt.failed();
                ticks.reset_after(doubt.pause());
            }
        }
    }
}

/// Asks a guest once, whatever it says: what it did once is quicker the next time.
pub(crate) async fn rehearse(target: &Target) {
    let asking = Box::pin(ask(target, ENVD_PORT));
    let answer = tokio::time::timeout(ANSWER_DEADLINE, asking).await;
    if let Err(e) = answer.unwrap_or(Err(ProbeError::TimedOut)) {
        debug!(address = %target.address, error = crate::registry::chain(&e), "no figures");
    }
}

/// One question, on a connection of its own.
async fn ask(target: &Target, port: u16) -> Result<Figures, ProbeError> {
    let stream = TcpStream::connect((target.address, port)).await.map_err(ProbeError::Connect)?;
    let (mut sender, connection) = http1::Builder::new()
        .max_buf_size(HEAD_MAX_BYTES)
        .handshake::<_, Empty<Bytes>>(TokioIo::new(stream))
        .await
        .map_err(ProbeError::Ask)?;
    let mut request = Request::get("/metrics")
        .header(header::HOST, target.address.to_string())
        .header(header::CONNECTION, "close");
    if let Some(token) = &target.access_token {
        request = request.header(ACCESS_TOKEN, token.expose());
    }
    let request = request.body(Empty::new()).map_err(ProbeError::Question)?;
    let answer = async move {
        let response = sender.send_request(request).await.map_err(ProbeError::Ask)?;
        if response.status() != StatusCode::OK {
            return Err(ProbeError::Status(response.status()));
        }
        let body = Limited::new(response.into_body(), METRICS_MAX_BYTES).collect().await;
        Ok(body.map_err(|e| ProbeError::Body(e.to_string()))?.to_bytes())
    };
    tokio::pin!(answer, connection);
    // The connection moves only while it is polled; how it ends is told by the answer.
    let mut open = true;
    let body = std::future::poll_fn(|context| {
        if open && connection.as_mut().poll(context).is_ready() {
            open = false;
        }
        match answer.as_mut().poll(context) {
            Poll::Ready(body) => Poll::Ready(body),
            Poll::Pending => Poll::Pending,
        }
    })
    .await?;
    parse(&body)
}

fn parse(body: &[u8]) -> Result<Figures, ProbeError> {
    let said: GuestMetrics = serde_json::from_slice(body).map_err(ProbeError::Parse)?;
    let cpu_used_pct =
        if said.cpu_used_pct.is_finite() { said.cpu_used_pct.clamp(0.0, 100.0) } else { 0.0 };
    Ok(Figures {
        cpu_count: said.cpu_count,
        cpu_used_pct,
        mem_used_bytes: said.mem_used,
        mem_total_bytes: said.mem_total,
        mem_cache_bytes: said.mem_cache,
        disk_used_bytes: said.disk_used,
        disk_total_bytes: said.disk_total,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    const ANSWER: &str = r#"{"ts":5,"cpu_count":2,"cpu_used_pct":12.5,"mem_total":512,
        "mem_used":100,"mem_cache":7,"mem_total_mib":0,"mem_used_mib":0,"disk_used":3,
        "disk_total":9,"later":{}}"#;

    /// What comes of asking a guest that says `answer`, and what it was asked.
    async fn asked(answer: Vec<u8>) -> (Result<Figures, ProbeError>, String) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("listen");
        let port = listener.local_addr().expect("address").port();
        let token = Some(Secret::new("sesame".to_owned()));
        let target = Target { address: Ipv4Addr::LOCALHOST, access_token: token };
        let guest = async {
            let (mut stream, _) = listener.accept().await.expect("a question");
            let mut heard = Vec::new();
            while !heard.ends_with(b"\r\n\r\n") {
                assert!(stream.read_buf(&mut heard).await.expect("read") > 0);
            }
            // Who asked may have heard enough.
            drop(stream.write_all(&answer).await);
            String::from_utf8(heard).expect("text")
        };
        tokio::join!(ask(&target, port), guest)
    }

    fn response(body: &str) -> Vec<u8> {
        format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len()).into_bytes()
    }

    #[tokio::test]
    async fn a_guest_is_asked_with_its_token_and_understood() {
        let (figures, question) = asked(response(ANSWER)).await;
        let figures = figures.expect("figures");
        assert_eq!((figures.cpu_count, figures.mem_used_bytes), (2, 100));
        assert_eq!((figures.disk_used_bytes, figures.disk_total_bytes), (3, 9));
        assert!((figures.cpu_used_pct - 12.5).abs() < 0.01);
        assert!(question.starts_with("GET /metrics HTTP/1.1\r\n"), "{question}");
        assert!(question.contains("x-access-token: sesame\r\n"), "{question}");
    }

    #[tokio::test]
    async fn whatever_else_a_guest_says_is_no_figures() {
        let too_long = format!("{ANSWER}{}", " ".repeat(METRICS_MAX_BYTES));
        let endless_head = [b"HTTP/1.1 200 OK\r\n".to_vec(), b"a: b\r\n".repeat(20_000)].concat();
        for answer in [
            response("{}"),
            response("[1e999]"),
            response(&too_long),
            response(&ANSWER.replace("12.5", "null")),
            b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n".to_vec(),
            b"what?\r\n\r\n".to_vec(),
            endless_head,
            Vec::new(),
        ] {
            let (figures, _) = asked(answer.clone()).await;
            assert!(
                figures.is_err(),
                "{}",
                String::from_utf8_lossy(&answer[..answer.len().min(80)])
            );
        }
    }

    #[test]
    fn silent_guests_are_asked_less_and_among_themselves() {
        let (places, mut doubt) = (Places::default(), Doubt::default());
        let waits_with_the_others =
            |doubt: Doubt| std::ptr::eq(doubt.queue(&places), &raw const places.answering);
        assert!(waits_with_the_others(doubt));
        let mut pauses = Vec::new();
        for _ in 0..6 {
            doubt.failed();
            assert!(!waits_with_the_others(doubt));
            pauses.push(doubt.pause().as_secs());
        }
        assert_eq!(pauses, [10, 20, 40, 60, 60, 60]);
        // Answering now and then does not help.
        for _ in 0..10 {
            doubt.answered();
            assert!(!waits_with_the_others(doubt));
            doubt.failed();
        }
        for _ in 0..Doubt::STRIKES_MAX {
            assert!(!waits_with_the_others(doubt));
            doubt.answered();
        }
        assert!(waits_with_the_others(doubt), "who answers is believed again");
    }

    #[test]
    fn a_processor_share_is_one() {
        let share = |text: &str| {
            parse(ANSWER.replace("12.5", text).as_bytes()).expect("figures").cpu_used_pct
        };
        assert!((share("250") - 100.0).abs() < f32::EPSILON);
        assert!(share("-3").abs() < f32::EPSILON);
    }
}
