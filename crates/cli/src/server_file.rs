//! What a running server tells its own commands: where it listens and the key to use.

use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::preset::Local;

/// The running server, as other `belljar` commands find it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Server {
    pub(crate) pid: u32,
    pub(crate) api_url: String,
    pub(crate) sandbox_url: String,
    pub(crate) tier: String,
}

impl Server {
    pub(crate) fn write(&self, local: &Local) -> Result<()> {
        let text = serde_json::to_string(self).expect("a struct of strings and numbers serialises");
        write_private(&local.server_file(), &text)
    }

    /// The server of this data folder; an error that says how to start one when there is none.
    pub(crate) fn read(local: &Local) -> Result<Server> {
        let path = local.server_file();
        let text = std::fs::read_to_string(&path).with_context(|| {
            format!("no server runs on {}: start one with `belljar up`", local.data_dir.display())
        })?;
        serde_json::from_str(&text).with_context(|| format!("failed to read {}", path.display()))
    }
}

/// Writes a file only its owner can read.
pub(crate) fn write_private(path: &Path, text: &str) -> Result<()> {
    let mut file = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .with_context(|| format!("failed to write {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("failed to write {}", path.display()))
}
