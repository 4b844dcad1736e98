//! What is told about one file, directory or link.
//!
//! Source: `contract/e2b-wire.md` section 2.4.

use std::fs::Metadata;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use belljar_wire::rpc::filesystem::{EntryInfo, FileType};
use buffa_types::google::protobuf::Timestamp;

use super::metadata;
use crate::accounts::Accounts;

/// Describes what is at `path`. Owner, size, time and permission text are of the entry itself;
/// type and mode of a link are its target's, and unknown and 0 when the target is not there.
///
/// # Errors
/// As `lstat(2)`.
pub fn describe(path: &Path, accounts: &Accounts) -> io::Result<EntryInfo> {
    let own = std::fs::symlink_metadata(path)?;
    let is_symlink = own.is_symlink();
    let (target, symlink_target) = if is_symlink {
        let resolved = std::fs::canonicalize(path);
        let shown = resolved.as_deref().unwrap_or(path).to_string_lossy().into_owned();
        (std::fs::metadata(path).ok(), Some(shown))
    } else {
        (Some(own.clone()), None)
    };
    let (kind, mode) = match &target {
        Some(target) => (file_type(target), target.mode() & 0o777),
        None => (FileType::FILE_TYPE_UNSPECIFIED, 0),
    };
    let metadata = match kind {
        FileType::FILE_TYPE_FILE => metadata::read_at(path).into_iter().collect(),
        _ => Default::default(),
    };
    let modified = Timestamp {
        seconds: own.mtime(),
        nanos: i32::try_from(own.mtime_nsec()).unwrap_or(0),
        ..Timestamp::default()
    };
    Ok(EntryInfo {
        name: name(path),
        r#type: kind.into(),
        path: path.to_string_lossy().into_owned(),
        size: i64::try_from(own.len()).unwrap_or(i64::MAX),
        mode,
        permissions: permissions(own.mode()),
        owner: accounts.user_name(own.uid()),
        group: accounts.group_name(own.gid()),
        modified_time: Some(modified).into(),
        symlink_target,
        metadata,
        is_symlink,
        ..EntryInfo::default()
    })
}

/// The last part of a path; `/` for the root.
pub(super) fn name(path: &Path) -> String {
    path.file_name().map_or_else(|| "/".to_owned(), |name| name.to_string_lossy().into_owned())
}

fn file_type(metadata: &Metadata) -> FileType {
    if metadata.is_file() {
        FileType::FILE_TYPE_FILE
    } else if metadata.is_dir() {
        FileType::FILE_TYPE_DIRECTORY
    } else {
        FileType::FILE_TYPE_UNSPECIFIED
    }
}

/// The text Go's `FileMode` prints, which clients show: a letter for each special bit, `-` when
/// there is none, then nine permission letters.
fn permissions(mode: u32) -> String {
    let kind = match mode & libc::S_IFMT {
        libc::S_IFDIR => "d",
        libc::S_IFLNK => "L",
        libc::S_IFBLK | libc::S_IFCHR => "D",
        libc::S_IFIFO => "p",
        libc::S_IFSOCK => "S",
        _ => "",
    };
    let mut text = String::with_capacity(12);
    text.push_str(kind);
    // The order of the bits in Go's value, highest first.
    for (set, letter) in [
        (mode & libc::S_ISUID != 0, 'u'),
        (mode & libc::S_ISGID != 0, 'g'),
        (mode & libc::S_IFMT == libc::S_IFCHR, 'c'),
        (mode & libc::S_ISVTX != 0, 't'),
    ] {
        if set {
            text.push(letter);
        }
    }
    if text.is_empty() {
        text.push('-');
    }
    for bit in (0..9).rev() {
        let letter = ['x', 'w', 'r'][bit % 3];
        text.push(if mode & (1 << bit) != 0 { letter } else { '-' });
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn permission_texts_are_those_of_go() {
        for (mode, expected) in [
            (0o100_644, "-rw-r--r--"),
            (0o040_755, "drwxr-xr-x"),
            (0o120_777, "Lrwxrwxrwx"),
            (0o041_777, "dtrwxrwxrwx"),
            (0o104_755, "urwxr-xr-x"),
            (0o102_755, "grwxr-xr-x"),
            (0o106_755, "ugrwxr-xr-x"),
            (0o020_666, "Dcrw-rw-rw-"),
            (0o060_660, "Drw-rw----"),
            (0o010_644, "prw-r--r--"),
            (0o140_755, "Srwxr-xr-x"),
            (0o100_000, "----------"),
        ] {
            assert_eq!(permissions(mode), expected, "{mode:o}");
        }
    }

    #[test]
    fn links_show_their_target() {
        let dir = tempfile::tempdir().expect("a directory");
        let accounts = Accounts::load();
        let file = dir.path().join("file");
        std::fs::write(&file, b"12345").expect("written");
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("file", &link).expect("linked");
        let broken = dir.path().join("broken");
        std::os::unix::fs::symlink("nowhere", &broken).expect("linked");

        let entry = describe(&file, &accounts).expect("there");
        assert_eq!((entry.size, entry.is_symlink), (5, false));
        assert_eq!(entry.r#type, FileType::FILE_TYPE_FILE);
        assert_eq!(entry.symlink_target, None);

        let entry = describe(&link, &accounts).expect("there");
        assert_eq!(entry.r#type, FileType::FILE_TYPE_FILE);
        assert_eq!(entry.permissions, "Lrwxrwxrwx");
        assert!(entry.is_symlink && entry.mode != 0);
        let target = std::fs::canonicalize(&file).expect("there");
        assert_eq!(entry.symlink_target, Some(target.to_string_lossy().into_owned()));

        let entry = describe(&broken, &accounts).expect("there");
        assert_eq!(entry.r#type, FileType::FILE_TYPE_UNSPECIFIED);
        assert_eq!((entry.mode, entry.is_symlink), (0, true));
        let own = broken.to_string_lossy().into_owned();
        assert_eq!(entry.symlink_target, Some(own));
    }
}
