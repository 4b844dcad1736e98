//! Where the backports of this Debian release come from: beside apt's own entry for the release.
//!
//! No mirror is named anywhere in this project: whoever set the machine up chose one.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The Debian release of a machine.
pub(super) struct Release {
    codename: String,
}

impl Release {
    /// Reads `/etc/os-release`.
    pub(super) fn of_this_machine() -> Result<Release> {
        let text = std::fs::read_to_string("/etc/os-release").context("cannot read os-release")?;
        Release::parse(&text)
    }

    fn parse(text: &str) -> Result<Release> {
        let field = |name: &str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value.trim_matches('"').to_owned())
        };
        match (field("ID").as_deref(), field("VERSION_CODENAME")) {
            (Some("debian"), Some(codename)) => Ok(Release { codename }),
            (id, _) => bail!("this is not a Debian release (ID={})", id.unwrap_or("unknown")),
        }
    }

    /// Name of the backports suite.
    pub(super) fn backports(&self) -> String {
        format!("{}-backports", self.codename)
    }
}

/// A file for `/etc/apt/sources.list.d`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct SourceFile {
    pub(super) path: PathBuf,
    pub(super) text: String,
}

/// Derives the backports entry from the entry of the release itself under `etc_apt`.
///
/// # Errors
/// There is no entry that looks like Debian's own.
pub(super) fn backports_from_own(etc_apt: &Path, release: &Release) -> Result<SourceFile> {
    let mut best: Option<(u32, SourceFile)> = None;
    for path in source_files(etc_apt)? {
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("cannot read {}", path.display()))?;
        let is_deb822 = path.extension().is_some_and(|kind| kind == "sources");
        let found =
            if is_deb822 { deb822_entries(&text, release) } else { line_entries(&text, release) };
        for (score, text) in found {
            if best.as_ref().is_none_or(|(so_far, _)| score > *so_far) {
                let name =
                    if is_deb822 { "belljar-backports.sources" } else { "belljar-backports.list" };
                best = Some((
                    score,
                    SourceFile { path: etc_apt.join("sources.list.d").join(name), text },
                ));
            }
        }
    }
    let Some((_, source)) = best else {
        bail!("found no Debian entry for {} under {}", release.codename, etc_apt.display());
    };
    Ok(source)
}

/// `sources.list`, then what lies in `sources.list.d`, in the order apt reads them.
fn source_files(etc_apt: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    let folder = etc_apt.join("sources.list.d");
    if folder.is_dir() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.extension().is_some_and(|kind| kind == "sources" || kind == "list") {
                files.push(path);
            }
        }
    }
    files.sort();
    let single = etc_apt.join("sources.list");
    if single.is_file() {
        files.insert(0, single);
    }
    Ok(files)
}

/// How sure we are that an entry is Debian's: third parties use the codename as well.
fn score(uri: &str, has_debian_key: bool, has_updates: bool) -> u32 {
    let is_named_debian = uri.trim_end_matches('/').ends_with("/debian")
        || uri.trim_end_matches('/').ends_with("/debian.list");
    u32::from(has_debian_key) * 4 + u32::from(is_named_debian) * 2 + u32::from(has_updates)
}

fn deb822_entries(text: &str, release: &Release) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    // A comment line may stand inside an entry; only an empty line ends it.
    let kept: Vec<&str> = text.lines().filter(|line| !line.starts_with('#')).collect();
    for entry in kept.split(|line| line.trim().is_empty()) {
        let value = |name: &str| {
            entry
                .iter()
                .filter_map(|line| line.split_once(':'))
                .find(|(key, _)| key.eq_ignore_ascii_case(name))
                .map_or("", |(_, value)| value.trim())
        };
        let has = |name: &str, word: &str| value(name).split_whitespace().any(|each| each == word);
        let is_off = value("Enabled").eq_ignore_ascii_case("no");
        if is_off || !has("Types", "deb") || !has("Components", "main") {
            continue;
        }
        if !has("Suites", &release.codename) {
            continue;
        }
        let is_keyed = value("Signed-By").contains("debian-archive");
        let has_updates = has("Suites", &format!("{}-updates", release.codename));
        let uri = value("URIs").split_whitespace().next().unwrap_or_default();
        let score = score(uri, is_keyed, has_updates);
        if score > 0 {
            found.push((score, rewrite_deb822(entry, release)));
        }
    }
    found
}

fn rewrite_deb822(entry: &[&str], release: &Release) -> String {
    let mut text = String::new();
    for line in entry {
        let line = match line.split_once(':') {
            Some((key, _)) if key.eq_ignore_ascii_case("Types") => "Types: deb".to_owned(),
            Some((key, _)) if key.eq_ignore_ascii_case("Suites") => {
                format!("Suites: {}", release.backports())
            }
            Some((key, _)) if key.eq_ignore_ascii_case("Components") => {
                "Components: main".to_owned()
            }
            _ => (*line).to_owned(),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// One-line entries: `deb [options] URI suite component...`.
fn line_entries(text: &str, release: &Release) -> Vec<(u32, String)> {
    let mut found = Vec::new();
    let updates = format!("{}-updates", release.codename);
    let has_updates = text.lines().any(|line| line.split_whitespace().any(|word| word == updates));
    for line in text.lines() {
        let Some(rest) = line
            .trim()
            .strip_prefix("deb")
            .filter(|rest| rest.starts_with(|next: char| next.is_whitespace() || next == '['))
        else {
            continue;
        };
        let rest = rest.trim();
        let (options, rest) = match rest.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
            Some((options, rest)) => (format!("[{options}] "), rest.trim()),
            None => (String::new(), rest),
        };
        let mut words = rest.split_whitespace();
        let (Some(uri), Some(suite)) = (words.next(), words.next()) else { continue };
        if suite != release.codename || !words.any(|word| word == "main") {
            continue;
        }
        let score = score(uri, options.contains("debian-archive"), has_updates);
        if score > 0 {
            found.push((score, format!("deb {options}{uri} {} main\n", release.backports())));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release() -> Release {
        Release { codename: "bookworm".to_owned() }
    }

    #[test]
    fn only_debian_is_accepted() {
        let text = "ID=debian\nVERSION_CODENAME=bookworm\n";
        assert_eq!(Release::parse(text).unwrap().backports(), "bookworm-backports");
        assert!(Release::parse("ID=ubuntu\nVERSION_CODENAME=noble\n").is_err());
    }

    #[test]
    fn a_deb822_entry_keeps_its_mirror_and_key() {
        let text = "Types: deb deb-src\n# a comment\nURIs: http://mirror.test/debian\n\
            Suites: bookworm bookworm-updates\nComponents: main contrib\n\
            Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\n\
            Types: deb\nURIs: http://mirror.test/debian-security\nSuites: bookworm-security\n\
            Components: main\n";
        let found = deb822_entries(text, &release());
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].1,
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm-backports\n\
             Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
    }

    #[test]
    fn a_line_entry_keeps_its_options() {
        let text = "# deb http://off.test/debian bookworm main\n\
            deb [arch=amd64] http://mirror.test/debian/ bookworm main contrib\n\
            deb http://mirror.test/debian bookworm-updates main\n\
            deb-src http://mirror.test/debian bookworm main\n";
        let found = line_entries(text, &release());
        assert_eq!(found.len(), 1);
        assert_eq!(
            found[0].1,
            "deb [arch=amd64] http://mirror.test/debian/ bookworm-backports main\n"
        );
    }

    #[test]
    fn a_third_party_that_uses_the_codename_is_not_taken() {
        let text = "deb [signed-by=/k.gpg] https://tools.test/apt bookworm main\n";
        assert!(line_entries(text, &release()).is_empty());
        let text = "Types: deb\nURIs: https://tools.test/apt\nSuites: bookworm\n\
            Components: main\nSigned-By: /k.gpg\n";
        assert!(deb822_entries(text, &release()).is_empty());
    }

    #[test]
    fn an_entry_that_is_switched_off_is_not_taken() {
        let text = "Enabled: no\nTypes: deb\nURIs: http://mirror.test/debian\nSuites: bookworm\n\
            Components: main\n";
        assert!(deb822_entries(text, &release()).is_empty());
    }

    #[test]
    fn the_best_entry_of_a_folder_wins() {
        let folder = std::env::temp_dir().join(format!("xtask-apt-{}", std::process::id()));
        let list_folder = folder.join("sources.list.d");
        std::fs::create_dir_all(&list_folder).unwrap();
        std::fs::write(folder.join("sources.list"), "deb http://copy.test/debian bookworm main\n")
            .unwrap();
        std::fs::write(
            list_folder.join("debian.sources"),
            "Types: deb\nURIs: http://mirror.test/debian\nSuites: bookworm\nComponents: main\n\
             Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg\n",
        )
        .unwrap();
        let source = backports_from_own(&folder, &release()).unwrap();
        assert_eq!(source.path, list_folder.join("belljar-backports.sources"));
        assert!(source.text.contains("mirror.test"));
        std::fs::remove_file(list_folder.join("debian.sources")).unwrap();
        std::fs::remove_file(folder.join("sources.list")).unwrap();
        assert!(backports_from_own(&folder, &release()).is_err());
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
