//! What the host says on the kernel command line: the guest's one network address.

use std::net::Ipv4Addr;

/// The `belljar.` words of a command line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cmdline {
    /// Address and prefix length of the card: `belljar.ip=169.254.0.21/30`.
    pub(super) address: Option<(Ipv4Addr, u8)>,
    /// Next hop of everything else: `belljar.gw=169.254.0.22`.
    pub(super) gateway: Option<Ipv4Addr>,
    /// Name servers: `belljar.dns=8.8.8.8,1.1.1.1`. None leaves the template's own alone.
    pub(super) name_servers: Vec<Ipv4Addr>,
}

/// Parses a command line; words it does not know or understand are left out.
pub(super) fn parse(text: &str) -> Cmdline {
    let mut cmdline = Cmdline::default();
    for word in text.split_whitespace() {
        match word.split_once('=') {
            Some(("belljar.ip", value)) => cmdline.address = address(value),
            Some(("belljar.gw", value)) => cmdline.gateway = value.parse().ok(),
            Some(("belljar.dns", value)) => {
                cmdline.name_servers =
                    value.split(',').filter_map(|server| server.parse().ok()).collect();
            }
            _ => {}
        }
    }
    cmdline
}

fn address(text: &str) -> Option<(Ipv4Addr, u8)> {
    let (address, prefix) = text.split_once('/')?;
    let prefix = prefix.parse().ok().filter(|bits| *bits <= 32)?;
    Some((address.parse().ok()?, prefix))
}

/// The netmask of a prefix length.
pub(super) fn netmask(prefix_bits: u8) -> Ipv4Addr {
    let host_bits = 32 - u32::from(prefix_bits.min(32));
    Ipv4Addr::from(u32::MAX.checked_shl(host_bits).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documented_line_is_understood() {
        let line = "console=ttyS0 belljar.ip=169.254.0.21/30 belljar.gw=169.254.0.22 \
                    belljar.dns=8.8.8.8 quiet\n";
        assert_eq!(
            parse(line),
            Cmdline {
                address: Some((Ipv4Addr::new(169, 254, 0, 21), 30)),
                gateway: Some(Ipv4Addr::new(169, 254, 0, 22)),
                name_servers: vec![Ipv4Addr::new(8, 8, 8, 8)],
            }
        );
        assert_eq!(parse("belljar.ip=1.2.3.4 belljar.ip6=x belljar.gw=nine"), Cmdline::default());
        assert_eq!(parse("belljar.ip=1.2.3.4/33"), Cmdline::default());
    }

    #[test]
    fn netmasks() {
        assert_eq!(netmask(30), Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!(netmask(32), Ipv4Addr::BROADCAST);
        assert_eq!(netmask(0), Ipv4Addr::UNSPECIFIED);
    }

    #[test]
    fn any_command_line_is_understood_in_part() {
        crate::fuzz::run("cmdline", &["belljar.ip=", "belljar.gw=", "/32", " ", "."], |input| {
            let cmdline = parse(&String::from_utf8_lossy(input));
            assert!(cmdline.address.is_none_or(|(_, prefix)| prefix <= 32));
            let servers = cmdline.name_servers.len();
            crate::fuzz::outcome((cmdline.address, cmdline.gateway, servers))
        });
    }
}
