//! Where the host's own apt gets Debian from, as the guest's `debian.sources`.
//!
//! Reads both formats apt knows: one line an entry (`*.list`) and paragraphs (`*.sources`). Taken
//! are Debian's own archives only; third-party repositories and backports are left out. When the
//! host runs another Debian release, its mirror's entries are asked for the guest's release.
//!
//! Formats: `sources.list(5)`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

/// Releases whose mirrors also carry the guest's.
const RELEASES: [&str; 9] =
    ["bookworm", "trixie", "forky", "duke", "sid", "stable", "testing", "unstable", "oldstable"];

/// Why no sources could be taken over.
#[derive(Debug, thiserror::Error)]
pub enum SourcesError {
    /// A file of apt's configuration could not be read.
    #[error("read apt's sources in {}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The host's apt knows no Debian archive.
    #[error(
        "find a Debian archive in apt's sources under {}: the guest is made of {suite} packages; \
         add a Debian mirror there",
        path.display()
    )]
    NoDebian {
        /// Where was looked.
        path: PathBuf,
        /// The wanted release.
        suite: String,
    },
}

/// Debian archives in apt's own words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sources {
    /// Paragraphs of a `.sources` file.
    pub text: String,
    /// Keyring files of the host that the text names.
    pub keyrings: Vec<PathBuf>,
}

/// One entry of either format.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Entry {
    types: Vec<String>,
    uris: Vec<String>,
    suites: Vec<String>,
    components: Vec<String>,
    signed_by: Option<String>,
    disabled: bool,
}

/// Reads the Debian archives of `suite` that the apt configuration folder `etc_apt` knows.
///
/// # Errors
/// [`SourcesError`].
pub fn host_sources(etc_apt: &Path, suite: &str) -> Result<Sources, SourcesError> {
    let mut entries = Vec::new();
    let main = etc_apt.join("sources.list");
    if main.exists() {
        entries.extend(parse_lines(&read(&main)?));
    }
    let folder = etc_apt.join("sources.list.d");
    let mut files = match std::fs::read_dir(&folder) {
        Ok(files) => files
            .map(|file| file.map(|f| f.path()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(|source| SourcesError::Io { path: folder, source })?,
        Err(_) => Vec::new(),
    };
    files.sort();
    for file in files {
        match file.extension().and_then(|e| e.to_str()) {
            Some("list") => entries.extend(parse_lines(&read(&file)?)),
            Some("sources") => entries.extend(parse_paragraphs(&read(&file)?)),
            _ => {}
        }
    }
    expand_mirror_files(&mut entries)?;
    select(&entries, suite)
        .ok_or_else(|| SourcesError::NoDebian { path: etc_apt.to_owned(), suite: suite.to_owned() })
}

fn read(path: &Path) -> Result<String, SourcesError> {
    std::fs::read_to_string(path)
        .map_err(|source| SourcesError::Io { path: path.to_owned(), source })
}

/// `deb [option=value ...] uri suite component...`
fn parse_lines(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for line in text.lines() {
        let line = line.split('#').next().unwrap_or_default();
        let (head, options) = match line.split_once('[') {
            Some((head, rest)) => match rest.split_once(']') {
                Some((options, tail)) => (format!("{head} {tail}"), options),
                None => continue,
            },
            None => (line.to_owned(), ""),
        };
        let mut words = head.split_whitespace().map(str::to_owned);
        let (Some(kind), Some(uri), Some(suite)) = (words.next(), words.next(), words.next())
        else {
            continue;
        };
        let signed_by = options
            .split_whitespace()
            .filter_map(|option| option.split_once('='))
            .find(|(name, _)| name.eq_ignore_ascii_case("signed-by"))
            .map(|(_, value)| value.to_owned());
        entries.push(Entry {
            types: vec![kind],
            uris: vec![uri],
            suites: vec![suite],
            components: words.collect(),
            signed_by,
            disabled: false,
        });
    }
    entries
}

/// `Field: value` paragraphs; a value goes on in lines that begin with white space.
fn parse_paragraphs(text: &str) -> Vec<Entry> {
    let mut entries = Vec::new();
    for paragraph in paragraphs(text) {
        let mut entry = Entry::default();
        for (name, value) in paragraph {
            let words = || value.split_whitespace().map(str::to_owned).collect();
            match name.to_ascii_lowercase().as_str() {
                "types" => entry.types = words(),
                "uris" => entry.uris = words(),
                "suites" => entry.suites = words(),
                "components" => entry.components = words(),
                "signed-by" => entry.signed_by = Some(value.trim().to_owned()),
                "enabled" => entry.disabled = is_no(&value),
                _ => {}
            }
        }
        entries.push(entry);
    }
    entries
}

fn is_no(value: &str) -> bool {
    ["no", "false", "without", "off", "disable"].contains(&value.trim().to_lowercase().as_str())
}

fn paragraphs(text: &str) -> Vec<Vec<(String, String)>> {
    let mut all: Vec<Vec<(String, String)>> = vec![Vec::new()];
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let current = all.last_mut().expect("the list starts with one and only grows");
        if line.trim().is_empty() {
            if !current.is_empty() {
                all.push(Vec::new());
            }
        } else if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = current.last_mut() {
                value.push('\n');
                value.push_str(line);
            }
        } else if let Some((name, value)) = line.split_once(':') {
            current.push((name.trim().to_owned(), value.trim().to_owned()));
        }
    }
    all.retain(|paragraph| !paragraph.is_empty());
    all
}

/// Replaces `mirror+file:` by the first mirror in that file: the guest does not have the file.
fn expand_mirror_files(entries: &mut [Entry]) -> Result<(), SourcesError> {
    for uri in entries.iter_mut().flat_map(|entry| &mut entry.uris) {
        let Some(path) = uri.strip_prefix("mirror+file:") else { continue };
        let path = PathBuf::from(format!("/{}", path.trim_start_matches('/')));
        let text = read(&path)?;
        let first = text.lines().filter_map(|line| line.split_whitespace().next());
        *uri = first
            .filter(|word| !word.starts_with('#'))
            .map(str::to_owned)
            .next()
            .unwrap_or_default();
    }
    Ok(())
}

/// The Debian archives of `suite` among `entries`; `None` without its main archive.
fn select(entries: &[Entry], suite: &str) -> Option<Sources> {
    let own = stanzas(entries, suite, suite);
    let found = if own.is_empty() {
        RELEASES.iter().map(|release| stanzas(entries, release, suite)).find(|s| !s.is_empty())?
    } else {
        own
    };
    if !found.iter().any(|stanza| stanza.suites.contains(suite)) {
        return None;
    }
    let mut text = String::new();
    let mut keyrings = BTreeSet::new();
    for stanza in found {
        let suites: Vec<&str> = stanza.suites.iter().map(String::as_str).collect();
        let written = write!(
            text,
            "{}Types: deb\nURIs: {}\nSuites: {}\nComponents: main\n",
            if text.is_empty() { "" } else { "\n" },
            stanza.uri,
            suites.join(" ")
        );
        written.expect("writing to a string does not fail");
        if let Some(signed_by) = stanza.signed_by {
            // A key inside the entry begins on a line of its own.
            let separator = if signed_by.contains('\n') { "\n " } else { " " };
            text.push_str(&format!("Signed-By:{separator}{signed_by}\n"));
            if signed_by.starts_with('/') {
                keyrings.extend(signed_by.split_whitespace().map(PathBuf::from));
            }
        }
    }
    Some(Sources { text, keyrings: keyrings.into_iter().collect() })
}

struct Stanza {
    uri: String,
    suites: BTreeSet<String>,
    signed_by: Option<String>,
}

/// One stanza an archive, for the entries that are Debian's `release`, asked for `suite`.
fn stanzas(entries: &[Entry], release: &str, suite: &str) -> Vec<Stanza> {
    let mut found: Vec<Stanza> = Vec::new();
    for entry in entries.iter().filter(|entry| is_debian(entry)) {
        for uri in entry.uris.iter().filter(|uri| is_debian_uri(uri)) {
            for theirs in &entry.suites {
                let Some(ours) = translate(theirs, release, suite) else { continue };
                let same = |s: &&mut Stanza| s.uri == *uri && s.signed_by == entry.signed_by;
                match found.iter_mut().find(same) {
                    Some(stanza) => {
                        stanza.suites.insert(ours);
                    }
                    None => found.push(Stanza {
                        uri: uri.clone(),
                        suites: BTreeSet::from([ours]),
                        signed_by: entry.signed_by.clone(),
                    }),
                }
            }
        }
    }
    found
}

/// `release`, `release-updates` or `release-security` as the same part of `suite`. Anything else,
/// backports among it, is not taken.
fn translate(theirs: &str, release: &str, suite: &str) -> Option<String> {
    let part = theirs.strip_prefix(release)?;
    ["", "-updates", "-security"].contains(&part).then(|| format!("{suite}{part}"))
}

fn is_debian(entry: &Entry) -> bool {
    let keyring_is_debians = entry.signed_by.as_deref().is_none_or(|signed_by| {
        // A key written into the entry itself has no name to judge by.
        !signed_by.starts_with('/')
            || signed_by.split_whitespace().all(|path| {
                path.rsplit('/').next().is_some_and(|name| name.starts_with("debian-archive"))
            })
    });
    !entry.disabled
        && keyring_is_debians
        && entry.types.iter().any(|kind| kind == "deb")
        && entry.components.iter().any(|component| component == "main")
}

/// Whether the address is of a copy of Debian's archive, and free of a password: the guest sees it.
fn is_debian_uri(uri: &str) -> bool {
    let Some((scheme, rest)) = uri.split_once("://") else { return false };
    let last = rest.trim_end_matches('/').rsplit('/').next().unwrap_or_default();
    ["http", "https"].contains(&scheme)
        && !rest.contains('@')
        && ["debian", "debian-security"].contains(&last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARAGRAPHS: &str = "\
Types: deb
# a comment between fields
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb deb-src
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian
Suites: bookworm-backports
Components: main

Types: deb
URIs: https://vendor.example/stable/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/vendor.gpg

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main
";

    const WANTED: &str = "\
Types: deb
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example/debian-security/
Suites: bookworm-security
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
";

    #[test]
    fn paragraphs_keep_debians_archives_only() {
        let found = select(&parse_paragraphs(PARAGRAPHS), "bookworm").expect("found");
        assert_eq!(found.text, WANTED);
        let keyring = PathBuf::from("/usr/share/keyrings/debian-archive-keyring.gpg");
        assert_eq!(found.keyrings, [keyring]);
    }

    #[test]
    fn lines_say_the_same_as_paragraphs() {
        let keyring = "/usr/share/keyrings/debian-archive-keyring.gpg";
        let lines = format!(
            "deb [arch=amd64 signed-by={keyring}] http://mirror.example/debian bookworm main # x\n\
             deb [ Signed-By={keyring} ] http://mirror.example/debian bookworm-updates main\n\
             deb [signed-by={keyring}] http://mirror.example/debian-security/ bookworm-security main\n\
             # deb http://commented.example/debian bookworm main\n\
             deb-src http://mirror.example/debian bookworm main\n\
             deb http://mirror.example/debian bookworm contrib\n\
             deb https://vendor.example/apt bookworm main\n\
             deb https://name:secret@private.example/debian bookworm main\n\
             broken [ line\n"
        );
        assert_eq!(select(&parse_lines(&lines), "bookworm").expect("found").text, WANTED);
    }

    #[test]
    fn another_releases_mirror_is_asked_for_ours() {
        let text = PARAGRAPHS.replace("bookworm", "trixie");
        assert_eq!(select(&parse_paragraphs(&text), "bookworm").expect("found").text, WANTED);
        let ubuntu = PARAGRAPHS.replace("bookworm", "noble");
        assert_eq!(select(&parse_paragraphs(&ubuntu), "bookworm"), None);
        assert_eq!(select(&[], "bookworm"), None);
    }

    #[test]
    fn a_key_inside_the_entry_is_kept_whole() {
        let text = "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm\n\
                    Components: main\nSigned-By:\n -----BEGIN-----\n .\n abc\n -----END-----\n";
        let found = select(&parse_paragraphs(text), "bookworm").expect("found");
        assert!(
            found.text.contains("-----BEGIN-----\n .\n abc\n -----END-----\n"),
            "{}",
            found.text
        );
        assert_eq!(found.keyrings, Vec::<PathBuf>::new());
    }

    #[test]
    fn both_formats_and_mirror_files_are_found_in_a_folder() {
        let dir = tempfile::tempdir().expect("temp folder");
        let parts = dir.path().join("sources.list.d");
        std::fs::create_dir(&parts).expect("mkdir");
        let e = host_sources(dir.path(), "bookworm").expect_err("empty");
        assert!(matches!(e, SourcesError::NoDebian { .. }));
        let mirrors = dir.path().join("mirrors");
        std::fs::write(&mirrors, "# best first\nhttp://mirror.example/debian priority:1\n")
            .expect("write");
        let uri = format!("mirror+file:{}", mirrors.display());
        std::fs::write(dir.path().join("sources.list"), format!("deb {uri} bookworm main\n"))
            .expect("write");
        std::fs::write(
            parts.join("security.sources"),
            PARAGRAPHS.split("\n\n").nth(1).expect("two"),
        )
        .expect("write");
        std::fs::write(
            parts.join("old.list.disabled"),
            "deb http://x.example/debian bookworm main",
        )
        .expect("write");
        let found = host_sources(dir.path(), "bookworm").expect("found").text;
        assert!(found.contains("URIs: http://mirror.example/debian\n"), "{found}");
        assert!(found.contains("Suites: bookworm-security\n"), "{found}");
        assert!(!found.contains("x.example"), "{found}");
    }
}
