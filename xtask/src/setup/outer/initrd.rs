//! The first file system of the outer machine: a cpio archive in the form `newc`.
//!
//! Source of the layout: the kernel's `Documentation/driver-api/early-userspace/buffer-format.rst`.

/// What one entry is.
const FOLDER: u32 = 0o040_755;
const PROGRAM: u32 = 0o100_755;
const FILE: u32 = 0o100_644;

/// An archive that grows by one entry a call. Folders come before what is in them.
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub(super) fn new() -> Archive {
        Archive { bytes: Vec::new(), entries: 0 }
    }

    pub(super) fn folder(&mut self, path: &str) {
        self.entry(path, FOLDER, &[]);
    }

    pub(super) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, content);
    }

    pub(super) fn file(&mut self, path: &str, content: &[u8]) {
        self.entry(path, FILE, content);
    }

    /// The finished archive.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let length = |of: usize| u32::try_from(of).expect("no module is near 4 GiB");
        let links = 1;
        // Number, mode, owner, group, links, time, size, four device numbers, name, checksum: no
        // time and no owner of this machine, so that equal parts make an equal archive.
        let fields = [
            self.entries,
            mode,
            0,
            0,
            links,
            0,
            length(content.len()),
            0,
            0,
            0,
            0,
            length(path.len() + 1),
            0,
        ];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_are_aligned_and_the_end_is_marked() {
        let mut archive = Archive::new();
        archive.folder("bin");
        archive.program("bin/sh", b"12345");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let headers: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        // 110 bytes of header and a name, then the content, each filled up to four.
        assert_eq!(headers, [0, 116, 116 + 120 + 8]);
        assert_eq!(&text[116 + 14..116 + 22], "000081ED");
        assert_eq!(&text[116 + 54..116 + 62], "00000005");
        assert_eq!(&text[116 + 120..116 + 125], "12345");
        assert!(text.trim_end_matches('\0').ends_with("TRAILER!!!"));
    }
}
