//! The admin token: where it is kept, and who may read it there.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use belljar_control::AdminToken;
use belljar_domain::Secret;

use crate::api::Api;
use crate::preset::Local;
use crate::server_file::{Server, write_private};

/// How the operator names the token.
#[derive(Debug, Clone, Default)]
pub(crate) struct AdminEnv {
    /// The token itself: `BELLJAR_ADMIN_TOKEN`.
    pub(crate) token: Option<Secret<String>>,
    /// A file that holds it: `--admin-token-file`.
    pub(crate) file: Option<PathBuf>,
    /// The server to talk to, if not the one of the data folder: `E2B_API_URL`.
    pub(crate) api_url: Option<String>,
}

/// The token a server starts with: the one it was told, else the one of its data folder, which is
/// made on the first start.
pub(crate) fn for_server(local: &Local, env: &AdminEnv) -> Result<AdminToken> {
    let text = match told(env)? {
        Some(text) => text,
        None => {
            let path = local.admin_token_file();
            if path.exists() {
                read(&path)?
            } else {
                let text = AdminToken::random_text();
                write_private(&path, &format!("{}\n", text.expose()))?;
                text
            }
        }
    };
    text.expose().parse().context("failed to use the admin token")
}

/// A client that acts as the operator.
pub(crate) fn api(local: &Local, env: &AdminEnv) -> Result<Api> {
    let url = match (&env.api_url, told(env)?.is_some()) {
        (Some(url), true) => url.trim_end_matches('/').to_owned(),
        _ => Server::read(local)?.api_url,
    };
    let text = match told(env)? {
        Some(text) => text,
        None => read(&local.admin_token_file())?,
    };
    Ok(Api::of_operator(url, &text))
}

fn told(env: &AdminEnv) -> Result<Option<Secret<String>>> {
    match (&env.token, &env.file) {
        (Some(_), Some(_)) => {
            bail!("BELLJAR_ADMIN_TOKEN and --admin-token-file are both set: keep one")
        }
        (Some(text), None) => Ok(Some(text.clone())),
        (None, Some(path)) => read(path).map(Some),
        (None, None) => Ok(None),
    }
}

fn read(path: &Path) -> Result<Secret<String>> {
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("failed to read the admin token in {}", path.display()))?;
    Ok(Secret::new(text.trim().to_owned()))
}
