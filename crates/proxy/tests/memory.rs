//! A large stream leaves no mark: alone in its process, because it looks at the process' memory.

mod support;

use belljar_proxy::Config;
use bytes::Bytes;
use futures::StreamExt as _;
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::{Request, Response};
use support::{Body, Guest, Rig, get, guest_ip, soon, text};

const PIECE_BYTES: usize = 64 << 10;
const PIECES: usize = 3200;
/// Far below the 200 MiB that pass, far above what buffers need.
const GROWTH_LIMIT_KIB: u64 = 32 << 10;

fn large() -> Body {
    let piece = Bytes::from(vec![0x5a; PIECE_BYTES]);
    let pieces = futures::stream::repeat(piece).take(PIECES);
    BodyExt::boxed(StreamBody::new(pieces.map(|piece| Ok(Frame::data(piece)))))
}

async fn count(mut body: Incoming) -> usize {
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        bytes += frame.expect("a good body").into_data().map_or(0, |data| data.len());
    }
    bytes
}

/// The most memory this process has ever had, in KiB. Source: proc_pid_status(5).
fn peak_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").expect("proc is mounted");
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).expect("a peak");
    line.split_whitespace().nth(1).and_then(|n| n.parse().ok()).expect("a number")
}

#[tokio::test]
async fn two_hundred_megabytes_pass_in_flat_memory() {
    let rig = Rig::start(Config::default()).await;
    let guest = Guest::start(&rig, guest_ip(), 0, |request: Request<Incoming>| async move {
        if request.method() == hyper::Method::GET {
            return Response::new(large());
        }
        text(count(request.into_body()).await.to_string())
    })
    .await;
    let host = guest.host(&rig.publish(guest.ip));
    let mut client = rig.http1().await;
    let before = peak_kib();
    let down = client.send_request(get(&host, "/")).await.expect("a response");
    assert_eq!(soon("the download", count(down.into_body())).await, PIECE_BYTES * PIECES);
    let mut request = get(&host, "/");
    *request.method_mut() = hyper::Method::POST;
    *request.body_mut() = large();
    soon("the client connection", client.ready()).await.expect("still open");
    let up = soon("the upload", client.send_request(request)).await.expect("a response");
    let counted = up.into_body().collect().await.expect("a good body").to_bytes();
    assert_eq!(counted, (PIECE_BYTES * PIECES).to_string());
    let mut client = rig.http2().await;
    let request = Request::get(format!("http://{host}/")).body(support::empty());
    let down = client.send_request(request.expect("a request")).await.expect("a response");
    assert_eq!(soon("the h2 download", count(down.into_body())).await, PIECE_BYTES * PIECES);
    let growth = peak_kib() - before;
    assert!(growth < GROWTH_LIMIT_KIB, "grew by {growth} KiB");
    rig.stop().await;
}
