//! From the first byte to the start of transmission.

use std::io::{self, Read, Write};

use super::protocol::{
    BLOCK_MIN_BYTES, BLOCK_PREFERRED_BYTES, Broken, FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES,
    INFO_BLOCK_SIZE, INFO_EXPORT, INFO_NAME, INIT_MAGIC, InfoRequest, OPTION_HEADER_BYTES,
    OPTION_MAGIC, OPTION_MAX_BYTES, OPTION_SKIP_BYTES, OPTIONS_MAX, OptionHeader, OptionKind,
    REQUEST_MAX_BYTES, TRANSMISSION_FLAGS, option_reply, reply,
};
use super::transmission::SessionError;

/// What the client wants next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Requests follow.
    Transmission,
    /// It has left.
    Left,
}

/// Negotiates with one client. Bounded: at most [`OPTIONS_MAX`] options of [`OPTION_MAX_BYTES`].
pub(super) fn handshake<S: Read + Write>(
    stream: &mut S,
    size_bytes: u64,
) -> Result<Outcome, SessionError> {
    let mut hello = Vec::with_capacity(18);
    hello.extend(INIT_MAGIC.to_be_bytes());
    hello.extend(OPTION_MAGIC.to_be_bytes());
    hello.extend((FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES).to_be_bytes());
    stream.write_all(&hello)?;

    let mut flags = [0; 4];
    stream.read_exact(&mut flags)?;
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 {
        return Err(Broken::ClientFlags(flags).into());
    }
    let no_zeroes = flags & u32::from(FLAG_NO_ZEROES) != 0;

    for _ in 0..OPTIONS_MAX {
        let mut header = [0; OPTION_HEADER_BYTES];
        stream.read_exact(&mut header)?;
        let header = OptionHeader::parse(&header)?;
        let Some(data) = read_data(stream, header)? else { continue };
        match header.kind {
            OptionKind::ExportName => {
                // This option has no way to say no.
                if !data.is_empty() {
                    return Err(Broken::UnknownExport.into());
                }
                stream.write_all(&export_name_reply(size_bytes, no_zeroes))?;
                return Ok(Outcome::Transmission);
            }
            OptionKind::Abort => {
                stream.write_all(&option_reply(header.number, reply::ACK, &[]))?;
                return Ok(Outcome::Left);
            }
            OptionKind::List => stream.write_all(&list_reply(header, &data))?,
            OptionKind::Info | OptionKind::Go => {
                let (answer, accepted) = info_reply(header, &data, size_bytes);
                stream.write_all(&answer)?;
                if accepted && header.kind == OptionKind::Go {
                    return Ok(Outcome::Transmission);
                }
            }
            OptionKind::Unknown => {
                stream.write_all(&option_reply(header.number, reply::ERR_UNSUP, &[]))?;
            }
        }
    }
    Err(Broken::TooManyOptions.into())
}

/// The option's data; `None` when it was too long and has been answered.
fn read_data<S: Read + Write>(
    stream: &mut S,
    header: OptionHeader,
) -> Result<Option<Vec<u8>>, SessionError> {
    if header.len > OPTION_SKIP_BYTES {
        return Err(Broken::OptionTooLong(header.len).into());
    }
    if header.len > OPTION_MAX_BYTES {
        io::copy(&mut Read::by_ref(stream).take(u64::from(header.len)), &mut io::sink())?;
        stream.write_all(&option_reply(header.number, reply::ERR_TOO_BIG, &[]))?;
        return Ok(None);
    }
    let mut data = vec![0; usize::try_from(header.len).expect("at most 4096")];
    stream.read_exact(&mut data)?;
    Ok(Some(data))
}

fn export_name_reply(size_bytes: u64, no_zeroes: bool) -> Vec<u8> {
    let mut answer = size_bytes.to_be_bytes().to_vec();
    answer.extend(TRANSMISSION_FLAGS.to_be_bytes());
    if !no_zeroes {
        answer.extend([0; 124]);
    }
    answer
}

fn list_reply(header: OptionHeader, data: &[u8]) -> Vec<u8> {
    if !data.is_empty() {
        return option_reply(header.number, reply::ERR_INVALID, &[]);
    }
    // One export, whose name has no bytes.
    let mut answer = option_reply(header.number, reply::SERVER, &0_u32.to_be_bytes());
    answer.extend(option_reply(header.number, reply::ACK, &[]));
    answer
}

/// The answer to `INFO` or `GO`, and whether it grants what was asked.
fn info_reply(header: OptionHeader, data: &[u8], size_bytes: u64) -> (Vec<u8>, bool) {
    let Some(info) = InfoRequest::parse(data) else {
        return (option_reply(header.number, reply::ERR_INVALID, &[]), false);
    };
    if !info.name.is_empty() {
        return (option_reply(header.number, reply::ERR_UNKNOWN, &[]), false);
    }
    let mut export = INFO_EXPORT.to_be_bytes().to_vec();
    export.extend(size_bytes.to_be_bytes());
    export.extend(TRANSMISSION_FLAGS.to_be_bytes());
    let mut blocks = INFO_BLOCK_SIZE.to_be_bytes().to_vec();
    blocks.extend(BLOCK_MIN_BYTES.to_be_bytes());
    blocks.extend(BLOCK_PREFERRED_BYTES.to_be_bytes());
    blocks.extend(REQUEST_MAX_BYTES.to_be_bytes());

    let mut answer = option_reply(header.number, reply::INFO, &export);
    answer.extend(option_reply(header.number, reply::INFO, &blocks));
    if info.wants_name {
        answer.extend(option_reply(header.number, reply::INFO, &INFO_NAME.to_be_bytes()));
    }
    answer.extend(option_reply(header.number, reply::ACK, &[]));
    (answer, true)
}
