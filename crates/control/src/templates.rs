//! Which templates there are, and what a reference like `[namespace/]name[:tag]` means.
//!
//! Source of the grammar: contract section 1.3. The nodes have the templates; all of them belong to
//! the server, are open to every team, and have the one tag `default`. Where nodes hold different
//! builds of one template, the newest one counts, and only nodes that hold it can start it.

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;
use std::sync::{Arc, PoisonError, RwLock};

use belljar_domain::{BuildId, Kind, MiB, TemplateId, UnixMillis, Vcpus};

use crate::nodes::NodeIx;
use crate::placement::Need;
use crate::store::{DEFAULT_TAG, SnapshotRecord};
use crate::team::Team;

/// Longest reference accepted, in bytes. Source: contract section 1.3 (`name` up to 128).
const MAX_REFERENCE_BYTES: usize = 128;

/// One template and the build sandboxes start from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Template {
    pub(crate) id: TemplateId,
    pub(crate) build: BuildId,
    /// Its names, the main one first.
    pub(crate) aliases: Vec<String>,
    pub(crate) vcpus: Vcpus,
    pub(crate) memory: MiB,
    pub(crate) disk: MiB,
    pub(crate) envd_version: Arc<str>,
    pub(crate) created_at: UnixMillis,
    /// Whether it has no memory, so that it can only boot.
    pub(crate) cold_boot: bool,
}

impl Template {
    /// What a snapshot is as a template.
    pub(crate) fn of_snapshot(record: &SnapshotRecord) -> Template {
        let kept = &record.kept;
        Template {
            id: record.template.clone(),
            build: kept.id.clone(),
            aliases: record.name.iter().map(|name| name.name.clone()).collect(),
            vcpus: kept.vcpus,
            memory: kept.memory,
            disk: kept.disk,
            envd_version: kept.envd_version.clone(),
            created_at: kept.created_at,
            cold_boot: kept.filesystem_only,
        }
    }

    /// What a sandbox made from it takes of its node.
    pub(crate) fn need(&self) -> Need {
        Need { vcpus: self.vcpus, memory: self.memory, disk: self.disk }
    }
}

/// A parsed reference.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    namespace: Option<String>,
    name: String,
    tag: Option<String>,
}

/// A reference means no template the team may use. The texts are the contract's (section 1.2).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ResolveError {
    #[error("Invalid template reference: {reason}")]
    Malformed { reason: &'static str },
    #[error("template '{name}' not found")]
    Unknown { name: String },
    #[error("tag '{tag}' does not exist for template '{name}'")]
    UnknownTag { tag: String, name: String },
    #[error("you don't have access to template '{name}'")]
    OtherTeam { name: String },
}

impl ResolveError {
    pub(crate) fn kind(&self) -> Kind {
        match self {
            ResolveError::Malformed { .. } => Kind::Invalid,
            ResolveError::Unknown { .. } | ResolveError::UnknownTag { .. } => Kind::NotFound,
            ResolveError::OtherTeam { .. } => Kind::Forbidden,
        }
    }
}

fn is_name(text: &str) -> bool {
    let allowed = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    !text.is_empty() && text.bytes().all(allowed)
}

fn is_tag(text: &str) -> bool {
    let stripped = text.replace('.', "");
    !text.is_empty()
        && (stripped.is_empty() || is_name(&stripped))
        && text.parse::<BuildId>().is_err()
}

impl FromStr for Reference {
    type Err = ResolveError;

    fn from_str(text: &str) -> Result<Self, ResolveError> {
        let malformed = |reason| ResolveError::Malformed { reason };
        if text.len() > MAX_REFERENCE_BYTES {
            return Err(malformed("it is longer than 128 characters"));
        }
        let text = text.trim().to_ascii_lowercase();
        let (namespace, rest) = match text.split_once('/') {
            Some((namespace, rest)) => (Some(namespace), rest),
            None => (None, text.as_str()),
        };
        let (name, tag) = match rest.split_once(':') {
            Some((name, tag)) => (name, Some(tag)),
            None => (rest, None),
        };
        if name.is_empty() {
            return Err(malformed("the name is empty"));
        }
        if !is_name(name) {
            return Err(malformed("a name may hold a-z, 0-9, - and _ only"));
        }
        if namespace.is_some_and(|namespace| !is_name(namespace)) {
            return Err(malformed("a namespace may hold a-z, 0-9, - and _ only"));
        }
        if tag.is_some_and(|tag| !is_tag(tag)) {
            return Err(malformed("a tag may hold a-z, 0-9, -, _ and . only, and is no UUID"));
        }
        Ok(Reference {
            namespace: namespace.map(str::to_owned),
            name: name.to_owned(),
            tag: tag.map(str::to_owned),
        })
    }
}

impl Reference {
    pub(crate) fn namespace(&self) -> Option<&str> {
        self.namespace.as_deref()
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }
}

impl fmt::Display for Reference {
    /// The reference without its tag.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        f.write_str(&self.name)
    }
}

/// A template and where it can be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Placed {
    pub(crate) template: Template,
    /// The nodes that hold this build.
    pub(crate) nodes: Vec<NodeIx>,
}

/// The templates as last seen on the nodes. The lock is held to clone one pointer only, or to put
/// what one node said beside what the others have.
#[derive(Debug, Default)]
pub(crate) struct Templates {
    seen: RwLock<Seen>,
}

#[derive(Debug, Default)]
struct Seen {
    by_node: BTreeMap<NodeIx, Vec<Template>>,
    all: Arc<Vec<Placed>>,
}

impl Templates {
    /// Every template once, in the nodes' order.
    pub(crate) fn all(&self) -> Arc<Vec<Placed>> {
        Arc::clone(&self.seen.read().unwrap_or_else(PoisonError::into_inner).all)
    }

    /// Makes `templates` what `node` has. What a node that is away had stays known.
    pub(crate) fn replace(&self, node: NodeIx, templates: Vec<Template>) {
        let mut seen = self.seen.write().unwrap_or_else(PoisonError::into_inner);
        if seen.by_node.get(&node) != Some(&templates) {
            seen.by_node.insert(node, templates);
            seen.all = Arc::new(merged(&seen.by_node));
        }
    }

    /// The template `reference` means for `team`.
    ///
    /// # Errors
    /// [`ResolveError`] when there is none, or it is not theirs.
    pub(crate) fn resolve(
        &self,
        reference: &Reference,
        team: &Team,
    ) -> Result<Placed, ResolveError> {
        if reference.namespace.as_deref().is_some_and(|namespace| namespace != team.slug) {
            return Err(ResolveError::OtherTeam { name: reference.to_string() });
        }
        let all = self.all();
        let found = all
            .iter()
            .find(|placed| placed.template.aliases.contains(&reference.name))
            .or_else(|| all.iter().find(|placed| placed.template.id.as_str() == reference.name))
            .ok_or_else(|| ResolveError::Unknown { name: reference.to_string() })?;
        match &reference.tag {
            Some(tag) if tag != DEFAULT_TAG => {
                Err(ResolveError::UnknownTag { tag: tag.clone(), name: reference.to_string() })
            }
            _ => Ok(found.clone()),
        }
    }
}

/// Every template once: its newest build, and who holds that.
fn merged(by_node: &BTreeMap<NodeIx, Vec<Template>>) -> Vec<Placed> {
    let mut all: Vec<Placed> = Vec::new();
    for (node, templates) in by_node {
        for template in templates {
            match all.iter_mut().find(|placed| placed.template.id == template.id) {
                None => all.push(Placed { template: template.clone(), nodes: vec![*node] }),
                Some(placed) if placed.template.build == template.build => {
                    placed.nodes.push(*node);
                }
                Some(placed) if placed.template.created_at < template.created_at => {
                    *placed = Placed { template: template.clone(), nodes: vec![*node] };
                }
                Some(_) => {}
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    fn template(created_at: i64) -> Template {
        Template {
            id: "abcdefghij0123456789".parse().expect("an id"),
            build: BuildId::random(),
            aliases: vec!["base".to_owned(), "basic_1".to_owned()],
            vcpus: Vcpus(2),
            memory: MiB(512),
            disk: MiB(512),
            envd_version: "0.6.13".into(),
            created_at: UnixMillis(created_at),
            cold_boot: false,
        }
    }

    fn templates() -> Templates {
        let templates = Templates::default();
        templates.replace(NodeIx(0), vec![template(0)]);
        templates
    }

    #[test]
    fn of_several_builds_the_newest_counts_where_it_is() {
        let (old, new) = (template(1), template(2));
        let templates = Templates::default();
        for (node, template) in [(0, &new), (1, &old), (2, &new)] {
            templates.replace(NodeIx(node), vec![template.clone()]);
        }
        let placed = |nodes: &[u16]| Placed {
            template: new.clone(),
            nodes: nodes.iter().copied().map(NodeIx).collect(),
        };
        assert_eq!(*templates.all(), [placed(&[0, 2])]);
        templates.replace(NodeIx(1), vec![new.clone()]);
        assert_eq!(*templates.all(), [placed(&[0, 1, 2])]);
        templates.replace(NodeIx(0), vec![]);
        assert_eq!(*templates.all(), [placed(&[1, 2])]);
    }

    fn resolve(text: &str) -> Result<TemplateId, ResolveError> {
        let team = Team::called("default");
        let reference: Reference = text.parse()?;
        templates().resolve(&reference, &team).map(|placed| placed.template.id)
    }

    #[test]
    fn every_spelling_of_a_template_finds_it() {
        for text in
            ["base", "BASE", "basic_1", "abcdefghij0123456789", "base:default", "default/base"]
        {
            assert!(resolve(text).is_ok(), "{text}: {:?}", resolve(text));
        }
    }

    #[test]
    fn what_is_not_there_says_so_in_the_contracts_words() {
        let texts = [
            ("nope", "template 'nope' not found"),
            ("base:v2", "tag 'v2' does not exist for template 'base'"),
            ("others/base", "you don't have access to template 'others/base'"),
        ];
        for (text, message) in texts {
            assert_eq!(resolve(text).expect_err(text).to_string(), message);
        }
    }

    #[test]
    fn malformed_references_are_refused() {
        let uuid_tag = format!("base:{}", BuildId::random());
        let long = "a".repeat(129);
        for text in ["", " ", "a b", "a:", "/a", "a/", "é", "a:b:c", "../x", &uuid_tag, &long] {
            let error = resolve(text).expect_err(text);
            assert_eq!(error.kind(), Kind::Invalid, "{text:?}: {error}");
            assert!(error.to_string().starts_with("Invalid template reference: "), "{error}");
        }
    }
}
