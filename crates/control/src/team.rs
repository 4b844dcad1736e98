//! Teams: who owns keys, sandboxes and template names.

use std::fmt;

/// A team. A UUID.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TeamId(uuid::Uuid);

impl TeamId {
    /// A new random id.
    pub fn random() -> Self {
        TeamId(uuid::Uuid::new_v4())
    }

    /// The id `text` spells, or `None` when it is not a UUID.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        uuid::Uuid::try_parse(text).ok().map(TeamId)
    }
}

impl fmt::Display for TeamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A team and the name its templates live under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Team {
    /// Never changes.
    pub id: TeamId,
    /// Namespace of its template names.
    pub slug: String,
}
