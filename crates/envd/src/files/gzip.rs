//! Streams of bytes through gzip, with bounded memory in both directions.

use std::io::{self, Write as _};

use bytes::Bytes;
use flate2::Compression;
use flate2::write::{GzEncoder, MultiGzDecoder};
use futures::stream::{self, Stream, StreamExt as _};

/// Compressed bytes decoded at once. The format expands at most about 1030 times, so this bounds
/// what one step can produce to some 130 KiB.
const DECODE_STEP_BYTES: usize = 128;

/// A piece is passed on when it has grown to this, or nothing more has come.
const DECODED_PIECE_BYTES: usize = 64 * 1024;

type Items = std::pin::Pin<Box<dyn Stream<Item = io::Result<Bytes>> + Send>>;

/// Decodes a gzip stream. Ends with an error when it is damaged or cut off.
pub(super) fn decode(input: Items) -> Items {
    struct Decoding {
        input: Items,
        pending: Bytes,
        decoder: Option<MultiGzDecoder<Vec<u8>>>,
    }
    let start =
        Decoding { input, pending: Bytes::new(), decoder: Some(MultiGzDecoder::new(Vec::new())) };
    let items = stream::try_unfold(start, |mut state| async move {
        loop {
            let Some(decoder) = &mut state.decoder else { return Ok(None) };
            if state.pending.is_empty() {
                match state.input.next().await {
                    Some(more) => state.pending = more?,
                    None => {
                        let rest = state.decoder.take().expect("checked above").finish()?;
                        return Ok((!rest.is_empty()).then(|| (Bytes::from(rest), state)));
                    }
                }
            }
            while !state.pending.is_empty() && decoder.get_ref().len() < DECODED_PIECE_BYTES {
                let step = state.pending.split_to(state.pending.len().min(DECODE_STEP_BYTES));
                decoder.write_all(&step)?;
            }
            let decoded = std::mem::take(decoder.get_mut());
            if !decoded.is_empty() {
                return Ok(Some((Bytes::from(decoded), state)));
            }
        }
    });
    Box::pin(items)
}

/// Encodes a stream with the fastest setting.
pub(super) fn encode(input: Items) -> Items {
    let start = (input, Some(GzEncoder::new(Vec::new(), Compression::fast())));
    let items = stream::try_unfold(start, |(mut input, mut encoder)| async move {
        loop {
            let Some(open) = &mut encoder else { return Ok(None) };
            match input.next().await {
                Some(piece) => {
                    open.write_all(&piece?)?;
                    let encoded = std::mem::take(open.get_mut());
                    if !encoded.is_empty() {
                        return Ok(Some((Bytes::from(encoded), (input, encoder))));
                    }
                }
                None => {
                    let rest = encoder.take().expect("checked above").finish()?;
                    return Ok(Some((Bytes::from(rest), (input, None))));
                }
            }
        }
    });
    Box::pin(items)
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::stream::TryStreamExt as _;

    fn pieces(bytes: &[u8], size: usize) -> Items {
        let pieces: Vec<_> =
            bytes.chunks(size).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect();
        Box::pin(stream::iter(pieces))
    }

    async fn collect(items: Items) -> io::Result<Vec<u8>> {
        items
            .try_fold(Vec::new(), |mut all, piece| async move {
                all.extend_from_slice(&piece);
                Ok(all)
            })
            .await
    }

    #[tokio::test]
    async fn what_is_encoded_decodes_to_itself() {
        for length in [0, 1, 5_000, 300_000] {
            let text: Vec<u8> = (0..length).map(|i: usize| (i * i / 7) as u8).collect();
            let encoded = collect(encode(pieces(&text, 1000))).await.expect("encodes");
            let decoded = collect(decode(pieces(&encoded, 77))).await.expect("decodes");
            assert_eq!(decoded, text);
        }
    }

    #[tokio::test]
    async fn a_damaged_or_cut_stream_is_an_error() {
        let encoded = collect(encode(pieces(&[7; 100_000], 1000))).await.expect("encodes");
        let cut = encoded.get(..encoded.len() - 9).expect("long enough");
        assert!(collect(decode(pieces(cut, 50))).await.is_err());
        assert!(collect(decode(pieces(b"plainly no gzip", 4))).await.is_err());
    }

    #[test]
    fn any_bytes_decode_in_bounded_steps() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        crate::fuzz::run("gzip", &["\x1F\x08"], |input| {
            let (mut steps, mut length) = (0, 0);
            let last = runtime.block_on(async {
                let mut items = decode(pieces(input, 700));
                loop {
                    match items.next().await {
                        None => return Ok(()),
                        Some(Err(error)) => return Err(error.kind()),
                        Some(Ok(piece)) => {
                            let most = DECODED_PIECE_BYTES + DECODE_STEP_BYTES * 1100;
                            assert!(piece.len() <= most, "{}", piece.len());
                            length += piece.len();
                            steps += 1;
                        }
                    }
                }
            });
            crate::fuzz::outcome((last.is_ok(), steps, length.checked_ilog2()))
        });
    }
}
