//! Counts the output bytes in a process's event stream without copying or decoding them.

/// How messages are encoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// Binary protobuf.
    Proto,
    /// JSON; bytes are base64.
    Json,
}

impl Codec {
    /// Content type of a Connect stream of it.
    pub(super) fn content_type(self) -> &'static str {
        match self {
            Codec::Proto => "application/connect+proto",
            Codec::Json => "application/connect+json",
        }
    }
}

/// Bytes kept of each message's start: all that comes before the payload.
const KEPT_BYTES: usize = 64;

const JSON_BEFORE: &[u8] = br#"{"event":{"data":{"stdout":""#;
const JSON_BEHIND: &[u8] = br#""}}}"#;

/// A reader of a stream's bytes, in whatever pieces they come.
pub(super) struct Counter {
    codec: Codec,
    header: Vec<u8>,
    /// Bytes of the current message still to come; meaningless while `header` is not whole.
    left: usize,
    first: Vec<u8>,
    last: [u8; 6],
    length: usize,
    /// Payload bytes of standard output so far.
    pub(super) payload_bytes: u64,
    /// Messages so far.
    pub(super) messages: u64,
    /// The end-of-stream message, once it came.
    pub(super) end: Option<String>,
}

impl Counter {
    pub(super) fn new(codec: Codec) -> Counter {
        Counter {
            codec,
            header: Vec::with_capacity(5),
            left: 0,
            first: Vec::with_capacity(KEPT_BYTES),
            last: [0; 6],
            length: 0,
            payload_bytes: 0,
            messages: 0,
            end: None,
        }
    }

    /// Takes the next bytes of the stream.
    pub(super) fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.header.len() < 5 {
                let (head, rest) = bytes.split_at(bytes.len().min(5 - self.header.len()));
                self.header.extend_from_slice(head);
                bytes = rest;
                if self.header.len() < 5 {
                    return;
                }
                let length = self.header[1..].try_into().map_or(0, u32::from_be_bytes);
                self.length = usize::try_from(length).unwrap_or(usize::MAX);
                self.left = self.length;
                self.first.clear();
            }
            let (piece, rest) = bytes.split_at(bytes.len().min(self.left));
            bytes = rest;
            let room = KEPT_BYTES - self.first.len();
            self.first.extend_from_slice(&piece[..piece.len().min(room)]);
            self.keep_last(piece);
            self.left -= piece.len();
            if self.left == 0 {
                self.finish();
            }
        }
    }

    fn keep_last(&mut self, piece: &[u8]) {
        let fresh = &piece[piece.len().saturating_sub(self.last.len())..];
        self.last.rotate_left(fresh.len());
        let at = self.last.len() - fresh.len();
        self.last[at..].copy_from_slice(fresh);
    }

    fn finish(&mut self) {
        let is_end = self.header[0] & 2 != 0;
        self.header.clear();
        if is_end {
            self.end = Some(String::from_utf8_lossy(&self.first).into_owned());
            return;
        }
        self.messages += 1;
        let payload = match self.codec {
            Codec::Proto => proto_payload(&self.first),
            Codec::Json => json_payload(&self.first, &self.last, self.length),
        };
        self.payload_bytes += payload.unwrap_or(0) as u64;
    }
}

/// `StartResponse { event = 1 { data = 2 { stdout = 1: bytes } } }`.
fn proto_payload(first: &[u8]) -> Option<usize> {
    let (_, rest) = field(first, 0x0a)?;
    let (_, rest) = field(rest, 0x12)?;
    Some(field(rest, 0x0a)?.0)
}

/// Length of a field with that tag, and what comes behind the length.
fn field(bytes: &[u8], tag: u8) -> Option<(usize, &[u8])> {
    let (first, mut rest) = bytes.split_first()?;
    if *first != tag {
        return None;
    }
    let (mut length, mut shift) = (0_usize, 0);
    loop {
        let (byte, behind) = rest.split_first()?;
        length |= usize::from(byte & 0x7f) << shift;
        rest = behind;
        shift += 7;
        if byte & 0x80 == 0 {
            return Some((length, rest));
        }
    }
}

fn json_payload(first: &[u8], last: &[u8], length: usize) -> Option<usize> {
    if !first.starts_with(JSON_BEFORE) {
        return None;
    }
    let text = length.checked_sub(JSON_BEFORE.len() + JSON_BEHIND.len())?;
    let padding = last[..2].iter().filter(|byte| **byte == b'=').count();
    (text / 4 * 3).checked_sub(padding)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn envelope(flags: u8, body: &[u8]) -> Vec<u8> {
        let length = u32::try_from(body.len()).unwrap();
        [&[flags][..], &length.to_be_bytes(), body].concat()
    }

    fn count(codec: Codec, stream: &[u8], piece: usize) -> (u64, u64, Option<String>) {
        let mut counter = Counter::new(codec);
        stream.chunks(piece).for_each(|piece| counter.take(piece));
        (counter.payload_bytes, counter.messages, counter.end)
    }

    #[test]
    fn payloads_are_counted_however_the_stream_is_cut() {
        let json = [
            envelope(0, br#"{"event":{"start":{"pid":7}}}"#),
            envelope(0, br#"{"event":{"data":{"stdout":"QUJDRA=="}}}"#),
            envelope(0, br#"{"event":{"data":{"stdout":"QUJD"}}}"#),
            envelope(2, b"{}"),
        ]
        .concat();
        let mut data = vec![0x0a, 0xce, 0x01, 0x12, 0xcb, 0x01, 0x0a, 0xc8, 0x01];
        data.extend_from_slice(&[9; 200]);
        let proto =
            [envelope(0, &[0x0a, 2, 0x0a, 0]), envelope(0, &data), envelope(2, b"{}")].concat();
        for piece in [1, 3, 7, 1000] {
            let end = Some("{}".to_owned());
            assert_eq!(count(Codec::Json, &json, piece), (7, 3, end.clone()));
            assert_eq!(count(Codec::Proto, &proto, piece), (200, 2, end));
        }
    }
}
