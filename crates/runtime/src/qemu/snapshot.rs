//! A snapshot of a frozen machine: its device state from its monitor, its own pages from its process.

use std::fs::File;
use std::io::{self, Seek as _, SeekFrom};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;
use tracing::debug;

use super::machine::{Private, SAVE_LIMIT, SEAL_LIMIT, millis, refused};
use super::qmp::Qmp;
use crate::draft::Draft;
use crate::keeper::{Process, ProcessHandle};
use crate::machine::SaveError;
use crate::memory::{Abandon, GuestMemory, MemoryFile, ReadError};
use crate::pages::{PageSink, SnapshotTarget};
use crate::saved::Shape;

/// # Errors
/// [`SaveError`]; nothing is left in the folder then.
pub(super) async fn take(
    private: &Private,
    process: &Process,
    qmp: &mut Qmp,
    into: SnapshotTarget,
) -> Result<Box<dyn PageSink>, SaveError> {
    let status = qmp.execute("query-status", json!({}), SAVE_LIMIT).await.map_err(refused)?;
    if status["running"] != false {
        return Err(SaveError::NotFrozen);
    }
    let draft = Draft::begin(&into.folder)?;
    // Named after the hypervisor it was made for, and good for any: all devices and no memory, of a
    // machine that is stopped and stays so. `live` would take the disks from it.
    let command = json!({ "filename": private.state_file, "live": false });
    qmp.execute("xen-save-devices-state", command, SAVE_LIMIT).await.map_err(refused)?;
    let state = private.state.try_clone().map_err(|source| SaveError::Memory { source })?;
    let abandon = Abandon::default();
    let copy = Copy {
        process: process.handle(),
        memory: private.memory,
        shape: private.shape.clone(),
        state,
        draft,
        sink: into.pages,
        abandoned: abandon.flag(),
    };
    let copying = tokio::task::spawn_blocking(move || copy.run());
    match tokio::time::timeout(SEAL_LIMIT, copying).await {
        Ok(Ok(copied)) => {
            let (draft, sink) = copied?;
            draft.keep();
            Ok(sink)
        }
        Ok(Err(e)) => Err(SaveError::Memory { source: e.into() }),
        Err(_) => Err(SaveError::TimedOut { waited_ms: millis(SEAL_LIMIT) }),
    }
}

/// What the copying thread works with.
struct Copy {
    process: ProcessHandle,
    memory: MemoryFile,
    shape: Shape,
    state: File,
    draft: Draft,
    sink: Box<dyn PageSink>,
    abandoned: Arc<AtomicBool>,
}

impl Copy {
    /// When nobody takes what this returns, it is dropped, and so the files are removed.
    fn run(mut self) -> Result<(Draft, Box<dyn PageSink>), SaveError> {
        let bytes = GuestMemory::open(&self.process, self.memory)
            .map_err(ReadError::Memory)
            .and_then(|memory| memory.read_private(&mut *self.sink, &|_| false, &self.abandoned));
        // Reading the memory of a process that ends is reading nothing.
        if !self.process.is_alive() {
            return Err(SaveError::Gone);
        }
        let bytes = bytes.map_err(|e| match e {
            ReadError::Memory(source) => SaveError::Memory { source },
            ReadError::Sink(source) => SaveError::Sink { source },
            // Nobody hears this.
            ReadError::Abandoned => SaveError::Gone,
        })?;
        self.write_state()?;
        if self.abandoned.load(Ordering::Acquire) {
            return Err(SaveError::Gone);
        }
        debug!(bytes, "took a snapshot");
        Ok((self.draft, self.sink))
    }

    fn write_state(&mut self) -> Result<(), SaveError> {
        let rewound: io::Result<u64> = self.state.seek(SeekFrom::Start(0));
        rewound.map_err(|source| SaveError::Memory { source })?;
        self.draft.finish(&self.state, &self.shape)?;
        // It is memory, and was copied.
        self.state.set_len(0).map_err(|source| SaveError::Memory { source })
    }
}
