//! What an earlier server left on this host, removed before the first sandbox of this one.

use std::collections::HashSet;
use std::io;
use std::path::Path;

use belljar_daemon::clock;
use belljar_domain::ExecutionId;
use tracing::info;

use crate::ledger::Ledger;
use crate::registry::OpenError;
use crate::settings::{Deps, Settings};
use crate::untold::UntoldEnds;

/// What an earlier server left and this one removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Reclaimed {
    /// Sandboxes that were in the ledger, without machines that were nobody's yet.
    pub sandboxes: Vec<String>,
}

/// Removes whatever the ledger names, then whatever lies in the folders without an entry. What was
/// in the ledger is noted for whoever asks what became of it, but for runs that ended `paused`: their
/// snapshots tell.
pub(crate) async fn reclaim(
    ledger: &Ledger,
    untold: &UntoldEnds,
    paused: &HashSet<ExecutionId>,
    settings: &Settings,
    deps: &Deps,
) -> Result<Reclaimed, OpenError> {
    let dir_error = |path: &Path| {
        let path = path.to_owned();
        move |source| OpenError::Dir { path, source }
    };
    let (entries, unreadable) = ledger.entries().map_err(dir_error(&settings.ledger_dir))?;
    let mut reclaimed = Reclaimed::default();
    for entry in entries {
        let failed =
            |reason: String| OpenError::Reclaim { sandbox_id: entry.sandbox_id.clone(), reason };
        deps.runtime.reclaim(&entry.machine).await.map_err(|e| failed(e.to_string()))?;
        remove_if_there(&entry.run_dir).map_err(|e| failed(e.to_string()))?;
        remove_if_there(&entry.overlay).map_err(|e| failed(e.to_string()))?;
        if !entry.execution_id.parse().is_ok_and(|run| paused.contains(&run)) {
            // Noted first: a crash between the two notes it again, which changes nothing.
            untold.note_lost(&entry, clock::now()).map_err(|e| failed(e.to_string()))?;
        }
        ledger.remove(&entry.sandbox_id).map_err(|e| failed(e.to_string()))?;
        let spare = entry.is_spare();
        info!(sandbox_id = entry.sandbox_id, spare, "reclaimed a sandbox of an earlier run");
        if !spare {
            reclaimed.sandboxes.push(entry.sandbox_id);
        }
    }
    for path in unreadable {
        remove_if_there(&path).map_err(dir_error(&path))?;
    }
    // The server holds its data folder alone, so anything still here belongs to no one.
    for dir in [&settings.run_dir, &settings.overlay_dir] {
        for file in std::fs::read_dir(dir).map_err(dir_error(dir))? {
            let path = file.map_err(dir_error(dir))?.path();
            remove_if_there(&path).map_err(dir_error(&path))?;
        }
    }
    Ok(reclaimed)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(e) => Err(e),
    };
    match removed {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
