//! A fake machine's memory: the pages somebody wrote, over a file or zeros.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use crate::pages::{PAGE_BYTES, PageSource, SavedMemory, check_run};

const PAGE: usize = PAGE_BYTES as usize;

type Page = Box<[u8; PAGE]>;

/// Costs what was written to it.
#[derive(Debug, Default)]
pub(super) struct FakeMemory {
    bytes: u64,
    /// Opened to read a page of it: a host holds thousands of these.
    base: Option<PathBuf>,
    /// By the number of the page.
    pages: BTreeMap<u64, Page>,
}

impl FakeMemory {
    /// Memory as it was saved. Blocks on the source of its pages.
    ///
    /// # Errors
    /// I/O errors of the source; [`io::ErrorKind::InvalidData`] for runs that are no pages.
    pub(super) fn restored(bytes: u64, saved: SavedMemory) -> io::Result<FakeMemory> {
        let mut memory = FakeMemory { bytes, base: saved.base, pages: BTreeMap::new() };
        if let Some(source) = &saved.pages {
            memory.install(&**source)?;
        }
        Ok(memory)
    }

    fn install(&mut self, source: &dyn PageSource) -> io::Result<()> {
        source.read_runs(&mut |offset, run| {
            check_run(offset, run.len(), self.bytes)?;
            let (pages, _) = run.as_chunks::<PAGE>();
            for (number, page) in (offset / PAGE_BYTES..).zip(pages) {
                self.pages.insert(number, Box::new(*page));
            }
            Ok(())
        })
    }

    /// # Errors
    /// I/O errors of the base; [`io::ErrorKind::InvalidInput`] beyond the end of the memory.
    pub(super) fn read(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut found = vec![0; length];
        self.each_part(offset, length, |number, within, part| {
            found[part.clone()].copy_from_slice(&self.page(number)?[within..][..part.len()]);
            Ok(())
        })?;
        Ok(found)
    }

    /// # Errors
    /// As [`FakeMemory::read`].
    pub(super) fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut parts = Vec::new();
        self.each_part(offset, bytes.len(), |number, within, part| {
            let mut page = self.page(number)?;
            page[within..][..part.len()].copy_from_slice(&bytes[part]);
            parts.push((number, page));
            Ok(())
        })?;
        self.pages.extend(parts);
        Ok(())
    }

    /// Every page that was written, and its offset.
    pub(super) fn private(&self) -> Vec<(u64, Page)> {
        self.pages.iter().map(|(number, page)| (number * PAGE_BYTES, page.clone())).collect()
    }

    fn page(&self, number: u64) -> io::Result<Page> {
        if let Some(page) = self.pages.get(&number) {
            return Ok(page.clone());
        }
        let mut page = Box::new([0; PAGE]);
        if let Some(base) = &self.base {
            File::open(base)?.read_exact_at(&mut page[..], number * PAGE_BYTES)?;
        }
        Ok(page)
    }

    /// Splits a range by pages: the page's number, where in it, and which part of the range.
    fn each_part(
        &self,
        offset: u64,
        length: usize,
        mut each: impl FnMut(u64, usize, std::ops::Range<usize>) -> io::Result<()>,
    ) -> io::Result<()> {
        let end = offset.checked_add(length as u64);
        if end.is_none_or(|end| end > self.bytes) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut done = 0;
        while done < length {
            let at = offset + done as u64;
            let within = usize::try_from(at % PAGE_BYTES).expect("less than a page");
            let next = length.min(done + PAGE - within);
            each(at / PAGE_BYTES, within, done..next)?;
            done = next;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_written_over_the_base() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let base = folder.path().join("base");
        std::fs::write(&base, vec![7; 3 * PAGE]).expect("write a base");
        let saved = SavedMemory { base: Some(base), pages: None };
        let mut memory = FakeMemory::restored(3 * PAGE_BYTES, saved).expect("no pages to read");
        memory.write(PAGE_BYTES - 2, &[1, 2, 3, 4]).expect("inside");
        assert_eq!(memory.read(PAGE_BYTES - 3, 6).expect("inside"), [7, 1, 2, 3, 4, 7]);
        let private = memory.private();
        assert_eq!(private.iter().map(|(at, _)| *at).collect::<Vec<_>>(), [0, PAGE_BYTES]);
        assert_eq!(memory.read(0, 3 * PAGE).expect("all of it").len(), 3 * PAGE);
        for (offset, length) in [(3 * PAGE_BYTES, 1), (u64::MAX, 2), (0, 3 * PAGE + 1)] {
            assert!(memory.read(offset, length).is_err(), "{offset} {length}");
        }
    }
}
