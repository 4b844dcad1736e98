//! Keeping the store like the shelf: what was kept here goes up, what was deleted here goes there, too.
//!
//! One task, one thing at a time. What it has to do is on disk, in the marks of the shelf, so a server that
//! was killed goes on where it was. What fails is tried again, later each time, and holds up nothing else.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use belljar_daemon::Scope;
use belljar_domain::BuildId;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use crate::archive::{Archive, UploadError};
use crate::registry::chain;
use crate::shelf::Shelf;

/// What is to be done for the store.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Task {
    Upload(BuildId),
    Forget(BuildId),
}

impl Task {
    fn id(&self) -> &BuildId {
        match self {
            Task::Upload(id) | Task::Forget(id) => id,
        }
    }
}

/// What has failed, and when it is tried again.
#[derive(Debug, Clone, Copy)]
struct Wait {
    tries: u32,
    until: Instant,
}

/// Brings the store up to date, until dropped.
pub(crate) async fn follow(shelf: Shelf, archive: Arc<Archive>) -> Result<(), Infallible> {
    let mut waits: HashMap<BuildId, Wait> = HashMap::new();
    loop {
        let (tasks, now) = (tasks(&shelf), Instant::now());
        waits.retain(|id, _| tasks.iter().any(|task| task.id() == id));
        let due = |task: &&Task| waits.get(task.id()).is_none_or(|wait| wait.until <= now);
        let Some(task) = tasks.iter().find(due).cloned() else {
            match waits.values().map(|wait| wait.until).min() {
                Some(until) => tokio::select! {
                    () = shelf.news() => {}
                    () = tokio::time::sleep_until(until) => {}
                },
                None => shelf.news().await,
            }
            continue;
        };
        let id = task.id().clone();
        if perform(&shelf, &archive, task).await {
            waits.remove(&id);
            continue;
        }
        let tries = waits.get(&id).map_or(0, |wait| wait.tries);
        let pace = archive.pace();
        let wait = pace.first.saturating_mul(1 << tries.min(16)).min(pace.max);
        waits.insert(id, Wait { tries: tries + 1, until: Instant::now() + wait });
    }
}

/// What is to be done, in the order in which it is: paused sandboxes have no other copy.
fn tasks(shelf: &Shelf) -> Vec<Task> {
    let forget = shelf.to_forget().into_iter().map(Task::Forget);
    let mut upload = shelf.to_upload();
    upload.sort_by_key(|meta| (!meta.paused, meta.created_at));
    let upload = upload.into_iter().map(|meta| Task::Upload(meta.snapshot_id.clone()));
    upload.chain(forget).collect()
}

/// Does one thing. True when it need not be done again.
async fn perform(shelf: &Shelf, archive: &Arc<Archive>, task: Task) -> bool {
    let (shelf, archive) = (shelf.clone(), Arc::clone(archive));
    // Told to stop when this future is dropped: the thread looks at it.
    let stop = StopOnDrop::default();
    let stopped = Arc::clone(&stop.0);
    let work = move || match task {
        Task::Upload(id) => upload(&shelf, &archive, &id, &stopped),
        Task::Forget(id) => match archive.forget(&id) {
            Ok(()) => {
                info!(snapshot_id = %id, "removed a snapshot from the store");
                shelf.forgotten(&id)
            }
            Err(e) => {
                warn!(snapshot_id = %id, error = %chain(&e), "a deleted snapshot is still in the store");
                false
            }
        },
    };
    on_thread("uploads", work).await.unwrap_or(false)
}

fn upload(shelf: &Shelf, archive: &Archive, id: &BuildId, stopped: &AtomicBool) -> bool {
    let Some(source) = shelf.get(id) else { return true };
    let go_on = || !stopped.load(Ordering::Relaxed) && shelf.get(id).is_some();
    let outcome = archive.upload(&source, &shelf.folder(id), &go_on);
    drop(source);
    if shelf.get(id).is_none() {
        // Deleted while it went up: its layers were still open then.
        shelf.sweep();
    }
    match outcome {
        // Dropped meanwhile: the next server finds it in the store.
        Ok(_) if stopped.load(Ordering::Relaxed) => false,
        Ok(stats) => {
            let bytes = stats.object_bytes;
            info!(snapshot_id = %id, bytes, store = archive.store_name(), "uploaded a snapshot");
            shelf.set_uploaded(id, archive.store_name());
            true
        }
        // Deleted here while it went up.
        Err(_) if shelf.get(id).is_none() => true,
        Err(e @ UploadError::Stopped { .. }) => {
            debug!(error = %e, "an upload was given up");
            false
        }
        Err(e) => {
            warn!(error = %chain(&e), "a snapshot is not in the store yet; it is tried again");
            false
        }
    }
}

/// Sets its flag when it is dropped.
#[derive(Default)]
struct StopOnDrop(Arc<AtomicBool>);

impl Drop for StopOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs `work` on a thread of its own, which the end of the process does not wait for: a store may hang for
/// minutes. `None` when it panicked, or there is no thread.
pub(crate) async fn on_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (done, heard) = oneshot::channel();
    let run = move || {
        let _caller_gone = done.send(work()).is_err();
    };
    match std::thread::Builder::new().name(name.to_owned()).spawn(run) {
        Ok(_detached) => heard.await.ok(),
        Err(e) => {
            warn!(error = %e, "there is no thread for the blob store");
            None
        }
    }
}

/// Follows the shelf in `scope`.
pub(crate) fn start(shelf: &Shelf, archive: &Arc<Archive>, scope: &Scope) {
    let task = follow(shelf.clone(), Arc::clone(archive));
    scope.spawn("uploads", belljar_daemon::OnError::Log, task);
}
