//! The event stream of one process: what subscribers get, as wire messages.
//!
//! Output is nearly all that ever passes here, so its message is written straight from the piece
//! that was read: no generated message in between, base64 in one pass, and in the binary form the
//! piece itself travels on uncopied.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use belljar_wire::rpc::process::process_event::{EndEvent, Event, KeepAlive, StartEvent};
use belljar_wire::rpc::process::{ConnectResponse, ProcessEvent, StartResponse};
use bytes::Bytes;
use connectrpc::{CodecFormat, ConnectError, Encodable, EncodedBody};
use futures::stream::{self, Stream, StreamExt as _};

use super::output::{End, Next, Output, Subscription};

/// One message of an event stream, `StartResponse` and `ConnectResponse` alike: both are an event
/// in field 1.
#[derive(Debug)]
pub(crate) struct Message(Kind);

#[derive(Debug)]
enum Kind {
    Output(Output),
    /// Anything else.
    Event(ProcessEvent),
}

/// The events of one stream: the start, then what the subscription yields, until the end.
pub(super) fn events(
    pid: u32,
    subscription: Subscription,
    keepalive: Duration,
) -> impl Stream<Item = Message> + Send + 'static {
    let start = event(StartEvent { pid, ..StartEvent::default() });
    let rest = stream::unfold(subscription, move |mut subscription| async move {
        let next = match subscription.next(keepalive).await {
            Next::Output(output) => Message(Kind::Output(output)),
            Next::Silence => event(KeepAlive::default()),
            Next::End(end) => event(end_event(end)),
            Next::Closed => return None,
        };
        Some((next, subscription))
    });
    stream::once(std::future::ready(start)).chain(rest)
}

/// Whether this is the end of a process that its caller's deadline killed. The caller hears of the
/// deadline instead of the kill: clients tell "took too long" from "failed" by it. Others who
/// listen see the plain end.
pub(super) fn is_overdue(message: &Message, deadline: Option<Instant>) -> bool {
    let Kind::Event(ProcessEvent { event: Some(Event::End(end)), .. }) = &message.0 else {
        return false;
    };
    !end.exited && deadline.is_some_and(|at| Instant::now() >= at)
}

fn event(event: impl Into<Event>) -> Message {
    Message(Kind::Event(ProcessEvent { event: Some(event.into()), ..ProcessEvent::default() }))
}

fn end_event(end: End) -> EndEvent {
    let End { exit_code, exited, status, error } = end;
    EndEvent { exit_code, exited, status, error, ..EndEvent::default() }
}

impl Encodable<StartResponse> for Message {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        Ok(Encodable::<StartResponse>::encode_segments(self, codec)?.into_contiguous())
    }

    fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        match &self.0 {
            Kind::Output(output) => encode_output(output, codec),
            Kind::Event(event) => {
                let event = Some(event.clone()).into();
                StartResponse { event, ..StartResponse::default() }.encode_segments(codec)
            }
        }
    }
}

impl Encodable<ConnectResponse> for Message {
    fn encode(&self, codec: CodecFormat) -> Result<Bytes, ConnectError> {
        Ok(Encodable::<ConnectResponse>::encode_segments(self, codec)?.into_contiguous())
    }

    fn encode_segments(&self, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
        match &self.0 {
            Kind::Output(output) => encode_output(output, codec),
            Kind::Event(event) => {
                let event = Some(event.clone()).into();
                ConnectResponse { event, ..ConnectResponse::default() }.encode_segments(codec)
            }
        }
    }
}

/// `{ event = 1: { data = 2: { stdout = 1 | stderr = 2 | pty = 3: bytes } } }`.
fn encode_output(output: &Output, codec: CodecFormat) -> Result<EncodedBody, ConnectError> {
    let (name, tag, bytes) = match output {
        Output::Stdout(bytes) => ("stdout", 0x0a, bytes),
        Output::Stderr(bytes) => ("stderr", 0x12, bytes),
        Output::Terminal(bytes) => ("pty", 0x1a, bytes),
    };
    match codec {
        CodecFormat::Json => Ok(Bytes::from(json(name, bytes)).into()),
        CodecFormat::Proto => {
            let data_bytes = 1 + varint_bytes(bytes.len()) + bytes.len();
            let event_bytes = 1 + varint_bytes(data_bytes) + data_bytes;
            let mut head = Vec::with_capacity(3 * (1 + varint_bytes(event_bytes)));
            for (tag, length) in [(0x0a, event_bytes), (0x12, data_bytes), (tag, bytes.len())] {
                head.push(tag);
                push_varint(&mut head, length);
            }
            Ok(EncodedBody::from_segments(vec![head.into(), bytes.clone()]))
        }
        other => Err(ConnectError::unimplemented(format!("output has no {other} form"))),
    }
}

fn json(name: &str, bytes: &[u8]) -> Vec<u8> {
    let before = [r#"{"event":{"data":{""#, name, r#"":""#];
    let behind = br#""}}}"#;
    let at: usize = before.iter().map(|text| text.len()).sum();
    let text_bytes = base64::encoded_len(bytes.len(), true).expect("a piece is of some kilobytes");
    let mut json = Vec::with_capacity(at + text_bytes + behind.len());
    before.iter().for_each(|text| json.extend_from_slice(text.as_bytes()));
    json.resize(at + text_bytes, 0);
    STANDARD.encode_slice(bytes, &mut json[at..]).expect("the room was measured for it");
    json.extend_from_slice(behind);
    json
}

/// Bytes of a length as a protobuf varint.
fn varint_bytes(length: usize) -> usize {
    let bits = usize::BITS - (length | 1).leading_zeros();
    bits.div_ceil(7) as usize
}

fn push_varint(to: &mut Vec<u8>, mut length: usize) {
    while length >= 0x80 {
        to.push((length & 0x7f) as u8 | 0x80);
        length >>= 7;
    }
    to.push(length as u8);
}

#[cfg(test)]
mod tests {
    use super::*;
    use belljar_wire::rpc::process::process_event::DataEvent;
    use belljar_wire::rpc::process::process_event::data_event::Output as WireOutput;

    /// The same message by way of the generated types.
    fn generated(output: &Output) -> ProcessEvent {
        let output = match output {
            Output::Stdout(bytes) => WireOutput::Stdout(bytes.to_vec()),
            Output::Stderr(bytes) => WireOutput::Stderr(bytes.to_vec()),
            Output::Terminal(bytes) => WireOutput::Pty(bytes.to_vec()),
        };
        let data = DataEvent { output: Some(output), ..DataEvent::default() };
        ProcessEvent { event: Some(data.into()), ..ProcessEvent::default() }
    }

    #[test]
    fn output_is_written_byte_for_byte_as_the_generated_code_would() {
        for length in [1, 2, 3, 100, 127, 128, 129, 16_000, 16_383, 16_384, 32_768] {
            let bytes: Bytes = (0..length).map(|at| (at * 7 % 256) as u8).collect();
            for output in [
                Output::Stdout(bytes.clone()),
                Output::Stderr(bytes.clone()),
                Output::Terminal(bytes.clone()),
            ] {
                for codec in [CodecFormat::Proto, CodecFormat::Json] {
                    let event = Some(generated(&output)).into();
                    let expected = StartResponse { event, ..StartResponse::default() };
                    let expected: Bytes = expected.encode(codec).expect("encodes");
                    let message = Message(Kind::Output(output.clone()));
                    let start: Result<Bytes, _> =
                        Encodable::<StartResponse>::encode(&message, codec);
                    assert_eq!(start.expect("encodes"), expected, "{length} {codec}");
                    let connect: Result<Bytes, _> =
                        Encodable::<ConnectResponse>::encode(&message, codec);
                    assert_eq!(connect.expect("encodes"), expected, "{length} {codec}");
                }
            }
        }
    }
}
