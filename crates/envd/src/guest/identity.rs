//! The files that tell programs inside which sandbox they are in.
//!
//! Source of the names: `contract/e2b-wire.md` section 2.6.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Marks the machine as a sandbox, before it knows which.
pub(super) fn mark(dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join(".E2B_SANDBOX"), "true")
}

/// Writes the names, and only those that changed: right after a restore every first system call
/// of a kind costs milliseconds on an emulated processor.
#[derive(Debug)]
pub(super) struct IdentityFiles {
    dir: PathBuf,
    written: Names,
}

/// Who the sandbox is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) sandbox_id: String,
    pub(super) template_id: String,
}

impl IdentityFiles {
    /// Files in `dir`, none of which is written yet.
    pub(super) fn new(dir: &Path) -> IdentityFiles {
        IdentityFiles { dir: dir.to_owned(), written: Names::default() }
    }

    /// Makes the files say `names`.
    pub(super) fn write(&mut self, names: Names) -> io::Result<()> {
        if names.sandbox_id != self.written.sandbox_id {
            fs::write(self.dir.join(".E2B_SANDBOX_ID"), &names.sandbox_id)?;
        }
        if names.template_id != self.written.template_id {
            fs::write(self.dir.join(".E2B_TEMPLATE_ID"), &names.template_id)?;
        }
        self.written = names;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_follow_the_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let read = |name: &str| fs::read_to_string(dir.path().join(name)).expect("there");
        mark(dir.path()).expect("marked");
        assert_eq!(read(".E2B_SANDBOX"), "true");
        let mut files = IdentityFiles::new(dir.path());
        for (sandbox, template) in [("ione", "base"), ("itwo", "base"), ("itwo", "other")] {
            let (sandbox_id, template_id) = (sandbox.to_owned(), template.to_owned());
            files.write(Names { sandbox_id, template_id }).expect("written");
            assert_eq!(
                (read(".E2B_SANDBOX_ID").as_str(), read(".E2B_TEMPLATE_ID").as_str()),
                (sandbox, template)
            );
        }
    }
}
