//! Requests, one after the other, until the client leaves.

use std::io::{self, Read, Write};

use super::handshake::{Outcome, handshake};
use super::protocol::{
    Broken, Command, REPLY_BYTES, REQUEST_BYTES, REQUEST_MAX_BYTES, Request, errno, simple_reply,
};
use crate::device::{BlockDevice, index};

/// A buffer no longer than this is kept from request to request; guests rarely send more.
const KEPT_BUFFER_BYTES: usize = 1 << 20;
/// Writes are taken from the socket in pieces of this size, so a write needs no larger buffer.
const WRITE_PIECE_BYTES: usize = 256 << 10;

/// Why a connection ended other than by its client leaving.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    #[error(transparent)]
    Broken(#[from] Broken),
    #[error("move bytes on an NBD connection")]
    Io(#[from] io::Error),
}

/// Serves one client from its first byte to its last. `handshaken` runs between negotiation and
/// transmission: the socket's handshake deadline ends there.
pub(super) fn serve<S: Read + Write>(
    stream: &mut S,
    device: &dyn BlockDevice,
    handshaken: impl FnOnce(&mut S) -> io::Result<()>,
) -> Result<(), SessionError> {
    match handshake(stream, device.size_bytes())? {
        Outcome::Left => Ok(()),
        Outcome::Transmission => {
            handshaken(stream)?;
            transmission(stream, device)
        }
    }
}

fn transmission<S: Read + Write>(
    stream: &mut S,
    device: &dyn BlockDevice,
) -> Result<(), SessionError> {
    let mut buf = Vec::new();
    loop {
        let mut header = [0; REQUEST_BYTES];
        if !read_header(stream, &mut header)? {
            return Ok(());
        }
        let request = Request::parse(&header)?;
        match request.command {
            Command::Disconnect => return Ok(()),
            Command::Read => read(stream, device, request, &mut buf)?,
            Command::Write => {
                let error = write(stream, device, request, &mut buf)?;
                stream.write_all(&simple_reply(error, request.cookie))?;
            }
            Command::Flush | Command::Trim | Command::WriteZeroes | Command::Unknown => {
                let error = without_data(device, request);
                stream.write_all(&simple_reply(error, request.cookie))?;
            }
        }
        if buf.len() > KEPT_BUFFER_BYTES {
            buf = Vec::new();
        }
    }
}

/// Reads a request's header. False when the client hung up between requests.
fn read_header<S: Read>(stream: &mut S, header: &mut [u8; REQUEST_BYTES]) -> io::Result<bool> {
    let first = loop {
        match stream.read(header) {
            Ok(n) => break n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    };
    if first == 0 {
        return Ok(false);
    }
    stream.read_exact(&mut header[first..])?;
    Ok(true)
}

/// The first `len` bytes of `buf`, grown when it is shorter.
fn room(buf: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buf.len() < len {
        buf.resize(len, 0);
    }
    &mut buf[..len]
}

fn read<S: Write>(
    stream: &mut S,
    device: &dyn BlockDevice,
    request: Request,
    buf: &mut Vec<u8>,
) -> Result<(), SessionError> {
    // Checked before the buffer grows: a hostile length costs nothing.
    let fits = request.len <= REQUEST_MAX_BYTES && in_range(device, request);
    let outcome = if !fits || request.unknown_flags {
        Err(errno::EINVAL)
    } else {
        let reply = room(buf, REPLY_BYTES + index(u64::from(request.len)));
        device
            .read_at(&mut reply[REPLY_BYTES..], request.offset)
            .map(|()| reply)
            .map_err(|e| error_number(&e))
    };
    match outcome {
        Ok(reply) => {
            // Header and data in one write: one wake-up of the client.
            reply[..REPLY_BYTES].copy_from_slice(&simple_reply(0, request.cookie));
            stream.write_all(reply)?;
        }
        Err(error) => stream.write_all(&simple_reply(error, request.cookie))?,
    }
    Ok(())
}

/// Takes the data off the socket and writes it; the outer error ends the connection, the inner
/// number (0 for none) is the reply.
fn write<S: Read>(
    stream: &mut S,
    device: &dyn BlockDevice,
    request: Request,
    buf: &mut Vec<u8>,
) -> Result<u32, SessionError> {
    if request.len > REQUEST_MAX_BYTES {
        // Its data cannot be told from the next request without reading up to 4 GiB of it.
        return Err(Broken::WriteTooLong(request.len).into());
    }
    let mut error = if request.unknown_flags {
        errno::EINVAL
    } else if in_range(device, request) {
        0
    } else {
        errno::ENOSPC
    };
    let mut left = index(u64::from(request.len));
    let mut offset = request.offset;
    while left > 0 {
        let piece = room(buf, left.min(WRITE_PIECE_BYTES));
        stream.read_exact(piece)?;
        if error == 0 {
            error = device.write_at(piece, offset).err().map_or(0, |e| error_number(&e));
        }
        left -= piece.len();
        offset = offset.saturating_add(crate::device::len_u64(piece));
    }
    if error == 0 && request.fua {
        error = device.flush().err().map_or(0, |e| error_number(&e));
    }
    Ok(error)
}

/// Does a request that carries no data and answers none. The number is the reply's error.
fn without_data(device: &dyn BlockDevice, request: Request) -> u32 {
    if request.unknown_flags {
        return errno::EINVAL;
    }
    let len = u64::from(request.len);
    let done = match request.command {
        Command::Flush => device.flush(),
        Command::Trim if !in_range(device, request) => return errno::EINVAL,
        Command::WriteZeroes if !in_range(device, request) => return errno::ENOSPC,
        Command::Trim => device.trim(request.offset, len),
        Command::WriteZeroes if request.no_hole => device.zero_allocated(request.offset, len),
        Command::WriteZeroes => device.zero(request.offset, len),
        Command::Read | Command::Write | Command::Disconnect | Command::Unknown => {
            return errno::EINVAL;
        }
    };
    let done = done.and_then(|()| if request.fua { device.flush() } else { Ok(()) });
    done.err().map_or(0, |e| error_number(&e))
}

fn in_range(device: &dyn BlockDevice, request: Request) -> bool {
    let end = request.offset.checked_add(u64::from(request.len));
    end.is_some_and(|end| end <= device.size_bytes())
}

fn error_number(e: &io::Error) -> u32 {
    match e.kind() {
        io::ErrorKind::InvalidInput => errno::EINVAL,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::FileTooLarge => {
            errno::ENOSPC
        }
        _ => errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::RawImage;
    use proptest::prelude::*;

    const SIZE: usize = 64 * 1024;

    /// A client that has already said everything.
    struct Script {
        input: io::Cursor<Vec<u8>>,
        output: Vec<u8>,
    }

    impl Read for Script {
        fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
            self.input.read(buf)
        }
    }

    impl Write for Script {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            self.output.write(buf)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn disk() -> (tempfile::TempDir, RawImage) {
        let dir = tempfile::tempdir().expect("temp folder");
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![0x5a; SIZE]).expect("write");
        let disk = RawImage::open(&path).expect("open");
        (dir, disk)
    }

    fn run(disk: &RawImage, input: Vec<u8>) -> (Vec<u8>, Result<(), SessionError>) {
        let mut script = Script { input: io::Cursor::new(input), output: Vec::new() };
        let outcome = serve(&mut script, disk, |_| Ok(()));
        (script.output, outcome)
    }

    fn option(number: u32, data: &[u8]) -> Vec<u8> {
        let mut bytes = 0x4948_4156_454f_5054_u64.to_be_bytes().to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).expect("short").to_be_bytes());
        bytes.extend(data);
        bytes
    }

    /// Flags and `EXPORT_NAME`, the shortest way in. The server's answers take 28 bytes.
    fn start() -> Vec<u8> {
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        bytes.extend(option(1, &[]));
        bytes
    }
    const START_REPLY_BYTES: usize = 18 + 10;

    fn request(flags: u16, command: u16, offset: u64, len: u32) -> Vec<u8> {
        let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
        bytes.extend(flags.to_be_bytes());
        bytes.extend(command.to_be_bytes());
        bytes.extend(7_u64.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes
    }

    /// The error number of the only reply after [`start`].
    fn answer(disk: &RawImage, request: Vec<u8>) -> u32 {
        let (output, outcome) = run(disk, [start(), request].concat());
        outcome.expect("the connection goes on");
        let reply = &output[START_REPLY_BYTES..];
        assert_eq!(reply[8..16], 7_u64.to_be_bytes());
        u32::from_be_bytes(reply[4..8].try_into().expect("four bytes"))
    }

    #[test]
    fn requests_outside_the_disk_get_an_error_each() {
        let (_dir, disk) = disk();
        let end = u64::try_from(SIZE).expect("small");
        assert_eq!(answer(&disk, request(0, 0, end, 1)), errno::EINVAL);
        assert_eq!(answer(&disk, request(0, 0, u64::MAX, u32::MAX)), errno::EINVAL);
        assert_eq!(answer(&disk, [request(0, 1, end, 2), vec![1, 2]].concat()), errno::ENOSPC);
        assert_eq!(answer(&disk, request(0, 4, 0, u32::MAX)), errno::EINVAL);
        assert_eq!(answer(&disk, request(0, 6, u64::MAX, 5)), errno::ENOSPC);
        assert_eq!(answer(&disk, request(0, 99, 0, 0)), errno::EINVAL);
        assert_eq!(answer(&disk, request(1 << 4, 6, 0, 1)), errno::EINVAL);
        assert_eq!(answer(&disk, request(1 << 1, 0, 0, 1)), errno::EINVAL);
    }

    #[test]
    fn a_write_the_server_cannot_skip_ends_the_connection() {
        let (_dir, disk) = disk();
        let (_, outcome) = run(&disk, [start(), request(0, 1, 0, u32::MAX)].concat());
        assert!(matches!(outcome, Err(SessionError::Broken(Broken::WriteTooLong(_)))));
    }

    #[test]
    fn writes_zeroes_and_reads_take_effect_in_order() {
        let (_dir, disk) = disk();
        let requests = [
            start(),
            request(1, 1, 10, 4),
            b"data".to_vec(),
            request(0, 6, 12, 1),
            request(2, 6, 13, 1),
            request(0, 4, 100, 50),
            request(0, 3, 0, 0),
            request(0, 0, 9, 6),
            request(0, 2, 0, 0),
        ];
        let (output, outcome) = run(&disk, requests.concat());
        outcome.expect("a clean session");
        assert_eq!(output.len(), START_REPLY_BYTES + 6 * REPLY_BYTES + 6);
        assert_eq!(output[output.len() - 6..], [0x5a, b'd', b'a', 0, 0, 0x5a]);
    }

    #[test]
    fn options_are_answered_and_bounded() {
        let (_dir, disk) = disk();
        let flags = 3_u32.to_be_bytes().to_vec();
        // STRUCTURED_REPLY is refused, a long LIST is skipped, an unknown name is refused, ABORT ends.
        let named = [&1_u32.to_be_bytes()[..], b"x", &0_u16.to_be_bytes()[..]].concat();
        let options = [
            flags.clone(),
            option(8, &[]),
            option(3, &[0; 5000]),
            option(7, &named),
            option(7, &[1, 2, 3]),
            option(2, &[]),
        ];
        let (output, outcome) = run(&disk, options.concat());
        outcome.expect("a clean session");
        let kinds: Vec<u32> = output[18..]
            .chunks_exact(20)
            .map(|reply| u32::from_be_bytes(reply[12..16].try_into().expect("four bytes")))
            .collect();
        let low: Vec<u32> = kinds.iter().map(|kind| kind & 0xff).collect();
        assert_eq!(low, [1, 9, 6, 3, 1]);

        let flood = [flags.clone(), option(8, &[]).repeat(1000)].concat();
        let (output, outcome) = run(&disk, flood);
        assert!(matches!(outcome, Err(SessionError::Broken(Broken::TooManyOptions))));
        assert!(output.len() < 4096);

        let mut huge = [flags, option(3, &[])].concat();
        let at = huge.len() - 4;
        huge[at..].copy_from_slice(&u32::MAX.to_be_bytes());
        let (_, outcome) = run(&disk, huge);
        assert!(matches!(outcome, Err(SessionError::Broken(Broken::OptionTooLong(_)))));
    }

    fn noise() -> impl Strategy<Value = Vec<u8>> {
        let one_request = (any::<u16>(), 0..9_u16, any::<u64>(), any::<u32>()).prop_map(
            |(flags, command, offset, len)| {
                let offset = if flags & 8 == 0 { offset % 70_000 } else { offset };
                let len = if flags & 16 == 0 { len % 70_000 } else { len };
                request(flags & 3, command, offset, len)
            },
        );
        let raw = proptest::collection::vec(any::<u8>(), 0..200);
        let one_option = (0..12_u32, proptest::collection::vec(any::<u8>(), 0..64))
            .prop_map(|(number, data)| option(number, &data));
        let part = prop_oneof![4 => one_request, 1 => raw, 2 => one_option, 2 => Just(start())];
        proptest::collection::vec(part, 0..20).prop_map(|parts| parts.concat())
    }

    proptest! {
        #[test]
        fn a_hostile_client_ends_or_is_answered(started in any::<bool>(), noise in noise()) {
            let (_dir, disk) = disk();
            let input = if started { [start(), noise].concat() } else { noise };
            let asked = input.len();
            let (output, _) = run(&disk, input);
            // Each 28-byte request draws at most one disk of data.
            prop_assert!(output.len() <= 4096 + (asked / 16 + 1) * (SIZE + REPLY_BYTES));
        }
    }
}
