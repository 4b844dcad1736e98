//! Lines of the host, out of what arrives of them.

use belljar_wire::guest::LINE_MAX_BYTES;

/// Cuts a stream of bytes into lines of bounded length.
#[derive(Default)]
pub(super) struct Lines {
    bytes: Vec<u8>,
    /// Bytes known to hold no line feed.
    scanned: usize,
    /// The rest of a line that was too long is being thrown away.
    skipping: bool,
}

impl Lines {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn clear(&mut self) {
        *self = Lines::default();
    }

    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let fresh = self.bytes.get(self.scanned..).unwrap_or_default();
            let Some(at) = fresh.iter().position(|byte| *byte == b'\n') else {
                self.scanned = self.bytes.len();
                if self.bytes.len() > LINE_MAX_BYTES {
                    tracing::warn!("the host sent a line that is too long; skipping it");
                    self.skipping = true;
                    self.bytes.clear();
                    self.scanned = 0;
                }
                return None;
            };
            let rest = self.bytes.split_off(self.scanned + at + 1);
            let line = std::mem::replace(&mut self.bytes, rest);
            self.scanned = 0;
            if !std::mem::take(&mut self.skipping) {
                return Some(line);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_cut_wherever_the_pieces_end() {
        let mut lines = Lines::default();
        let mut seen = Vec::new();
        for piece in ["a", "b\nc", "", "d\n\ne", "f"] {
            lines.push(piece.as_bytes());
            while let Some(line) = lines.next() {
                seen.push(String::from_utf8(line).expect("text"));
            }
        }
        assert_eq!(seen, ["ab\n", "cd\n", "\n"]);
        lines.clear();
        lines.push(b"g\n");
        assert_eq!(lines.next().as_deref(), Some(&b"g\n"[..]));
    }

    #[test]
    fn a_line_that_is_too_long_is_skipped_and_the_next_is_read() {
        let mut lines = Lines::default();
        for _ in 0..5 {
            lines.push(&vec![b'x'; LINE_MAX_BYTES / 4 + 1]);
            assert_eq!(lines.next(), None);
        }
        lines.push(b"tail\nnext\n");
        assert_eq!(lines.next().as_deref(), Some(&b"next\n"[..]));
        assert_eq!(lines.next(), None);
    }
}
