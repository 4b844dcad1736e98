//! The loopback interface, the one card, and the files that name machines.

use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::path::Path;

use super::cmdline::{Cmdline, netmask};
use super::{HOST_NAME, log_failure};
use crate::sys;

const CARD: &str = "eth0";

/// Brings the interfaces up as the command line says and writes the files.
pub(super) fn bring_up(cmdline: &Cmdline) {
    log_failure("bring up lo", sys::interface_up("lo", None));
    if let Some((address, prefix)) = cmdline.address {
        let outcome = sys::interface_up(CARD, Some((address, netmask(prefix))));
        log_failure("bring up the network card", outcome);
    }
    if let Some(gateway) = cmdline.gateway {
        log_failure("set the default route", sys::default_route(gateway));
    }
    log_failure("write /etc/hosts", write_hosts(Path::new("/etc/hosts")));
    if !cmdline.name_servers.is_empty() {
        let path = Path::new("/etc/resolv.conf");
        log_failure("write /etc/resolv.conf", write_resolver(path, &cmdline.name_servers));
    }
}

/// Adds the names every machine has, unless the template has them.
fn write_hosts(path: &Path) -> io::Result<()> {
    let old = fs::read_to_string(path).unwrap_or_default();
    let has = |name: &str| {
        old.lines().any(|line| {
            let names = line.split('#').next().unwrap_or_default();
            names.split_whitespace().skip(1).any(|word| word == name)
        })
    };
    let mut text = old.clone();
    if !text.is_empty() && !text.ends_with('\n') {
        text.push('\n');
    }
    if !has("localhost") {
        text.push_str("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n");
    }
    if !has(HOST_NAME) {
        writeln!(text, "127.0.1.1 {HOST_NAME}").expect("writing to a String never fails");
    }
    if text == old { Ok(()) } else { fs::write(path, text) }
}

/// Replaces the file; a link there would lead to a resolver that does not run here.
fn write_resolver(path: &Path, servers: &[Ipv4Addr]) -> io::Result<()> {
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_symlink()) {
        fs::remove_file(path)?;
    }
    let text: String = servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    if fs::read_to_string(path).is_ok_and(|old| old == text) {
        return Ok(());
    }
    fs::write(path, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_keep_what_the_template_wrote() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("hosts");
        write_hosts(&path).expect("written");
        let fresh = fs::read_to_string(&path).expect("there");
        assert!(fresh.contains("127.0.0.1 localhost\n") && fresh.contains("127.0.1.1 sandbox\n"));

        fs::write(&path, "127.0.0.1 localhost\n10.0.0.1 db # sandbox").expect("written");
        write_hosts(&path).expect("written");
        let kept = fs::read_to_string(&path).expect("there");
        assert_eq!(kept, "127.0.0.1 localhost\n10.0.0.1 db # sandbox\n127.0.1.1 sandbox\n");
        write_hosts(&path).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("there"), kept);
    }

    #[test]
    fn the_resolver_file_replaces_a_link() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("resolv.conf");
        std::os::unix::fs::symlink("/nowhere/stub", &path).expect("linked");
        write_resolver(&path, &[Ipv4Addr::new(8, 8, 8, 8)]).expect("written");
        assert_eq!(fs::read_to_string(&path).expect("there"), "nameserver 8.8.8.8\n");
    }
}
