//! The command line. Parsed by hand: a parser crate would be a tenth of the guest binary.

use std::net::SocketAddr;

/// What `--help` prints.
pub const HELP: &str = "\
belljar-envd: the daemon inside a Belljar sandbox

As PID 1 it sets the guest up, listens on 0.0.0.0:49983 and obeys the host's control port.
Anywhere else it needs --host-mode.

Usage: belljar-envd [OPTIONS]

  --host-mode        serve the sandbox API on this machine, without touching it
  --listen ADDR      address and port to listen on (host mode default 127.0.0.1:49983)
  --root-user NAME   user for requests that name none (default: the user who started it)
  --workdir DIR      directory an empty path means (default: the user's home)
  --verbose          log more
  --version          print the version
  --help             print this text

Exit codes: 0 stopped, 1 failed, 2 wrong usage.
";

/// What the program was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Command {
    /// Print [`HELP`].
    Help,
    /// Print the version.
    Version,
    /// Serve.
    Run(Options),
}

/// How to serve.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Options {
    /// Leave the machine alone and serve as the current user.
    pub host_mode: bool,
    /// Where to listen; `None` is the mode's default.
    pub listen: Option<SocketAddr>,
    /// The user of requests that name none.
    pub default_user: Option<String>,
    /// The directory an empty path means.
    pub default_workdir: Option<String>,
    /// Log debug events too.
    pub verbose: bool,
}

/// Why a command line was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum UsageError {
    /// Not an option of this program.
    #[error("understand '{0}'; --help lists the options")]
    Unknown(String),
    /// An option came without its value.
    #[error("use {0}: it needs a value")]
    NoValue(String),
    /// `--listen` is not an address.
    #[error("listen on '{0}': not an address and port like 127.0.0.1:49983")]
    Address(String),
}

/// Parses the arguments after the program's name.
///
/// # Errors
/// [`UsageError`] names the argument that is wrong.
pub fn parse(args: impl IntoIterator<Item = String>) -> Result<Command, UsageError> {
    let mut options = Options::default();
    let mut args = args.into_iter();
    while let Some(arg) = args.next() {
        let (name, inline) = match arg.split_once('=') {
            Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
            None => (arg, None),
        };
        let mut value =
            || inline.clone().or_else(|| args.next()).ok_or(UsageError::NoValue(name.clone()));
        match name.as_str() {
            "--help" | "-h" => return Ok(Command::Help),
            "--version" | "-V" => return Ok(Command::Version),
            "--host-mode" => options.host_mode = true,
            "--verbose" => options.verbose = true,
            "--root-user" => options.default_user = Some(value()?),
            "--workdir" => options.default_workdir = Some(value()?),
            "--listen" => {
                let text = value()?;
                options.listen = Some(text.parse().map_err(|_| UsageError::Address(text))?);
            }
            _ => return Err(UsageError::Unknown(name)),
        }
    }
    Ok(Command::Run(options))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Vec<String> {
        line.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn options_are_read_in_both_spellings() {
        let expected = Command::Run(Options {
            host_mode: true,
            listen: Some(SocketAddr::from(([127, 0, 0, 1], 5000))),
            default_user: Some("root".into()),
            ..Options::default()
        });
        assert_eq!(
            parse(words("--host-mode --listen 127.0.0.1:5000 --root-user root")),
            Ok(expected.clone())
        );
        assert_eq!(
            parse(words("--host-mode --listen=127.0.0.1:5000 --root-user=root")),
            Ok(expected)
        );
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse(words("--port 1")), Err(UsageError::Unknown("--port".into())));
        assert_eq!(parse(words("--listen")), Err(UsageError::NoValue("--listen".into())));
        assert_eq!(
            parse(words("--listen localhost:1")),
            Err(UsageError::Address("localhost:1".into()))
        );
    }
}
