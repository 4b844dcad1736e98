//! A real store that is made to fail, hang or die. Left alone it passes the contract suite of stores.

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use belljar_blockstore::blobs::{BlobAction, BlobFault, BlobKey, BlobStat, Created};
use belljar_blockstore::{BlobError, BlobStore};
use bytes::Bytes;

pub(crate) struct Tampered {
    inner: Arc<dyn BlobStore>,
    calls: AtomicU64,
    fails_every: AtomicU64,
    dies_after: AtomicU64,
    dead: AtomicBool,
    hangs: Mutex<bool>,
    goes_on: Condvar,
    /// Calls that hang now.
    pub(crate) hanging: AtomicU64,
    /// Calls that were made to fail.
    pub(crate) failures: AtomicU64,
}

impl Tampered {
    /// A store that does what `inner` does.
    pub(crate) fn over(inner: Arc<dyn BlobStore>) -> Tampered {
        Tampered {
            inner,
            calls: AtomicU64::new(0),
            fails_every: AtomicU64::new(0),
            dies_after: AtomicU64::new(u64::MAX),
            dead: AtomicBool::new(false),
            hangs: Mutex::new(false),
            goes_on: Condvar::new(),
            hanging: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        }
    }

    /// Every call of a multiple of this number fails from now on; 0 for none.
    pub(crate) fn fail_every(&self, calls: u64) {
        self.fails_every.store(calls, Ordering::SeqCst);
    }

    /// Every call after this many fails, as if its process had been killed.
    pub(crate) fn die_after(&self, calls: u64) {
        self.dies_after.store(calls, Ordering::SeqCst);
    }

    /// Whether it has died.
    pub(crate) fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// Calls wait from now on, or go on.
    pub(crate) fn hang(&self, hangs: bool) {
        *self.hangs.lock().unwrap_or_else(PoisonError::into_inner) = hangs;
        self.goes_on.notify_all();
    }

    fn call(&self, action: BlobAction, key: &BlobKey) -> Result<(), BlobError> {
        let call = self.calls.fetch_add(1, Ordering::SeqCst) + 1;
        let hangs = self.hangs.lock().unwrap_or_else(PoisonError::into_inner);
        self.hanging.fetch_add(u64::from(*hangs), Ordering::SeqCst);
        drop(
            self.goes_on.wait_while(hangs, |hangs| *hangs).unwrap_or_else(PoisonError::into_inner),
        );
        let every = self.fails_every.load(Ordering::SeqCst);
        let dies = call > self.dies_after.load(Ordering::SeqCst);
        self.dead.fetch_or(dies, Ordering::SeqCst);
        if !dies && (every == 0 || !call.is_multiple_of(every)) {
            return Ok(());
        }
        self.failures.fetch_add(1, Ordering::SeqCst);
        let source = Arc::new(std::io::Error::other("the test says so"));
        Err(BlobError {
            action,
            key: key.to_string(),
            store: self.name().to_owned(),
            fault: BlobFault::Unavailable(source),
        })
    }
}

impl BlobStore for Tampered {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn put(&self, key: &BlobKey, body: Bytes) -> Result<(), BlobError> {
        self.call(BlobAction::Write, key)?;
        self.inner.put(key, body)
    }

    fn create(&self, key: &BlobKey, body: Bytes) -> Result<Created, BlobError> {
        self.call(BlobAction::Write, key)?;
        self.inner.create(key, body)
    }

    fn get(&self, key: &BlobKey, max_bytes: u64) -> Result<Bytes, BlobError> {
        self.call(BlobAction::Read, key)?;
        self.inner.get(key, max_bytes)
    }

    fn get_range(&self, key: &BlobKey, range: Range<u64>) -> Result<Bytes, BlobError> {
        self.call(BlobAction::Read, key)?;
        self.inner.get_range(key, range)
    }

    fn stat(&self, key: &BlobKey) -> Result<BlobStat, BlobError> {
        self.call(BlobAction::Stat, key)?;
        self.inner.stat(key)
    }

    fn list(&self, folder: &BlobKey) -> Result<Vec<(BlobKey, BlobStat)>, BlobError> {
        self.call(BlobAction::List, folder)?;
        self.inner.list(folder)
    }

    fn delete(&self, key: &BlobKey) -> Result<(), BlobError> {
        self.call(BlobAction::Delete, key)?;
        self.inner.delete(key)
    }
}
