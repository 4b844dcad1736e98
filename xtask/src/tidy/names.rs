//! Names and sizes of files, and the list of crates in `ARCHITECTURE.md`.

use std::path::Path;

use super::layers::short_name;
use super::{ProjectFile, Report};
use crate::places::Package;

/// Names that say nothing about what a file answers.
const EMPTY_NAMES: &[&str] =
    &["core", "common", "util", "utils", "helper", "helpers", "misc", "manager", "managers"];
/// A file longer than this no longer answers one question.
const MAX_LINES: usize = 800;
/// Worth a look from here on.
const LONG_LINES: usize = 500;
/// What is bigger is made at build time instead.
const MAX_BYTES: u64 = 1 << 20;
const CODE: &[&str] = &["rs", "py", "mjs", "js", "ts", "sh", "proto", "sql"];

/// Whether a file is program text.
pub(super) fn is_code(path: &Path) -> bool {
    path.extension().is_some_and(|kind| CODE.iter().any(|each| kind == *each))
}

pub(super) fn check(files: &[ProjectFile], report: &mut Report) {
    for file in files {
        if file.bytes > MAX_BYTES {
            report.find(&file.path, 1, "size", "over 1 MiB: make it at build time instead");
        }
        if !is_code(&file.path) {
            continue;
        }
        check_name(&file.path, report);
        let lines = file.text.as_deref().map_or(0, |text| text.lines().count());
        if lines > MAX_LINES {
            let advice = format!("{lines} lines, at most {MAX_LINES}: split it by question");
            report.find(&file.path, MAX_LINES + 1, "length", advice);
        } else if lines > LONG_LINES {
            let advice = format!("{lines} lines: does it still answer one question?");
            report.note(&file.path, LONG_LINES + 1, "length", advice);
        }
    }
}

fn check_name(path: &Path, report: &mut Report) {
    // Under `tests/` it is cargo's way to say that a file is not a test program of its own.
    let is_shared_by_tests = path.components().any(|part| part.as_os_str() == "tests");
    if path.file_name().is_some_and(|name| name == "mod.rs") && !is_shared_by_tests {
        report.find(path, 1, "names", "use `name.rs` beside `name/` instead of `mod.rs`");
    }
    let parts = path.components().map(|part| Path::new(part.as_os_str()).file_stem());
    for part in parts.flatten().filter_map(|part| part.to_str()) {
        if EMPTY_NAMES.contains(&part) {
            let advice = format!("`{part}` says nothing: name it after the question it answers");
            report.find(path, 1, "names", advice);
        }
    }
}

pub(super) fn check_architecture(packages: &[Package], files: &[ProjectFile], report: &mut Report) {
    let path = Path::new("ARCHITECTURE.md");
    let page = files.iter().find(|file| file.path == path).and_then(|file| file.text.as_deref());
    let Some(page) = page else {
        report.find(path, 1, "architecture", "the page is missing: it lists every crate");
        return;
    };
    for package in packages {
        let name = short_name(&package.name);
        if !page.contains(&format!("`{name}`")) {
            let advice = format!("crate `{name}` is not on the page: say what it owns");
            report.find(path, 1, "architecture", advice);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, rules};

    #[test]
    fn names_that_say_nothing_are_found() {
        let mut report = Report::default();
        let files = [
            file("crates/a/src/utils.rs", ""),
            file("crates/a/src/core/disk.rs", ""),
            file("crates/a/src/disk/mod.rs", ""),
            file("crates/a/src/disk.rs", ""),
            file("crates/a/tests/support/mod.rs", ""),
            file("docs/core.md", ""),
        ];
        check(&files, &mut report);
        let found: Vec<_> = rules(&report).into_iter().map(|(file, ..)| file).collect();
        assert_eq!(
            found,
            ["crates/a/src/utils.rs", "crates/a/src/core/disk.rs", "crates/a/src/disk/mod.rs"]
        );
    }

    #[test]
    fn long_files_are_noted_and_too_long_ones_found() {
        let mut report = Report::default();
        let files = [
            file("a.rs", &"x\n".repeat(500)),
            file("b.rs", &"x\n".repeat(501)),
            file("c.rs", &"x\n".repeat(801)),
            file("d.md", &"x\n".repeat(2000)),
        ];
        check(&files, &mut report);
        assert_eq!(rules(&report), [("c.rs".to_owned(), 801, "length")]);
        assert_eq!(report.notes.len(), 1);
    }

    #[test]
    fn every_crate_is_on_the_architecture_page() {
        let package = |name: &str| Package {
            name: name.to_owned(),
            manifest_path: "Cargo.toml".into(),
            dependencies: Vec::new(),
        };
        let packages = [package("belljar-wire"), package("belljar-proxy")];
        let mut report = Report::default();
        check_architecture(&packages, &[file("ARCHITECTURE.md", "`wire`, proxy")], &mut report);
        assert_eq!(report.findings.len(), 1);
        assert!(report.findings[0].advice.contains("`proxy`"));
        let mut report = Report::default();
        check_architecture(&packages, &[], &mut report);
        assert_eq!(report.findings.len(), 1);
    }
}
