//! The monitor's message, which may be anything.

use std::io::Write as _;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::Path;
use std::sync::Arc;

use belljar_runtime::uffd::{HandshakeError, PageServeError, PageServerLimits};
use proptest::prelude::*;

use crate::monitor::{regions, send};
use crate::saved::{LIMIT, PAGE, Saved, assert_no_failure, content, limits};
use crate::sys::GuardedMemory;

/// What the server says to a message, if it does not wait for more.
fn refusal(saved: &Saved, attempt: impl FnOnce(&Path)) -> HandshakeError {
    let (server, failures) = saved.serve(PageServerLimits::default(), None);
    attempt(server.socket());
    let failure = failures.recv_timeout(LIMIT).expect("the failure is told");
    assert!(!saved.path("socket").exists(), "nobody else may come");
    server.close().expect("close it");
    drop(server);
    match Arc::into_inner(failure) {
        Some(PageServeError::Handshake(e)) => e,
        other => panic!("{other:?}"),
    }
}

#[test]
fn hostile_handshakes_are_refused_by_name() {
    let saved = Saved::new(64);
    let memory = GuardedMemory::new(64 * PAGE, false).expect("guard some memory");
    let good = regions(&memory, 4096);
    let fd = memory.userfault();
    let file = std::fs::File::open(saved.path("memory")).expect("open a file");
    let said = |message: &[u8], fds: &[BorrowedFd<'_>]| {
        let mut streams = Vec::new();
        refusal(&saved, |socket| streams.push(send(socket, message, fds).expect("send")))
    };
    let none = said(good.as_bytes(), &[]);
    assert!(matches!(none, HandshakeError::Descriptors(0)), "{none}");
    let two = said(good.as_bytes(), &[fd, fd]);
    assert!(matches!(two, HandshakeError::Descriptors(2)), "{two}");
    let many = said(good.as_bytes(), &[fd; 8]);
    assert!(matches!(many, HandshakeError::Descriptors(4..)), "{many}");
    let other = said(good.as_bytes(), &[file.as_fd()]);
    assert!(
        matches!(&other, HandshakeError::NotAUserfault { found } if found.ends_with("memory")),
        "{other}"
    );
    let words = said(b"hello", &[fd]);
    assert!(matches!(words, HandshakeError::Layout(_)), "{words}");
    let deep = said(&[[b'['; 9000], [b']'; 9000]].concat(), &[fd]);
    assert!(matches!(deep, HandshakeError::Layout(_)), "{deep}");
    let more = said(&[good.as_bytes(), b"[]"].concat(), &[fd]);
    assert!(matches!(more, HandshakeError::Layout(_)), "{more}");
    let long = said(&[b"[".as_slice(), &[b' '; 70_000]].concat(), &[fd]);
    assert!(matches!(long, HandshakeError::TooLong { .. }), "{long}");
    let silent = refusal(&saved, |socket| drop(send(socket, b"[{", &[fd]).expect("send")));
    assert!(matches!(silent, HandshakeError::HungUp { received: 2 }), "{silent}");
}

/// The stream may cut the message anywhere.
#[test]
fn a_message_in_pieces_is_one_message() {
    let saved = Saved::new(64);
    let (server, _failures) = saved.serve(limits(1, 1), None);
    let memory = GuardedMemory::new(64 * PAGE, false).expect("guard some memory");
    let told = regions(&memory, 4096);
    let (head, tail) = told.as_bytes().split_at(20);
    let mut stream = send(server.socket(), head, &[memory.userfault()]).expect("send");
    for byte in tail {
        stream.write_all(&[*byte]).expect("send a byte");
    }
    assert!(memory.page(18 * PAGE) == content(18));
    assert_no_failure(&server);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever comes with a real descriptor: the server answers with a reason, or serves what it was told.
    #[test]
    fn no_message_does_harm(
        bytes in prop::collection::vec(any::<u8>(), 0..200),
        cut in 0_usize..120,
        flip in prop::option::of((0_usize..120, any::<u8>())),
        own in any::<bool>(),
    ) {
        let saved = Saved::new(4);
        let (server, failures) = saved.serve(PageServerLimits::default(), None);
        let memory = GuardedMemory::new(4 * PAGE, false).expect("guard some memory");
        let mut message = if own { bytes } else { regions(&memory, 4096).into_bytes() };
        if let Some((at, value)) = flip.filter(|(at, _)| *at < message.len()) {
            message[at] = value;
        }
        message.truncate(message.len().min(cut + 1).max(1));
        message.resize(message.len().max(1), b' ');
        drop(send(server.socket(), &message, &[memory.userfault()]).expect("send"));
        // It hung up, so the server ends by itself whatever it thinks of the message.
        let failure = failures.recv_timeout(LIMIT);
        prop_assert!(!matches!(failure.as_deref(), Ok(PageServeError::Panicked)));
        server.close().expect("close it");
    }
}
