//! What a form upload needs around its parser: names of files as clients write them, and a bound
//! on what the parser holds in memory.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use futures::stream::Stream;

/// Parts one form may have; a client with more files sends several forms.
pub(super) const PARTS_MAX: usize = 10_000;

/// Bytes between two parts, which are the head of the second: a path and a few words. One more
/// piece of the body may come on top.
const HEAD_MAX_BYTES: usize = 64 * 1024;

/// How much of a form's body its parser may still take before it says what it found.
#[derive(Debug, Clone, Default)]
pub(super) struct Allowance {
    taken: Arc<AtomicUsize>,
}

impl Allowance {
    /// The parser has found something: it may take as much again.
    pub(super) fn renew(&self) {
        self.taken.store(0, Ordering::Relaxed);
    }
}

/// A form's body. The parser takes all it can get before it looks at it, so it gets one piece at
/// a time, and an error in place of more than its allowance.
pub(super) struct Paced<S> {
    body: S,
    allowance: Allowance,
    given: bool,
}

impl<S> Paced<S> {
    pub(super) fn new(body: S, allowance: Allowance) -> Paced<S> {
        Paced { body, allowance, given: false }
    }
}

impl<S: Stream<Item = io::Result<Bytes>> + Unpin> Stream for Paced<S> {
    type Item = io::Result<Bytes>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if std::mem::take(&mut self.given) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let next = std::task::ready!(Pin::new(&mut self.body).poll_next(cx));
        if let Some(Ok(piece)) = &next {
            self.given = true;
            if self.allowance.taken.fetch_add(piece.len(), Ordering::Relaxed) > HEAD_MAX_BYTES {
                let message = format!("the head of a part has more than {HEAD_MAX_BYTES} bytes");
                return Poll::Ready(Some(Err(io::Error::new(io::ErrorKind::InvalidData, message))));
            }
        }
        Poll::Ready(next)
    }
}

/// The file name in a part's `Content-Disposition`.
///
/// A backslash stands for what follows it, where that is a backslash or a quote, as RFC 2616 has
/// it for quoted texts. Clients write a quote and control characters as `%22`, `%0A` and so on, as
/// the HTML standard says; other percent signs mean themselves.
pub(super) fn file_name(disposition: &[u8]) -> Option<String> {
    let mut rest = disposition;
    loop {
        let at = rest.iter().position(|byte| *byte == b';')?;
        rest = rest.get(at + 1..)?.trim_ascii_start();
        let equals = rest.iter().position(|byte| matches!(byte, b'=' | b';'))?;
        let name = rest.get(..equals)?.trim_ascii();
        if rest.get(equals) == Some(&b';') {
            rest = rest.get(equals..)?;
            continue;
        }
        let (value, behind) = value(rest.get(equals + 1..)?.trim_ascii_start())?;
        if name.eq_ignore_ascii_case(b"filename") {
            return String::from_utf8(unescape(&value)).ok();
        }
        rest = behind;
    }
}

/// A parameter's value and what is behind it.
fn value(text: &[u8]) -> Option<(Vec<u8>, &[u8])> {
    let Some(quoted) = text.strip_prefix(b"\"") else {
        let end = text.iter().position(|byte| *byte == b';').unwrap_or(text.len());
        return Some((text.get(..end)?.trim_ascii().to_vec(), text.get(end..)?));
    };
    let mut value = Vec::new();
    let mut bytes = quoted.iter().enumerate();
    while let Some((at, byte)) = bytes.next() {
        match (byte, quoted.get(at + 1)) {
            (b'"', _) => return Some((value, quoted.get(at + 1..)?)),
            (b'\\', Some(next @ (b'\\' | b'"'))) => {
                value.push(*next);
                bytes.next();
            }
            _ => value.push(*byte),
        }
    }
    None
}

fn unescape(value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value;
    while let Some((first, behind)) = rest.split_first() {
        let escaped = match behind {
            [high, low, ..] if *first == b'%' => hex(*high).zip(hex(*low)).map(|(h, l)| h * 16 + l),
            _ => None,
        };
        match escaped {
            Some(byte @ (b'"' | 0x00..=0x1F)) => {
                out.push(byte);
                rest = behind.get(2..).unwrap_or_default();
            }
            _ => {
                out.push(*first);
                rest = behind;
            }
        }
    }
    out
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::StreamExt as _;

    #[test]
    fn names_are_read_as_clients_write_them() {
        for (text, expected) in [
            (r#"form-data; name="file"; filename="/x/a b.txt""#, Some("/x/a b.txt")),
            (r#"form-data; name="file"; filename="/x/back\\slash""#, Some(r"/x/back\slash")),
            (r#"form-data; name="file"; filename="C:\dir\f""#, Some(r"C:\dir\f")),
            (r#"form-data; filename="say \"hi\"""#, Some(r#"say "hi""#)),
            (r#"form-data; filename="say %22hi%22""#, Some(r#"say "hi""#)),
            (r#"form-data; filename="100%25 %41%zz%""#, Some("100%25 %41%zz%")),
            ("form-data; filename=plain ; name=file", Some("plain")),
            ("form-data; FileName = \"x;y=z\"", Some("x;y=z")),
            ("form-data; filename=\"\u{e9}\u{1F980}\"", Some("\u{e9}\u{1F980}")),
            (r#"form-data; name="filename=x""#, None),
            (r#"form-data; flag; filename="f""#, Some("f")),
            (r#"form-data; filename="open"#, None),
            ("form-data", None),
            ("", None),
        ] {
            assert_eq!(file_name(text.as_bytes()).as_deref(), expected, "{text}");
        }
        assert_eq!(file_name(b"form-data; filename=\"\xFF\""), None);
    }

    #[tokio::test]
    async fn a_parser_gets_no_more_than_its_allowance() {
        let pieces = (0..100).map(|_| Ok(Bytes::from_static(&[7; 1024])));
        let allowance = Allowance::default();
        let mut body = Paced::new(futures::stream::iter(pieces), allowance.clone());
        for _ in 0..65 {
            assert!(body.next().await.expect("more").is_ok());
        }
        assert!(body.next().await.expect("an error").is_err());
        allowance.renew();
        assert!(body.next().await.expect("more").is_ok());
    }

    #[test]
    fn any_name_survives_how_clients_write_it() {
        crate::fuzz::run("form_name", &["filename=", "\"", "%22", "\\", "; "], |input| {
            let found = file_name(input);
            // As browsers and the SDKs' libraries write it, but for what looks escaped already.
            let name = String::from_utf8_lossy(input).replace('%', "").replace('\\', "\\\\");
            let escaped: String = name.chars().fold(String::new(), |mut text, char| {
                match char {
                    '"' => text.push_str("%22"),
                    '\0'..='\x1F' => text.push_str(&format!("%{:02X}", u32::from(char))),
                    other => text.push(other),
                }
                text
            });
            let written = format!("form-data; name=\"file\"; filename=\"{escaped}\"");
            let name = name.replace("\\\\", "\\");
            assert_eq!(file_name(written.as_bytes()).as_deref(), Some(name.as_str()));
            crate::fuzz::outcome(found.map(|name| name.len().min(40)))
        });
    }
}
