//! A small NBD client that keeps some requests under way. Replies may come in any order.

use std::io::{self, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Instant;

/// Offsets in rising order from the start, or scattered over the disk; the same in every run.
#[derive(Clone, Copy)]
pub(crate) enum Order {
    Sequential,
    Random,
}

/// A series of requests of one kind.
pub(crate) struct Access {
    pub(crate) order: Order,
    pub(crate) write: bool,
    /// Bytes of a request.
    pub(crate) len: u32,
    /// Requests under way at once.
    pub(crate) depth: usize,
    /// Requests in all.
    pub(crate) count: usize,
}

/// One connection in its transmission phase.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
    size_bytes: u64,
}

impl Client {
    /// Connects and negotiates the default export by the shortest way, `EXPORT_NAME`.
    pub(crate) fn connect(socket: &Path) -> io::Result<Client> {
        let mut stream = BufReader::with_capacity(256 << 10, UnixStream::connect(socket)?);
        stream.read_exact(&mut [0; 18])?;
        // Fixed newstyle and no zeros; then the option with an empty name.
        let mut hello = 3_u32.to_be_bytes().to_vec();
        hello.extend(b"IHAVEOPT");
        hello.extend(1_u32.to_be_bytes());
        hello.extend(0_u32.to_be_bytes());
        stream.get_mut().write_all(&hello)?;
        let mut size = [0; 8];
        stream.read_exact(&mut size)?;
        stream.read_exact(&mut [0; 2])?;
        Ok(Client { stream, size_bytes: u64::from_be_bytes(size) })
    }

    /// Does all of `access`; how long it took, in seconds.
    pub(crate) fn run(mut self, access: &Access) -> io::Result<f64> {
        let len = usize::try_from(access.len).expect("a request fits in memory");
        let mut offsets = Offsets::new(access, self.size_bytes);
        let mut request = vec![0x5a; 28 + if access.write { len } else { 0 }];
        let mut data = vec![0; if access.write { 0 } else { len }];
        let started = Instant::now();
        let (mut sent, mut done) = (0, 0);
        while done < access.count {
            while sent < access.count && sent - done < access.depth {
                header(&mut request, access, offsets.next());
                self.stream.get_mut().write_all(&request)?;
                sent += 1;
            }
            let mut reply = [0; 16];
            self.stream.read_exact(&mut reply)?;
            if reply[..8] != [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0] {
                return Err(io::Error::other(format!("an NBD request failed: {reply:x?}")));
            }
            self.stream.read_exact(&mut data)?;
            done += 1;
        }
        let seconds = started.elapsed().as_secs_f64();
        request.truncate(28);
        request[6..8].copy_from_slice(&2_u16.to_be_bytes());
        self.stream.get_mut().write_all(&request)?;
        Ok(seconds)
    }
}

fn header(request: &mut [u8], access: &Access, offset: u64) {
    request[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    request[4..6].fill(0);
    request[6..8].copy_from_slice(&u16::from(access.write).to_be_bytes());
    request[8..16].copy_from_slice(&offset.to_be_bytes());
    request[16..24].copy_from_slice(&offset.to_be_bytes());
    request[24..28].copy_from_slice(&access.len.to_be_bytes());
}

/// Where the next request goes.
struct Offsets {
    order: Order,
    len: u64,
    places: u64,
    state: u64,
}

impl Offsets {
    fn new(access: &Access, size_bytes: u64) -> Offsets {
        let len = u64::from(access.len);
        let state = match access.order {
            Order::Sequential => 0,
            Order::Random => 0x9e37_79b9_7f4a_7c15,
        };
        Offsets { order: access.order, len, places: size_bytes / len, state }
    }

    fn next(&mut self) -> u64 {
        match self.order {
            Order::Sequential => self.state += 1,
            Order::Random => {
                self.state ^= self.state << 13;
                self.state ^= self.state >> 7;
                self.state ^= self.state << 17;
            }
        }
        self.state % self.places * self.len
    }
}
