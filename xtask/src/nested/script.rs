//! The script that becomes the command inside the outer machine.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A shell script that enters `folder`, sets `environment` and becomes `command`.
///
/// Every word is quoted: bytes of any kind arrive as they are.
pub(super) fn script(
    command: &[OsString],
    folder: &Path,
    environment: &[(OsString, OsString)],
) -> Vec<u8> {
    let mut text = b"cd -- ".to_vec();
    quote(folder.as_os_str(), &mut text);
    text.extend_from_slice(b" || exit 126\n");
    for (name, value) in environment {
        text.extend_from_slice(b"export ");
        text.extend_from_slice(name.as_bytes());
        text.push(b'=');
        quote(value, &mut text);
        text.push(b'\n');
    }
    text.extend_from_slice(b"exec");
    for word in command {
        text.push(b' ');
        quote(word, &mut text);
    }
    text.push(b'\n');
    text
}

/// Single quotes keep everything but themselves.
fn quote(word: &OsStr, text: &mut Vec<u8>) {
    text.push(b'\'');
    for byte in word.as_bytes() {
        match byte {
            b'\'' => text.extend_from_slice(b"'\\''"),
            _ => text.push(*byte),
        }
    }
    text.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn a_shell_reads_back_what_was_written() {
        let words = ["printf", "%s|", "it's", "$HOME `x` \\", "a\nb", ""].map(OsString::from);
        let folder = std::env::temp_dir();
        let environment = [("BELLJAR_X".into(), "one 'two'".into())];
        let text = script(&words, &folder, &environment);
        let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&text)).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(printed, "it's|$HOME `x` \\|a\nb||");

        let words = ["sh", "-c", "printf %s \"$BELLJAR_X in $PWD\""].map(OsString::from);
        let text = script(&words, &folder, &environment);
        let output = Command::new("sh").arg("-c").arg(OsStr::from_bytes(&text)).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert_eq!(printed, format!("one 'two' in {}", folder.display()));
    }
}
