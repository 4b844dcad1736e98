//! Pages of a snapshot, kept in memory by a test.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::pages::{PAGE_BYTES, PageSink, PageSource};

/// What a machine's pages are, for tests: a sink, and a source of what went in. Clones are the same.
#[derive(Debug, Clone, Default)]
pub struct KeptPages {
    runs: Arc<Mutex<BTreeMap<u64, Vec<u8>>>>,
}

impl KeptPages {
    /// How many bytes there are.
    pub fn size_bytes(&self) -> u64 {
        self.runs().values().map(|run| run.len() as u64).sum()
    }

    fn runs(&self) -> MutexGuard<'_, BTreeMap<u64, Vec<u8>>> {
        self.runs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl PageSink for KeptPages {
    /// # Panics
    /// When a run is not what the trait promises.
    fn write(&mut self, offset: u64, pages: &[u8]) -> io::Result<()> {
        let whole = |bytes: u64| bytes.is_multiple_of(PAGE_BYTES);
        assert!(whole(offset) && whole(pages.len() as u64) && !pages.is_empty(), "no whole pages");
        let mut runs = self.runs();
        let end = runs.last_key_value().map_or(0, |(at, run)| at + run.len() as u64);
        assert!(end <= offset, "pages at {offset} come after those at {end}");
        runs.insert(offset, pages.to_owned());
        Ok(())
    }
}

impl PageSource for KeptPages {
    fn read_runs(&self, each: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>) -> io::Result<()> {
        self.runs().iter().try_for_each(|(offset, run)| each(*offset, run))
    }
}
