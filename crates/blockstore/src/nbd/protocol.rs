//! Bytes of the NBD protocol. All numbers are big-endian. Source: the NBD protocol document.

/// `NBDMAGIC`, the server's first words.
pub(super) const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, before the server's flags and every option.
pub(super) const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;

/// Handshake flags, the same bits from both sides: fixed newstyle, and no 124 zeros after the
/// answer to `EXPORT_NAME`.
pub(super) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(super) const FLAG_NO_ZEROES: u16 = 1 << 1;

/// What the export can do: has flags, FLUSH, FUA, TRIM, WRITE_ZEROES, several connections. The last
/// is true because every connection works on one file through one page cache.
pub(super) const TRANSMISSION_FLAGS: u16 = 1 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 8;

/// Block sizes told to clients: unaligned requests are fine but cost a read-modify-write.
pub(super) const BLOCK_MIN_BYTES: u32 = 1;
pub(super) const BLOCK_PREFERRED_BYTES: u32 = 4096;
/// Longest READ or WRITE, and longest block size told; the limit every client assumes by default.
pub(super) const REQUEST_MAX_BYTES: u32 = 32 << 20;

/// Longest option data accepted: a name is at most 4096 bytes by the protocol.
pub(super) const OPTION_MAX_BYTES: u32 = 4096;
/// Longest option data skipped to answer "too big" instead of hanging up.
pub(super) const OPTION_SKIP_BYTES: u32 = 64 * 1024;
/// Options a client may send before it must start: real clients send under ten.
pub(super) const OPTIONS_MAX: u32 = 64;

pub(super) const REQUEST_BYTES: usize = 28;
pub(super) const REPLY_BYTES: usize = 16;
pub(super) const OPTION_HEADER_BYTES: usize = 16;

/// Option replies.
pub(super) mod reply {
    pub(in crate::nbd) const ACK: u32 = 1;
    pub(in crate::nbd) const SERVER: u32 = 2;
    pub(in crate::nbd) const INFO: u32 = 3;
    pub(in crate::nbd) const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub(in crate::nbd) const ERR_INVALID: u32 = 1 << 31 | 3;
    pub(in crate::nbd) const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub(in crate::nbd) const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Kinds of information in an INFO reply.
pub(super) const INFO_EXPORT: u16 = 0;
pub(super) const INFO_NAME: u16 = 1;
pub(super) const INFO_BLOCK_SIZE: u16 = 3;

/// Error numbers of replies.
pub(super) mod errno {
    pub(in crate::nbd) const EIO: u32 = 5;
    pub(in crate::nbd) const EINVAL: u32 = 22;
    pub(in crate::nbd) const ENOSPC: u32 = 28;
}

/// The peer does not speak the protocol; the connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Broken {
    #[error("read an NBD option: the magic number is wrong")]
    OptionMagic,
    #[error("read an NBD request: the magic number is wrong")]
    RequestMagic,
    #[error("read the NBD client's flags: {0:#x} has unknown bits")]
    ClientFlags(u32),
    #[error("skip an NBD option of {0} bytes, more than {OPTION_SKIP_BYTES}")]
    OptionTooLong(u32),
    #[error("answer more than {OPTIONS_MAX} NBD options on one connection")]
    TooManyOptions,
    #[error("export an NBD name other than the default one")]
    UnknownExport,
    #[error("take an NBD write of {0} bytes, more than {REQUEST_MAX_BYTES}")]
    WriteTooLong(u32),
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

/// A negotiation option this server knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OptionKind {
    ExportName,
    Abort,
    List,
    Info,
    Go,
    Unknown,
}

/// The fixed part of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct OptionHeader {
    pub(super) kind: OptionKind,
    /// As sent; echoed in replies.
    pub(super) number: u32,
    pub(super) len: u32,
}

impl OptionHeader {
    pub(super) fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<OptionHeader, Broken> {
        if u64_at(bytes, 0) != Some(OPTION_MAGIC) {
            return Err(Broken::OptionMagic);
        }
        let number = u32_at(bytes, 8).expect("the header has 16 bytes");
        let len = u32_at(bytes, 12).expect("the header has 16 bytes");
        let kind = match number {
            1 => OptionKind::ExportName,
            2 => OptionKind::Abort,
            3 => OptionKind::List,
            6 => OptionKind::Info,
            7 => OptionKind::Go,
            _ => OptionKind::Unknown,
        };
        Ok(OptionHeader { kind, number, len })
    }
}

/// Encodes one reply to an option.
pub(super) fn option_reply(number: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).expect("option replies are short");
    let mut bytes = Vec::with_capacity(20 + data.len());
    bytes.extend(OPTION_REPLY_MAGIC.to_be_bytes());
    bytes.extend(number.to_be_bytes());
    bytes.extend(kind.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes.extend(data);
    bytes
}

/// The data of `INFO` and `GO`: a name and the kinds of information asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InfoRequest<'a> {
    pub(super) name: &'a [u8],
    pub(super) wants_name: bool,
}

impl InfoRequest<'_> {
    /// `None` when the lengths inside do not add up.
    pub(super) fn parse(data: &[u8]) -> Option<InfoRequest<'_>> {
        let name_len = usize::try_from(u32_at(data, 0)?).ok()?;
        let (name, rest) = data.get(4..)?.split_at_checked(name_len)?;
        let count = usize::from(u16_at(rest, 0)?);
        let kinds = rest.get(2..)?;
        if kinds.len() != count * 2 {
            return None;
        }
        let wants_name = kinds.chunks_exact(2).any(|k| u16_at(k, 0) == Some(INFO_NAME));
        Some(InfoRequest { name, wants_name })
    }
}

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    Unknown,
}

/// One request. Nothing in it is to be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) command: Command,
    /// Data must be on stable storage before the reply.
    pub(super) fua: bool,
    /// Zeroes must be backed by space.
    pub(super) no_hole: bool,
    /// A flag this server did not offer is set.
    pub(super) unknown_flags: bool,
    pub(super) cookie: u64,
    pub(super) offset: u64,
    pub(super) len: u32,
}

impl Request {
    pub(super) fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Request, Broken> {
        const PROOF: &str = "a request has 28 bytes";
        const FUA: u16 = 1;
        const NO_HOLE: u16 = 1 << 1;
        if u32_at(bytes, 0) != Some(REQUEST_MAGIC) {
            return Err(Broken::RequestMagic);
        }
        let flags = u16_at(bytes, 4).expect(PROOF);
        let command = match u16_at(bytes, 6).expect(PROOF) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            _ => Command::Unknown,
        };
        let known = if command == Command::WriteZeroes { FUA | NO_HOLE } else { FUA };
        Ok(Request {
            command,
            fua: flags & FUA != 0,
            no_hole: flags & NO_HOLE != 0,
            unknown_flags: flags & !known != 0,
            cookie: u64_at(bytes, 8).expect(PROOF),
            offset: u64_at(bytes, 16).expect(PROOF),
            len: u32_at(bytes, 24).expect(PROOF),
        })
    }
}

/// The fixed part of a simple reply; data follows a READ that went well (`error` 0).
pub(super) fn simple_reply(error: u32, cookie: u64) -> [u8; REPLY_BYTES] {
    let mut bytes = [0; REPLY_BYTES];
    bytes[..4].copy_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    bytes[4..8].copy_from_slice(&error.to_be_bytes());
    bytes[8..].copy_from_slice(&cookie.to_be_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn any_bytes_parse_or_are_refused(
            option in any::<[u8; OPTION_HEADER_BYTES]>(),
            request in any::<[u8; REQUEST_BYTES]>(),
            data in proptest::collection::vec(any::<u8>(), 0..300),
        ) {
            let _ = OptionHeader::parse(&option);
            let _ = Request::parse(&request);
            if let Some(info) = InfoRequest::parse(&data) {
                prop_assert!(info.name.len() <= data.len());
            }
        }

        #[test]
        fn requests_keep_their_fields(
            flags in any::<u16>(), command in any::<u16>(), cookie in any::<u64>(),
            offset in any::<u64>(), len in any::<u32>(),
        ) {
            let mut bytes = [0; REQUEST_BYTES];
            bytes[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
            bytes[4..6].copy_from_slice(&flags.to_be_bytes());
            bytes[6..8].copy_from_slice(&command.to_be_bytes());
            bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
            bytes[16..24].copy_from_slice(&offset.to_be_bytes());
            bytes[24..].copy_from_slice(&len.to_be_bytes());
            let request = Request::parse(&bytes).expect("the magic is right");
            prop_assert_eq!((request.cookie, request.offset, request.len), (cookie, offset, len));
            prop_assert_eq!(request.fua, flags & 1 != 0);
        }

        #[test]
        fn info_requests_keep_their_fields(
            name in proptest::collection::vec(any::<u8>(), 0..50),
            kinds in proptest::collection::vec(any::<u16>(), 0..20),
        ) {
            let mut data = u32::try_from(name.len()).expect("short").to_be_bytes().to_vec();
            data.extend(&name);
            data.extend(u16::try_from(kinds.len()).expect("few").to_be_bytes());
            data.extend(kinds.iter().flat_map(|k| k.to_be_bytes()));
            let info = InfoRequest::parse(&data).expect("well formed");
            prop_assert_eq!(info.name, &name[..]);
            prop_assert_eq!(info.wants_name, kinds.contains(&INFO_NAME));
            data.push(0);
            prop_assert_eq!(InfoRequest::parse(&data), None);
        }
    }
}
