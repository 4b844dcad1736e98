//! What a path in a request means.

use std::path::{Component, Path, PathBuf};

/// Why a path means nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// `~name` would need another user's home.
    #[error("cannot expand '{0}': only the caller's own home directory can be named by ~")]
    OtherHome(String),
    /// No file can have that name.
    #[error("path contains a NUL byte")]
    Nul,
    /// The kernel takes none that long.
    #[error("path has {0} bytes, more than {PATH_MAX_BYTES}")]
    TooLong(usize),
}

/// Longest path, bytes: what the kernel takes, without its NUL.
const PATH_MAX_BYTES: usize = 4095;

/// Makes a path absolute and clean: relative ones and `~` start at the user's home, the empty one
/// is the template's working directory, or the home when there is none.
///
/// Source: `contract/e2b-wire.md` section 2.1.
///
/// # Errors
/// [`PathError`] for another user's `~`, for NUL bytes and for what is too long.
pub fn resolve(path: &str, home: &Path, workdir: Option<&str>) -> Result<PathBuf, PathError> {
    let path = expand(path, home, workdir)?;
    match path.as_os_str().len() {
        length if length > PATH_MAX_BYTES => Err(PathError::TooLong(length)),
        _ => Ok(path),
    }
}

fn expand(path: &str, home: &Path, workdir: Option<&str>) -> Result<PathBuf, PathError> {
    if path.contains('\0') {
        return Err(PathError::Nul);
    }
    if path.is_empty() {
        return match workdir {
            Some(workdir) if !workdir.is_empty() => expand(workdir, home, None),
            _ => Ok(clean(home)),
        };
    }
    let below_home = match path.strip_prefix('~') {
        Some("") => "",
        Some(rest) => match rest.strip_prefix('/') {
            Some(rest) => rest.trim_start_matches('/'),
            None => return Err(PathError::OtherHome(path.to_owned())),
        },
        None if path.starts_with('/') => return Ok(clean(Path::new(path))),
        None => path,
    };
    Ok(clean(&home.join(below_home)))
}

/// Removes `.`, `..` and doubled slashes by text alone, as clients do: a `..` behind a symbolic
/// link leads to where the link stands.
fn clean(path: &Path) -> PathBuf {
    let mut out = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => {
                out.pop();
            }
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_start_where_the_contract_says() {
        let home = Path::new("/home/user");
        for (path, workdir, expected) in [
            ("/etc/hosts", None, "/etc/hosts"),
            ("/a/../b//c/./", None, "/b/c"),
            ("/../..", None, "/"),
            ("notes.txt", Some("/srv"), "/home/user/notes.txt"),
            ("./x/../y", None, "/home/user/y"),
            ("~", Some("/srv"), "/home/user"),
            ("~/x", None, "/home/user/x"),
            ("~//x", None, "/home/user/x"),
            ("", None, "/home/user"),
            ("", Some("/srv/app/"), "/srv/app"),
            ("", Some("app"), "/home/user/app"),
            ("", Some(""), "/home/user"),
            (".", Some("/srv"), "/home/user"),
            ("a~b", None, "/home/user/a~b"),
        ] {
            assert_eq!(
                resolve(path, home, workdir),
                Ok(PathBuf::from(expected)),
                "{path:?} in {workdir:?}"
            );
        }
    }

    #[test]
    fn other_homes_and_nul_are_refused() {
        let home = Path::new("/home/user");
        assert_eq!(resolve("~root/x", home, None), Err(PathError::OtherHome("~root/x".to_owned())));
        assert_eq!(resolve("a\0b", home, None), Err(PathError::Nul));
        let longest = format!("/{}", "d/".repeat(2047));
        assert_eq!(resolve(&longest, home, None).map(|path| path.as_os_str().len()), Ok(4094));
        let longer = "d/".repeat(2048);
        assert_eq!(resolve(&longer, home, None), Err(PathError::TooLong(4106)));
    }

    #[test]
    fn any_path_becomes_absolute_and_clean_or_is_refused() {
        let home = Path::new("/home/user");
        crate::fuzz::run("path", &["/", "..", "~", "./", "//"], |input| {
            let text = String::from_utf8_lossy(input);
            let resolved = resolve(&text, home, Some("work/dir"));
            if let Ok(path) = &resolved {
                assert!(path.is_absolute() && path.as_os_str().len() <= PATH_MAX_BYTES);
                let shown = path.to_str().expect("made of text");
                assert!(!shown.contains('\0') && !shown.contains("//"), "{shown:?}");
                assert!(path.components().skip(1).all(|c| matches!(c, Component::Normal(_))));
                assert_eq!(resolve(shown, home, None).as_ref(), Ok(path), "clean is clean");
            }
            let depth = resolved.as_ref().map(|path| path.components().count());
            crate::fuzz::outcome(depth.map_err(std::mem::discriminant))
        });
    }
}
