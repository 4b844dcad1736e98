//! What a build tells whoever waits for it.

/// Something a person may want to see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The build begins this step: a verb phrase, lower case.
    Step(&'static str),
    /// A line about the step under way.
    Detail(String),
}

/// Hears every [`Event`]. Called from the build's task: it must not block.
pub type OnProgress<'a> = &'a (dyn Fn(Event) + Send + Sync);
