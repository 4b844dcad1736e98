//! What must not stand in a file: registry hosts, paths of one machine, unfinished marks, stray
//! `unsafe`.

use std::path::{Path, PathBuf};

use super::names::is_code;
use super::{ProjectFile, Report};

/// Host names of package registries, in pieces so that this file does not name them either.
const REGISTRIES: &[&[&str]] = &[
    &["deb", "debian", "org"],
    &["security", "debian", "org"],
    &["snapshot", "debian", "org"],
    &["static", "crates", "io"],
    &["index", "crates", "io"],
    &["registry", "npmjs", "org"],
    &["files", "pythonhosted", "org"],
    &["pypi", "org"],
    &["deb", "nodesource", "com"],
    &["proxy", "golang", "org"],
];

/// Marks of unfinished work, in pieces for the same reason.
const MARKS: &[&[&str]] =
    &[&["TO", "DO"], &["FIX", "ME"], &["todo", "!("], &["unimplemented", "!("], &["#[ig", "nore"]];

/// Cargo writes its registry's name into the lock file; there is no way not to.
const LOCK_FILE: &str = "Cargo.lock";

/// Folders that hold checkouts on many machines, and that texts about Linux name for good reason.
const ORDINARY_PARENTS: &[&str] =
    &["/", "/home", "/root", "/srv", "/opt", "/usr", "/usr/src", "/var", "/tmp", "/mnt"];

/// Paths that give away the machine a file was written on.
pub(super) fn local_paths(root: &Path) -> Vec<String> {
    let mut paths = vec![root.display().to_string()];
    if let Some(parent) = root.parent().map(|parent| parent.display().to_string())
        && !ORDINARY_PARENTS.contains(&parent.as_str())
    {
        paths.push(format!("{parent}/"));
    }
    paths
}

pub(super) fn check(files: &[ProjectFile], local_paths: &[String], report: &mut Report) {
    let hosts: Vec<String> = REGISTRIES.iter().map(|parts| parts.join(".")).collect();
    let marks: Vec<String> = MARKS.iter().map(|parts| parts.concat()).collect();
    for file in files {
        let Some(text) = &file.text else { continue };
        if file.path == Path::new(LOCK_FILE) {
            continue;
        }
        for (index, line) in text.lines().enumerate() {
            let number = index + 1;
            for host in hosts.iter().filter(|host| line.contains(*host)) {
                let advice =
                    format!("names {host}: take the host from the machine's own configuration");
                report.find(&file.path, number, "hosts", advice);
            }
            for path in local_paths.iter().filter(|path| has_path(line, path)) {
                let advice = format!("names {path}, a path of this machine: make it relative");
                report.find(&file.path, number, "paths", advice);
            }
            if is_code(&file.path) {
                for mark in marks.iter().filter(|mark| has_mark(line, mark)) {
                    let advice = format!("{mark}: finish it, or write it into an issue");
                    report.find(&file.path, number, "unfinished", advice);
                }
            }
        }
        if file.path.extension().is_some_and(|kind| kind == "rs") {
            check_unsafe(file, text, files, report);
        }
    }
}

/// A path counts where it begins and ends as one: `/w` is not in `/a/w` and not in `/world`.
fn has_path(line: &str, path: &str) -> bool {
    line.match_indices(path).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + path.len()..].chars().next();
        let continues = |next: char| next.is_alphanumeric() || next == '_' || next == '-';
        let is_inner = before.is_some_and(|last| continues(last) || last == '.' || last == '}');
        !is_inner && (path.ends_with('/') || !after.is_some_and(continues))
    })
}

/// Words count as whole words; macros and attributes wherever they stand.
fn has_mark(line: &str, mark: &str) -> bool {
    let is_word = mark.bytes().all(|byte| byte.is_ascii_uppercase());
    line.match_indices(mark).any(|(at, _)| {
        let before = line[..at].chars().next_back();
        let after = line[at + mark.len()..].chars().next();
        let joined =
            |next: Option<char>| next.is_some_and(|each| each.is_alphanumeric() || each == '_');
        !is_word || !(joined(before) || joined(after))
    })
}

/// `unsafe` lives in modules called `sys`, under a word on why it is needed at all.
fn check_unsafe(file: &ProjectFile, text: &str, files: &[ProjectFile], report: &mut Report) {
    let is_sys_file = sys_root(&file.path).is_some();
    let mut inline_end: Option<String> = None;
    for (index, line) in text.lines().enumerate() {
        if inline_end.as_deref() == Some(line) {
            inline_end = None;
        } else if inline_end.is_none() && line.trim_start().starts_with("mod sys {") {
            // Formatted code closes a block where it opened it.
            let indent = &line[..line.len() - line.trim_start().len()];
            inline_end = Some(format!("{indent}}}"));
        }
        if !has_unsafe(line) {
            continue;
        }
        if !is_sys_file && inline_end.is_none() {
            report.find(&file.path, index + 1, "unsafe", "move it to a module called `sys`");
        } else if !is_justified(file, text, files) {
            let advice = "say after `JUSTIFICATION:`, at the top, why no safe interface will do";
            report.find(&file.path, index + 1, "unsafe", advice);
        }
        // One finding a file is enough to act on.
        return;
    }
}

/// The `sys.rs` a file belongs to: itself, or the one beside the folder `sys` it lies in.
fn sys_root(path: &Path) -> Option<PathBuf> {
    let top = path.ancestors().find(|part| part.file_stem().is_some_and(|name| name == "sys"))?;
    Some(top.with_extension("rs"))
}

fn is_justified(file: &ProjectFile, text: &str, files: &[ProjectFile]) -> bool {
    const WORD: &str = "JUSTIFICATION:";
    let root = sys_root(&file.path);
    let of_root = files.iter().find(|each| Some(&each.path) == root.as_ref());
    text.contains(WORD)
        || of_root.and_then(|each| each.text.as_deref()).is_some_and(|text| text.contains(WORD))
}

/// The keyword in code: not in a comment, not in a longer word, not between quotes or backticks.
fn has_unsafe(line: &str) -> bool {
    let code = line.split("//").next().unwrap_or(line);
    code.match_indices("unsafe").any(|(at, word)| {
        let before = code[..at].chars().next_back();
        let after = code[at + word.len()..].chars().next();
        let starts = before.is_none_or(|last| !last.is_alphanumeric() && !"_`\"'".contains(last));
        starts && after.is_none_or(|next| next == ' ' || next == '{' || next == '(')
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tidy::{file, rules};

    fn found(path: &str, text: &str) -> Vec<(String, usize, &'static str)> {
        let mut report = Report::default();
        check(&[file(path, text)], &local_paths(Path::new("/build/checkout")), &mut report);
        rules(&report)
    }

    #[test]
    fn hosts_are_found_everywhere_but_in_the_lock_file() {
        let text = format!("first\nhttp://{}/debian\n", REGISTRIES[0].join("."));
        assert_eq!(found("README.md", &text), [("README.md".to_owned(), 2, "hosts")]);
        assert!(found(LOCK_FILE, &text).is_empty());
    }

    #[test]
    fn paths_of_the_machine_are_found() {
        assert_eq!(found("a.toml", "x = \"/build/checkout/y\"").len(), 2);
        assert_eq!(found("a.toml", "x = \"/build/other\"").len(), 1);
        assert!(found("a.toml", "x = \"target/build/checkout-list\"").is_empty());
        assert_eq!(local_paths(Path::new("/home/checkout")), ["/home/checkout"]);
    }

    #[test]
    fn unfinished_marks_are_found_in_code_only() {
        for mark in MARKS {
            let line = format!("    {} later", mark.concat());
            assert_eq!(found("a.rs", &line).len(), 1, "{line}");
            assert!(found("a.md", &line).is_empty(), "{line}");
        }
        assert!(found("a.rs", &format!("const MY_{}S: u8 = 1;", MARKS[0].concat())).is_empty());
    }

    #[test]
    fn unsafe_needs_its_module_and_its_reason() {
        assert_eq!(found("crates/a/src/disk.rs", "fn f() {\nunsafe { g() }\n}").len(), 1);
        assert_eq!(found("crates/a/src/sys.rs", "unsafe fn f() {}").len(), 1);
        let justified = "// JUSTIFICATION: no safe binding\nunsafe fn f() {}";
        assert!(found("crates/a/src/sys.rs", justified).is_empty());
        assert!(found("crates/a/src/sys/kvm.rs", justified).is_empty());
        let inline = "// JUSTIFICATION: as above\nmod sys {\n    pub fn f() { unsafe { g() } }\n}";
        assert!(found("crates/a/src/disk.rs", inline).is_empty());
        assert_eq!(found("crates/a/src/disk.rs", &format!("{inline}\n{inline}")).len(), 0);
        let after = format!("mod sys {{\n}}\n{justified}");
        assert_eq!(found("crates/a/src/disk.rs", &after).len(), 1);
    }

    #[test]
    fn a_file_under_sys_is_justified_by_its_parent() {
        let child = file("crates/a/src/sys/kvm.rs", "unsafe fn f() {}");
        let parent = file("crates/a/src/sys.rs", "//! JUSTIFICATION: no safe binding");
        let mut report = Report::default();
        check(&[child, parent], &[], &mut report);
        assert!(report.is_clean(), "{:?}", rules(&report));
    }

    #[test]
    fn the_word_alone_is_not_code() {
        for line in
            ["#![forbid(unsafe_code)]", "// unsafe { }", "/// An `unsafe` block", "\"unsafe {\""]
        {
            assert!(found("a.rs", line).is_empty(), "{line}");
        }
    }
}
