//! Commands of whoever runs the server: teams, tiers, users, keys, tokens.

use clap::{Args, Subcommand};

/// What the sandboxes of a team may take.
#[derive(Debug, Clone, Args)]
pub(crate) struct LimitOptions {
    /// Sandboxes at once.
    #[arg(long, value_name = "N")]
    pub(crate) max_sandboxes: Option<u32>,
    /// Longest life of a sandbox, in seconds.
    #[arg(long, value_name = "SECONDS")]
    pub(crate) max_length_seconds: Option<u32>,
    /// Virtual processors of a sandbox.
    #[arg(long, value_name = "N")]
    pub(crate) max_vcpus: Option<u32>,
    /// Memory of a sandbox, in MiB.
    #[arg(long, value_name = "MIB")]
    pub(crate) max_memory_mib: Option<u32>,
    /// Disk of a sandbox, in MiB.
    #[arg(long, value_name = "MIB")]
    pub(crate) max_disk_mib: Option<u32>,
    /// Sandboxes begun a second, on average.
    #[arg(long, value_name = "N")]
    pub(crate) creates_per_second: Option<u32>,
    /// Days events are kept.
    #[arg(long, value_name = "DAYS")]
    pub(crate) events_ttl_days: Option<u32>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum TeamCommand {
    /// List teams.
    List,
    /// Make a team.
    Create {
        /// Its name.
        name: String,
        /// Namespace of its template names [default: made of the name].
        #[arg(long)]
        slug: Option<String>,
        /// Where its limits come from: base, pro, local or one of your own [default: base].
        #[arg(long)]
        tier: Option<String>,
        /// Let only requests from this address range act for it; may be repeated.
        #[arg(long, value_name = "CIDR")]
        allow: Vec<String>,
        #[command(flatten)]
        limits: LimitOptions,
    },
    /// Change a team. Requests feel it at once.
    Update {
        /// Its id or slug.
        team: String,
        /// Its new name.
        #[arg(long)]
        name: Option<String>,
        /// Its new tier.
        #[arg(long)]
        tier: Option<String>,
        /// Let only requests from this address range act for it; replaces the list; may be repeated.
        #[arg(long, value_name = "CIDR")]
        allow: Vec<String>,
        /// Let requests from everywhere act for it.
        #[arg(long, conflicts_with = "allow")]
        allow_all: bool,
        /// Drop what differed from its tier before.
        #[arg(long)]
        tier_limits: bool,
        #[command(flatten)]
        limits: LimitOptions,
    },
    /// Let nobody act for a team. Its sandboxes run on.
    Block {
        /// Its id or slug.
        team: String,
        /// Told to those who try.
        #[arg(long)]
        reason: Option<String>,
    },
    /// Let a blocked team act again.
    Unblock {
        /// Its id or slug.
        team: String,
    },
    /// Delete a team that has no sandboxes, with its keys, events and webhooks.
    Delete {
        /// Its id or slug.
        team: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TierCommand {
    /// List tiers and their limits.
    List,
    /// Make a tier. What is not named is as in another one.
    Create {
        /// Its name: lower-case letters, digits and `-`.
        tier: String,
        /// The tier that says what is not named here.
        #[arg(long, default_value = "base", value_name = "TIER")]
        like: String,
        #[command(flatten)]
        limits: LimitOptions,
    },
    /// Change the limits of a tier. Its teams have them at once.
    Update {
        /// Its name.
        tier: String,
        #[command(flatten)]
        limits: LimitOptions,
    },
    /// Delete a tier that has no teams.
    Delete {
        /// Its name.
        tier: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum UserCommand {
    /// List users.
    List,
    /// Make a user.
    Create {
        /// Their address.
        email: String,
        /// Identity provider they sign in at, its URL.
        #[arg(long, requires = "subject", value_name = "URL")]
        issuer: Option<String>,
        /// What the provider calls them.
        #[arg(long, requires = "issuer")]
        subject: Option<String>,
    },
    /// Delete a user with their access tokens.
    Delete {
        /// Their id or address.
        user: String,
    },
    /// Let a user act for a team.
    Add {
        /// Their id or address.
        user: String,
        /// Its id or slug.
        #[arg(long, default_value = "default")]
        team: String,
        /// Make it the one they get when they name none.
        #[arg(long)]
        default: bool,
    },
    /// End that a user may act for a team.
    Remove {
        /// Their id or address.
        user: String,
        /// Its id or slug.
        #[arg(long, default_value = "default")]
        team: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum KeyCommand {
    /// List the API keys of a team, masked.
    List {
        /// Its id or slug.
        #[arg(long, default_value = "default")]
        team: String,
    },
    /// Make an API key and print it. It is never shown again.
    Create {
        /// The team's id or slug.
        #[arg(long, default_value = "default")]
        team: String,
        /// What to know it by.
        #[arg(long, default_value = "unnamed")]
        name: String,
    },
    /// Delete an API key: it opens nothing from then on.
    Delete {
        /// The team's id or slug.
        #[arg(long, default_value = "default")]
        team: String,
        /// The key's id, as `key list` shows it.
        id: String,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TokenCommand {
    /// List the access tokens of a user, masked.
    List {
        /// Their id or address.
        #[arg(long)]
        user: String,
    },
    /// Make an access token and print it. It is never shown again.
    Create {
        /// Their id or address.
        #[arg(long)]
        user: String,
        /// What to know it by.
        #[arg(long, default_value = "unnamed")]
        name: String,
    },
    /// Delete an access token: it opens nothing from then on.
    Delete {
        /// Their id or address.
        #[arg(long)]
        user: String,
        /// The token's id, as `token list` shows it.
        id: String,
    },
}
