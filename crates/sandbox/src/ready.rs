//! The templates of this host, opened.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use belljar_blockstore::LayerStore;
use belljar_domain::BuildId;
use belljar_runtime::Runtime;
use tracing::warn;

use crate::registry::{OpenError, chain};
use crate::source::Source;
use crate::template::{Template, load_each};

/// A template that this host's driver can start from.
pub(crate) struct Ready {
    pub(crate) template: Template,
    pub(crate) source: Arc<Source>,
}

/// The templates this driver can restore, and those it cannot. A folder that is none is passed over:
/// one that was damaged must not keep the others from being used.
pub(crate) fn load_templates(
    dir: &Path,
    layers: &LayerStore,
    runtime: &dyn Runtime,
) -> Result<(HashMap<BuildId, Ready>, Vec<Template>), OpenError> {
    let templates = load_each(dir).map_err(|source| OpenError::Records { source })?;
    let mut ready = HashMap::new();
    let mut unusable = Vec::new();
    for template in templates {
        let template = match template {
            Ok(template) => template,
            Err(e) => {
                warn!(error = %chain(&e), "a template folder is no template: passed over");
                continue;
            }
        };
        if !runtime.restores(&template.meta.fingerprint) {
            unusable.push(template);
            continue;
        }
        match Source::of_template(&template, layers) {
            Ok(source) => {
                let source = Arc::new(source);
                ready.insert(source.build_id.clone(), Ready { template, source });
            }
            Err(e) => {
                let dir = template.dir.display();
                warn!(%dir, error = %chain(&e), "a template's files cannot be opened: passed over");
            }
        }
    }
    Ok((ready, unusable))
}

/// What each template is started from.
pub(crate) fn sources(templates: &HashMap<BuildId, Ready>) -> HashMap<BuildId, Arc<Source>> {
    templates.iter().map(|(id, ready)| (id.clone(), ready.source.clone())).collect()
}
