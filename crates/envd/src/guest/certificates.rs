//! Certificate authorities of the host's making, added to those the machine trusts.
//!
//! A host that rewrites a sandbox's outgoing requests presents certificates of its own; programs
//! inside accept them once the authority stands in the bundle that OpenSSL, GnuTLS and Go read.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

/// Longest bundle taken, bytes. One that trusts the whole web is a quarter of it.
const BUNDLE_MAX_BYTES: usize = 1024 * 1024;

/// Longest bundle file of the machine that is rewritten, bytes.
const FILE_MAX_BYTES: u64 = 16 * 1024 * 1024;

/// The bundle files of Debian and Alpine, and of Fedora; the first is made when there is none.
const BUNDLES: [&str; 2] = ["etc/ssl/certs/ca-certificates.crt", "etc/pki/tls/certs/ca-bundle.crt"];

/// Kept where `update-ca-certificates` finds it, which writes the bundle anew from such files.
const LOCAL: &str = "usr/local/share/ca-certificates/belljar.crt";

/// Around what was added. Readers of such files skip whatever is outside the blocks.
const BEGIN: &str = "# belljar: authorities added by the host, begin\n";
const END: &str = "# belljar: authorities added by the host, end\n";

const BLOCK_BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const BLOCK_END: &str = "-----END CERTIFICATE-----";

/// What a DER certificate starts with: a sequence.
const DER_SEQUENCE: u8 = 0x30;

/// Why a bundle was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BundleError {
    /// It is longer than the limit.
    #[error("read a CA bundle of {0} bytes, more than {BUNDLE_MAX_BYTES}")]
    TooLong(usize),
    /// A block is not what it says, or there is none.
    #[error("read the CA bundle: line {0} is not part of a PEM certificate")]
    NotPem(usize),
}

/// Authorities to trust; none removes those added before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorities {
    /// Their PEM blocks, and nothing else.
    blocks: String,
}

impl Authorities {
    /// Reads PEM text. Comments between the blocks are left out.
    ///
    /// # Errors
    /// [`BundleError`] says which line is wrong.
    pub fn parse(bundle: &str) -> Result<Authorities, BundleError> {
        if bundle.len() > BUNDLE_MAX_BYTES {
            return Err(BundleError::TooLong(bundle.len()));
        }
        let mut blocks = String::new();
        let mut open: Option<String> = None;
        let mut last = 0;
        for (index, line) in bundle.lines().enumerate() {
            let (number, line) = (index + 1, line.trim());
            last = number;
            match (&mut open, line) {
                (None, BLOCK_BEGIN) => open = Some(String::new()),
                (None, _) if line.starts_with("-----") => {
                    return Err(BundleError::NotPem(number));
                }
                (None, _) => {}
                (Some(text), BLOCK_END) => {
                    let der = STANDARD.decode(&*text).unwrap_or_default();
                    if der.first() != Some(&DER_SEQUENCE) {
                        return Err(BundleError::NotPem(number));
                    }
                    blocks.push_str(&block(text));
                    open = None;
                }
                (Some(text), _) => text.push_str(line),
            }
        }
        let nothing_in_it = blocks.is_empty() && !bundle.trim().is_empty();
        if open.is_some() || nothing_in_it {
            return Err(BundleError::NotPem(last));
        }
        Ok(Authorities { blocks })
    }

    /// Makes the machine below `root` trust these, instead of those of an earlier call. Again with
    /// the same changes nothing. Blocks.
    ///
    /// # Errors
    /// When a file cannot be read or written; each is either the old or the new one then.
    pub fn install(&self, root: &Path) -> io::Result<()> {
        // The files are read, changed and written: two at a time would lose one's change.
        static INSTALLING: Mutex<()> = Mutex::new(());
        let _alone = INSTALLING.lock().unwrap_or_else(PoisonError::into_inner);
        let local = root.join(LOCAL);
        if self.blocks.is_empty() {
            match fs::remove_file(&local) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        } else {
            replace(&local, &self.blocks)?;
        }
        let bundle = BUNDLES.iter().map(|name| root.join(name)).find(|path| path.exists());
        let bundle = bundle.unwrap_or_else(|| root.join(BUNDLES[0]));
        // A link keeps pointing at the file that is rewritten.
        let bundle = fs::canonicalize(&bundle).unwrap_or(bundle);
        let old = read(&bundle)?;
        let mut new = without_ours(&old);
        if !self.blocks.is_empty() {
            if !new.is_empty() && !new.ends_with('\n') {
                new.push('\n');
            }
            new.push_str(BEGIN);
            new.push_str(&self.blocks);
            new.push_str(END);
        }
        if new == old { Ok(()) } else { replace(&bundle, &new) }
    }
}

/// One block in lines of 64 characters, as RFC 7468 wants them.
fn block(base64: &str) -> String {
    let mut text = format!("{BLOCK_BEGIN}\n");
    for line in base64.as_bytes().chunks(64) {
        text.extend(line.iter().map(|byte| char::from(*byte)));
        text.push('\n');
    }
    text.push_str(BLOCK_END);
    text.push('\n');
    text
}

fn read(path: &Path) -> io::Result<String> {
    match fs::metadata(path) {
        Ok(metadata) if metadata.len() > FILE_MAX_BYTES => Err(io::ErrorKind::FileTooLarge.into()),
        Ok(_) => fs::read_to_string(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}

/// A begin without an end is left alone: what follows may be the machine's own.
fn without_ours(text: &str) -> String {
    let mut rest = text.to_owned();
    while let Some(begin) = rest.find(BEGIN)
        && let Some(length) = rest.get(begin..).and_then(|tail| tail.find(END))
    {
        rest.replace_range(begin..begin + length + END.len(), "");
    }
    rest
}

/// Puts a file in place of another in one step, so that no reader meets half of it.
fn replace(path: &Path, text: &str) -> io::Result<()> {
    let Some(folder) = path.parent() else { return Err(io::ErrorKind::InvalidInput.into()) };
    fs::create_dir_all(folder)?;
    let fresh = fresh_name(path);
    let outcome = fs::write(&fresh, text)
        .and_then(|()| fs::set_permissions(&fresh, fs::Permissions::from_mode(0o644)))
        .and_then(|()| fs::rename(&fresh, path));
    if outcome.is_err() {
        // What is left of it then is in nobody's way.
        let _ = fs::remove_file(&fresh);
    }
    outcome
}

fn fresh_name(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".belljar-new");
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: &str = "-----BEGIN CERTIFICATE-----\nMAMBAf8=\n-----END CERTIFICATE-----\n";
    const TWO: &str = "-----BEGIN CERTIFICATE-----\nMAMCAQE=\n-----END CERTIFICATE-----\n";

    fn authorities(text: &str) -> Authorities {
        Authorities::parse(text).expect("a bundle")
    }

    #[test]
    fn only_certificates_are_taken() {
        assert_eq!(
            authorities(&format!("# a comment\r\n{ONE}\n{TWO}")).blocks,
            format!("{ONE}{TWO}")
        );
        assert_eq!(authorities(" \n").blocks, "");
        for (text, line) in [
            ("hello", 1),
            ("-----BEGIN PRIVATE KEY-----\nMAMBAf8=\n-----END PRIVATE KEY-----\n", 1),
            ("-----BEGIN CERTIFICATE-----\nMAMBAf8=\n", 2),
            ("-----BEGIN CERTIFICATE-----\nnot base64!\n-----END CERTIFICATE-----\n", 3),
            ("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n", 3),
        ] {
            assert_eq!(Authorities::parse(text), Err(BundleError::NotPem(line)), "{text}");
        }
        let long = "#".repeat(BUNDLE_MAX_BYTES + 1);
        assert!(matches!(Authorities::parse(&long), Err(BundleError::TooLong(_))));
    }

    #[test]
    fn bundles_come_once_replace_each_other_and_go() {
        let root = tempfile::tempdir().expect("a directory");
        let bundle = root.path().join(BUNDLES[0]);
        let read = || fs::read_to_string(&bundle).expect("there");
        fs::create_dir_all(bundle.parent().expect("not the root")).expect("made");
        fs::write(&bundle, "own").expect("written");
        for _ in 0..2 {
            authorities(ONE).install(root.path()).expect("installed");
            assert_eq!(read(), format!("own\n{BEGIN}{ONE}{END}"));
        }
        authorities(TWO).install(root.path()).expect("installed");
        assert_eq!(read(), format!("own\n{BEGIN}{TWO}{END}"));
        let local = root.path().join(LOCAL);
        assert_eq!(fs::read_to_string(&local).expect("there"), TWO);
        authorities("").install(root.path()).expect("removed");
        assert_eq!(read(), "own\n");
        assert!(!local.exists());
        let names = fs::read_dir(bundle.parent().expect("not the root")).expect("there");
        assert_eq!(names.count(), 1, "nothing half made is left");
    }

    #[test]
    fn a_link_stays_a_link_and_a_bare_machine_gets_a_bundle() {
        let root = tempfile::tempdir().expect("a directory");
        authorities(ONE).install(root.path()).expect("installed");
        assert!(root.path().join(BUNDLES[0]).is_file());

        let root = tempfile::tempdir().expect("a directory");
        let link = root.path().join(BUNDLES[1]);
        fs::create_dir_all(link.parent().expect("not the root")).expect("made");
        fs::write(root.path().join("real"), "own\n").expect("written");
        std::os::unix::fs::symlink(root.path().join("real"), &link).expect("linked");
        authorities(ONE).install(root.path()).expect("installed");
        assert!(link.is_symlink());
        assert!(fs::read_to_string(root.path().join("real")).expect("there").contains(ONE));
    }
}
