//! `cargo xtask tidy`: the rules of this project that no compiler knows.
//!
//! Every finding reads `file:line: rule: what to do`.

mod layers;
mod names;
mod text;

use std::fmt;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;
use crate::places::Places;

/// One broken rule.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// Relative to the root of the checkout.
    file: PathBuf,
    /// From 1; 1 for what concerns the whole file.
    line: usize,
    rule: &'static str,
    advice: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}: {}: {}", self.file.display(), self.line, self.rule, self.advice)
    }
}

/// Everything found.
#[derive(Debug, Default)]
pub(crate) struct Report {
    findings: Vec<Finding>,
    /// Worth a look, not a failure.
    notes: Vec<Finding>,
}

impl Report {
    /// Whether no rule is broken.
    pub(crate) fn is_clean(&self) -> bool {
        self.findings.is_empty()
    }

    fn find(&mut self, file: &Path, line: usize, rule: &'static str, advice: impl Into<String>) {
        self.findings.push(Finding { file: file.to_owned(), line, rule, advice: advice.into() });
    }

    fn note(&mut self, file: &Path, line: usize, rule: &'static str, advice: impl Into<String>) {
        self.notes.push(Finding { file: file.to_owned(), line, rule, advice: advice.into() });
    }
}

/// A file that is part of the project: tracked, or new and not ignored.
struct ProjectFile {
    /// Relative to the root.
    path: PathBuf,
    /// `None` if it is not UTF-8.
    text: Option<String>,
    bytes: u64,
}

/// Checks the checkout and prints what is found.
pub(crate) fn run(places: &Places) -> Result<Report> {
    let files = project_files(&places.root)?;
    let mut report = Report::default();
    layers::check(&places.packages, &places.root, &mut report);
    names::check(&files, &mut report);
    names::check_architecture(&places.packages, &files, &mut report);
    text::check(&files, &text::local_paths(&places.root), &mut report);
    report.findings.sort();
    report.notes.sort();
    for note in &report.notes {
        println!("note: {note}");
    }
    for finding in &report.findings {
        println!("{finding}");
    }
    let verdict = if report.is_clean() { "clean" } else { "NOT clean" };
    println!(
        "tidy: {verdict}: {} files, {} findings, {} notes",
        files.len(),
        report.findings.len(),
        report.notes.len()
    );
    if !report.is_clean() && std::io::stdout().is_terminal() {
        println!("the rules and their reasons are in CONTRIBUTING.md");
    }
    Ok(report)
}

fn project_files(root: &Path) -> Result<Vec<ProjectFile>> {
    let mut git = Command::new("git");
    git.current_dir(root);
    git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let list = command::output(git).context("tidy asks git for the list of files")?;
    let mut files = Vec::new();
    for name in list.split_terminator('\0') {
        let path = root.join(name);
        // Deleted in the work tree but not in the index yet, or a link, which has no text of its own.
        if !std::fs::symlink_metadata(&path).is_ok_and(|found| found.is_file()) {
            continue;
        }
        let bytes = std::fs::read(&path).with_context(|| format!("cannot read {name}"))?;
        files.push(ProjectFile {
            path: PathBuf::from(name),
            bytes: u64::try_from(bytes.len()).expect("usize fits in 64 bits"),
            text: String::from_utf8(bytes).ok(),
        });
    }
    files.sort_by(|left, right| left.path.cmp(&right.path));
    files.dedup_by(|left, right| left.path == right.path);
    Ok(files)
}

#[cfg(test)]
fn file(path: &str, text: &str) -> ProjectFile {
    ProjectFile { path: path.into(), text: Some(text.to_owned()), bytes: 0 }
}

#[cfg(test)]
fn rules(report: &Report) -> Vec<(String, usize, &'static str)> {
    let row = |found: &Finding| (found.file.display().to_string(), found.line, found.rule);
    report.findings.iter().map(row).collect()
}
