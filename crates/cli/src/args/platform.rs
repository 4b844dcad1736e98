//! Flags of a server that several people use: who may sign in, how much they may ask, what is shown.

use std::str::FromStr;

use belljar_control::{Config, OidcIssuer, Rate, RateError, Rates};
use clap::Args;

/// See the module's own words.
#[derive(Debug, Clone, Args)]
pub(crate) struct PlatformOptions {
    /// Accept bearer tokens of this OpenID Connect provider; may be repeated.
    #[arg(
        long = "oidc-issuer",
        env = "BELLJAR_OIDC_ISSUERS",
        value_delimiter = ',',
        requires = "oidc_audiences",
        value_name = "URL"
    )]
    oidc_issuers: Vec<String>,
    /// Audience its tokens are made for, one for each --oidc-issuer, in their order.
    #[arg(
        long = "oidc-audience",
        env = "BELLJAR_OIDC_AUDIENCES",
        value_delimiter = ',',
        requires = "oidc_issuers",
        value_name = "AUDIENCE"
    )]
    oidc_audiences: Vec<String>,
    /// Requests one team may send, as REQUESTS/SECONDSs; `off` for any number.
    #[arg(long, env = "BELLJAR_TEAM_RATE", default_value_t = Limit(Rates::default().per_team), value_name = "RATE")]
    team_rate: Limit,
    /// Requests one address may send, as REQUESTS/SECONDSs; `off` for any number.
    #[arg(long, env = "BELLJAR_ADDRESS_RATE", default_value_t = Limit(Rates::default().per_address), value_name = "RATE")]
    address_rate: Limit,
    /// Show the figures at /metrics to anybody who asks.
    #[arg(long, env = "BELLJAR_METRICS_PUBLIC")]
    metrics_public: bool,
}

/// A rate, or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit(Option<Rate>);

impl FromStr for Limit {
    type Err = RateError;

    fn from_str(text: &str) -> Result<Limit, RateError> {
        if text == "off" { Ok(Limit(None)) } else { text.parse().map(|rate| Limit(Some(rate))) }
    }
}

impl std::fmt::Display for Limit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0 {
            Some(rate) => rate.fmt(f),
            None => f.write_str("off"),
        }
    }
}

impl PlatformOptions {
    /// `config` with what these flags say.
    ///
    /// # Errors
    /// When an issuer cannot be used, or has no audience.
    pub(crate) fn apply(&self, config: Config) -> anyhow::Result<Config> {
        let (issuers, audiences) = (self.oidc_issuers.len(), self.oidc_audiences.len());
        anyhow::ensure!(
            issuers == audiences,
            "failed to pair {issuers} --oidc-issuer with {audiences} --oidc-audience: give one \
             audience for each issuer, in the same order"
        );
        let pairs = self.oidc_issuers.iter().zip(&self.oidc_audiences);
        let oidc = pairs.map(|(url, audience)| OidcIssuer::parse(url, audience));
        Ok(Config {
            oidc: oidc.collect::<Result<_, _>>()?,
            rates: Rates { per_team: self.team_rate.0, per_address: self.address_rate.0 },
            metrics_public: self.metrics_public,
            ..config
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Probe {
        #[command(flatten)]
        options: PlatformOptions,
    }

    fn read(flags: &[&str]) -> Option<PlatformOptions> {
        let arguments = std::iter::once("probe").chain(flags.iter().copied());
        Probe::try_parse_from(arguments).ok().map(|probe| probe.options)
    }

    fn config(flags: &[&str]) -> anyhow::Result<Config> {
        read(flags).expect("flags").apply(Config::default())
    }

    #[test]
    fn without_flags_the_defaults_hold() {
        let config = config(&[]).expect("a configuration");
        assert_eq!(config.rates, Rates::default());
        assert!(config.oidc.is_empty() && !config.metrics_public);
    }

    #[test]
    fn rates_are_set_or_switched_off() {
        let config = config(&["--team-rate", "5/1s", "--address-rate", "off"]).expect("valid");
        assert_eq!(config.rates, Rates { per_team: Rate::new(5, 1), per_address: None });
        assert!(read(&["--team-rate", "5"]).is_none());
    }

    #[test]
    fn issuers_and_audiences_go_together() {
        let (first, second) = ("https://a.example", "https://b.example");
        let pair = ["--oidc-issuer", first, "--oidc-audience", "x"];
        let both = [&pair[..], &["--oidc-issuer", second, "--oidc-audience", "y"]].concat();
        let found = config(&both).expect("valid").oidc;
        assert_eq!(found.iter().map(OidcIssuer::url).collect::<Vec<_>>(), [first, second]);
        assert!(read(&pair[..2]).is_none() && read(&pair[2..]).is_none());
        assert!(config(&[&pair[..], &["--oidc-issuer", second]].concat()).is_err());
        assert!(config(&["--oidc-issuer", "http://a.example", "--oidc-audience", "x"]).is_err());
    }
}
