//! A blocking HTTP/1.1 client that does as little as a client can: it counts bytes and keeps none.
//!
//! The same code speaks to the guest daemon and to its peers, so what it costs cancels out.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Bytes taken from the socket at once.
const READ_BYTES: usize = 512 * 1024;
/// Bytes given to the socket at once.
const WRITE_BYTES: usize = 256 * 1024;
/// Longest wait for the next byte.
const SILENCE_LIMIT: Duration = Duration::from_secs(60);

/// One keep-alive connection.
pub(super) struct Connection {
    stream: Box<dyn Stream>,
    /// Of the last answer.
    head: String,
    buffer: Vec<u8>,
    start: usize,
    end: usize,
}

/// What a connection goes over.
trait Stream: Read + Write + Send {}

impl<S: Read + Write + Send> Stream for S {}

/// What of an answer's head matters here.
#[derive(Debug, Clone, Copy)]
pub(super) struct Head {
    pub(super) status: u16,
    length: Option<u64>,
    chunked: bool,
}

impl Connection {
    pub(super) fn open(port: u16) -> Result<Connection> {
        let stream = TcpStream::connect(("127.0.0.1", port)).context("cannot connect")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        stream.set_write_timeout(Some(SILENCE_LIMIT))?;
        Ok(Connection::over(stream))
    }

    /// A connection to a unix socket.
    pub(super) fn open_unix(path: &Path) -> Result<Connection> {
        let stream = UnixStream::connect(path).context("cannot connect")?;
        stream.set_read_timeout(Some(SILENCE_LIMIT))?;
        stream.set_write_timeout(Some(SILENCE_LIMIT))?;
        Ok(Connection::over(stream))
    }

    fn over(stream: impl Stream + 'static) -> Connection {
        let (stream, buffer) = (Box::new(stream), vec![0; READ_BYTES]);
        Connection { stream, head: String::new(), buffer, start: 0, end: 0 }
    }

    /// A header of the last answer.
    pub(super) fn header(&self, wanted: &str) -> Option<&str> {
        self.head.split("\r\n").skip(1).find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim())
        })
    }

    /// Sends a request whose body is in memory.
    pub(super) fn send(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Result<()> {
        let mut request = head(method, target, headers, body.len() as u64);
        request.extend_from_slice(body);
        Ok(self.stream.write_all(&request)?)
    }

    /// Sends a request with a body of that many bytes of no meaning.
    pub(super) fn send_filler(
        &mut self,
        method: &str,
        target: &str,
        headers: &[(&str, &str)],
        bytes: u64,
    ) -> Result<()> {
        self.stream.write_all(&head(method, target, headers, bytes))?;
        let filler: Vec<u8> = (0..WRITE_BYTES).map(|at| (at % 251).to_le_bytes()[0]).collect();
        let mut left = bytes;
        while left > 0 {
            let length = usize::try_from(left).unwrap_or(WRITE_BYTES).min(WRITE_BYTES);
            self.stream.write_all(&filler[..length])?;
            left -= length as u64;
        }
        Ok(())
    }

    /// Reads an answer's head.
    pub(super) fn head(&mut self) -> Result<Head> {
        loop {
            let ready = &self.buffer[self.start..self.end];
            if let Some(length) = ready.windows(4).position(|four| four == b"\r\n\r\n") {
                self.head.clear();
                self.head.push_str(&String::from_utf8_lossy(&ready[..length]));
                let head = parse(&self.head)?;
                self.start += length + 4;
                return Ok(head);
            }
            self.fill()?;
        }
    }

    /// Reads an answer's body, hands every piece to `sink` and says how many bytes it was.
    pub(super) fn body(&mut self, head: Head, mut sink: impl FnMut(&[u8])) -> Result<u64> {
        if let Some(length) = head.length {
            self.exactly(length, &mut sink)?;
            return Ok(length);
        }
        if !head.chunked {
            bail!("the answer has neither a length nor chunks");
        }
        let mut total = 0;
        loop {
            let length = self.chunk_length()?;
            self.exactly(length, &mut sink)?;
            self.exactly(2, &mut |_| {})?;
            total += length;
            if length == 0 {
                return Ok(total);
            }
        }
    }

    /// An answer of 200 or 204, head and body, with the body's length.
    pub(super) fn answer(&mut self, sink: impl FnMut(&[u8])) -> Result<u64> {
        let head = self.head()?;
        if !(200..300).contains(&head.status) {
            let mut text = Vec::new();
            self.body(head, |bytes| text.extend_from_slice(bytes))?;
            bail!("answered {}: {}", head.status, String::from_utf8_lossy(&text));
        }
        if head.status == 204 {
            return Ok(0);
        }
        self.body(head, sink)
    }

    fn chunk_length(&mut self) -> Result<u64> {
        loop {
            let ready = &self.buffer[self.start..self.end];
            if let Some(length) = ready.iter().position(|byte| *byte == b'\n') {
                let text = String::from_utf8_lossy(&ready[..length]).trim().to_owned();
                self.start += length + 1;
                return u64::from_str_radix(&text, 16).with_context(|| format!("chunk '{text}'"));
            }
            self.fill()?;
        }
    }

    fn exactly(&mut self, mut left: u64, sink: &mut impl FnMut(&[u8])) -> Result<()> {
        while left > 0 {
            if self.start == self.end {
                self.fill()?;
            }
            let there = self.end - self.start;
            let length = usize::try_from(left).unwrap_or(there).min(there);
            sink(&self.buffer[self.start..self.start + length]);
            self.start += length;
            left -= length as u64;
        }
        Ok(())
    }

    fn fill(&mut self) -> Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let read = self.stream.read(&mut self.buffer[self.end..]).context("cannot read")?;
        if read == 0 {
            bail!("the connection was closed in the middle of an answer");
        }
        self.end += read;
        Ok(())
    }
}

fn head(method: &str, target: &str, headers: &[(&str, &str)], length: u64) -> Vec<u8> {
    let mut head = format!("{method} {target} HTTP/1.1\r\nhost: bench\r\n");
    for (name, value) in headers {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    if method != "GET" {
        head.push_str(&format!("content-length: {length}\r\n"));
    }
    head.push_str("\r\n");
    head.into_bytes()
}

fn parse(text: &str) -> Result<Head> {
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1));
    let status = status.and_then(|status| status.parse().ok());
    let mut head = Head { status: status.context("no status")?, length: None, chunked: false };
    for line in lines {
        let (name, value) = line.split_once(':').unwrap_or((line, ""));
        if name.eq_ignore_ascii_case("content-length") {
            head.length = Some(value.trim().parse().context("a content length")?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            head.chunked = value.trim().eq_ignore_ascii_case("chunked");
        }
    }
    Ok(head)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_read_whatever_their_case() {
        let head = parse("HTTP/1.1 200 OK\r\nContent-LENGTH: 12\r\nx: y").unwrap();
        assert_eq!((head.status, head.length, head.chunked), (200, Some(12), false));
        let head = parse("HTTP/1.1 201 Created\r\ntransfer-encoding: chunked").unwrap();
        assert_eq!((head.status, head.length, head.chunked), (201, None, true));
        assert!(parse("nonsense").is_err());
    }
}
