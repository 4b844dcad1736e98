//! The command line: every command, flag and environment variable of `belljar`.

mod blob;
mod operator;
mod platform;
mod warm;

use std::net::IpAddr;
use std::path::PathBuf;

use belljar_control::{Cidr, Database};
use clap::{Args, Parser, Subcommand, ValueEnum};

pub(crate) use blob::{Blob, BlobCommand, BlobPlace};
pub(crate) use operator::{
    KeyCommand, LimitOptions, TeamCommand, TierCommand, TokenCommand, UserCommand,
};
pub(crate) use platform::PlatformOptions;
pub(crate) use warm::{WarmOption, plan as plan_warm};

/// A self-hosted sandbox cloud for AI agents that speaks the E2B API.
///
/// Exit codes: 0 done; 1 failed, the message says why and what to do; 2 wrong usage;
/// 3 `blob verify` found damage;
/// `sandbox exec` exits with the code of the command it ran.
#[derive(Debug, Parser)]
#[command(name = "belljar", version)]
pub(crate) struct Cli {
    /// Print JSON on standard output instead of text for people.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Which log lines to print on standard error: a level, or `crate=level` pairs.
    #[arg(long, global = true, env = "BELLJAR_LOG", default_value = "warn", value_name = "FILTER")]
    pub(crate) log: String,
    #[command(flatten)]
    pub(crate) place: Place,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Which server is meant.
#[derive(Debug, Clone, Args)]
pub(crate) struct Place {
    /// Folder of the server's state [default: /var/lib/belljar as root, else ~/.local/share/belljar].
    #[arg(long, global = true, env = "BELLJAR_DATA_DIR", value_name = "DIR")]
    pub(crate) data_dir: Option<PathBuf>,
    /// File with the admin token [default: admin-token in the data folder, made by the first `up`].
    ///
    /// BELLJAR_ADMIN_TOKEN may hold the token itself instead.
    #[arg(long, global = true, env = "BELLJAR_ADMIN_TOKEN_FILE", value_name = "FILE")]
    pub(crate) admin_token_file: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Start the server: control, proxy and node in one process, until Ctrl-C.
    Up(Up),
    /// Start a node alone: the sandboxes of this host, for a `belljar up --node` elsewhere on it.
    Node(Node),
    /// Print the `export` lines that point the SDKs at the running server.
    Env,
    /// Check this machine and say, or with --fix do, what is missing.
    Doctor(Doctor),
    /// Look at and use sandboxes.
    #[command(subcommand)]
    Sandbox(SandboxCommand),
    /// Look at and build templates.
    #[command(subcommand)]
    Template(TemplateCommand),
    /// Look after the store of images: verify, collect garbage, count.
    ///
    /// Exit codes: 0 done, and for `verify` all is whole; 1 it could not be done; 2 wrong usage;
    /// 3 `verify` found damage, which it lists.
    Blob(Blob),
    /// Keep teams: limits, addresses, who is blocked.
    #[command(subcommand)]
    Team(TeamCommand),
    /// Keep tiers: the limits teams start from.
    #[command(subcommand)]
    Tier(TierCommand),
    /// Keep users, and which teams they may act for.
    #[command(subcommand)]
    User(UserCommand),
    /// Keep the API keys of teams.
    #[command(subcommand)]
    Key(KeyCommand),
    /// Keep the access tokens of users.
    #[command(subcommand)]
    Token(TokenCommand),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Up {
    /// Address both servers listen on. Anything but loopback is open to the network.
    #[arg(long, env = "BELLJAR_BIND", default_value = "127.0.0.1", value_name = "IP")]
    pub(crate) bind: IpAddr,
    /// Port of the REST API; 0 takes a free one.
    #[arg(long, env = "BELLJAR_API_PORT", default_value_t = 3000, value_name = "PORT")]
    pub(crate) api_port: u16,
    /// Port of sandbox traffic; 0 takes a free one.
    #[arg(long, env = "BELLJAR_PROXY_PORT", default_value_t = 3002, value_name = "PORT")]
    pub(crate) proxy_port: u16,
    #[command(flatten)]
    pub(crate) host: HostOptions,
    /// Use the node that serves on this unix socket instead of one in this process.
    #[arg(
        long = "node",
        env = "BELLJAR_NODES",
        value_delimiter = ',',
        conflicts_with_all = ["runtime", "warm"],
        value_name = "SOCKET"
    )]
    pub(crate) nodes: Vec<PathBuf>,
    /// Longest life of a sandbox, in hours.
    #[arg(long, env = "BELLJAR_TIMEOUT_HOURS_MAX", default_value_t = 24, value_name = "HOURS")]
    pub(crate) timeout_hours_max: u32,
    /// Let webhooks reach private, loopback and link-local addresses.
    ///
    /// Whoever has an API key can then make this server send requests to anything it reaches.
    #[arg(long, env = "BELLJAR_WEBHOOK_ALLOW_PRIVATE")]
    pub(crate) webhook_allow_private: bool,
    /// Proxy in front of this server whose X-Forwarded-For is believed, an address range; may be
    /// repeated.
    #[arg(
        long = "trusted-proxy",
        env = "BELLJAR_TRUSTED_PROXIES",
        value_delimiter = ',',
        value_name = "CIDR"
    )]
    pub(crate) trusted_proxies: Vec<Cidr>,
    #[command(flatten)]
    pub(crate) platform: PlatformOptions,
    /// Database: `postgres://user:password@host/name`, or a file [default: belljar.db in the data folder].
    ///
    /// A password in an argument shows in the list of processes; the variable does not.
    #[arg(long, env = "BELLJAR_DATABASE", hide_env_values = true, value_name = "URL")]
    pub(crate) database: Option<Database>,
}

/// `belljar node`.
#[derive(Debug, Clone, Args)]
pub(crate) struct Node {
    /// Unix socket to serve on [default: node.sock in the data folder].
    #[arg(long, env = "BELLJAR_NODE_SOCKET", value_name = "SOCKET")]
    pub(crate) socket: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) host: HostOptions,
}

/// What sandboxes of this host are, and how many.
#[derive(Debug, Clone, Args)]
pub(crate) struct HostOptions {
    /// How sandboxes are isolated.
    #[arg(long, env = "BELLJAR_RUNTIME", value_enum, default_value_t = RuntimeChoice::Auto)]
    pub(crate) runtime: RuntimeChoice,
    #[command(flatten)]
    pub(crate) firecracker: FirecrackerOptions,
    /// Most sandboxes at once.
    #[arg(long, env = "BELLJAR_SANDBOXES_MAX", default_value_t = 100, value_name = "N")]
    pub(crate) sandboxes_max: u16,
    /// Most network slots made ahead of sandboxes; 0 makes each when it is wanted.
    ///
    /// A third of them is kept when nothing happens, and more the more sandboxes are started.
    #[arg(long, env = "BELLJAR_SLOTS_READY", default_value_t = 12, value_name = "N")]
    pub(crate) slots_ready: u16,
    /// Keep N sandboxes of a template ready, so that a create of it takes one instead of starting one;
    /// may be repeated.
    ///
    /// They count as sandboxes of this host, and make room when it is full. Creates without internet
    /// access do not take them.
    #[arg(long, env = "BELLJAR_WARM", value_delimiter = ',', value_name = "TEMPLATE=N")]
    pub(crate) warm: Vec<WarmOption>,
    /// Keep paused sandboxes and snapshots in this blob store, too: a folder, or `s3://bucket/prefix` [default:
    /// on this host's disk alone].
    ///
    /// They are uploaded after a pause was answered, and any node of the same store can resume them. With
    /// --node it is the nodes' own setting. S3 takes
    /// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and AWS_ENDPOINT_URL_S3.
    #[arg(long, env = "BELLJAR_BLOBS", value_name = "DIR|s3://…")]
    pub(crate) blobs: Option<BlobPlace>,
}

/// Which Firecracker, where it is used.
#[derive(Debug, Clone, Args)]
pub(crate) struct FirecrackerOptions {
    /// Programs of Firecracker releases (1.10 or later), separated by commas: the first starts
    /// templates, and each restores what it saved.
    #[arg(
        long = "firecracker",
        env = "BELLJAR_FIRECRACKER",
        value_name = "PATH",
        value_delimiter = ','
    )]
    pub(crate) programs: Vec<PathBuf>,
    /// A processor template in Firecracker's format, for a fleet of several kinds of processors.
    #[arg(long = "cpu-template", env = "BELLJAR_CPU_TEMPLATE", value_name = "FILE")]
    pub(crate) cpu_template: Option<PathBuf>,
}

/// How sandboxes are isolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum RuntimeChoice {
    /// QEMU on KVM where KVM really runs guests, else QEMU with an emulated CPU.
    Auto,
    /// QEMU with an emulated CPU, even where KVM works.
    Emulated,
    /// Firecracker on KVM: name its program with `--firecracker`.
    Firecracker,
    /// No isolation and no real guest: for trying the API without root.
    Fake,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Doctor {
    /// Do what can be done: install packages and make folders.
    #[arg(long)]
    pub(crate) fix: bool,
    #[command(flatten)]
    pub(crate) firecracker: FirecrackerOptions,
}

/// How bad a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum LevelChoice {
    /// Everything.
    Debug,
    /// Standard output too.
    Info,
    /// Processes that failed too.
    Warn,
    /// Standard error only.
    Error,
}

#[derive(Debug, Subcommand)]
pub(crate) enum SandboxCommand {
    /// List running sandboxes.
    List,
    /// Kill sandboxes.
    Kill {
        /// Their ids.
        #[arg(required_unless_present = "all", value_name = "ID")]
        ids: Vec<String>,
        /// Kill every one.
        #[arg(long, conflicts_with = "ids")]
        all: bool,
    },
    /// Print what the processes of a sandbox said, oldest first.
    Logs {
        /// The sandbox.
        id: String,
        /// Go on until the sandbox ends.
        #[arg(long, short)]
        follow: bool,
        /// Leave out what is less bad.
        #[arg(long, value_enum, default_value_t = LevelChoice::Debug)]
        level: LevelChoice,
    },
    /// Run a command in a sandbox and exit with its code.
    Exec {
        /// The sandbox.
        id: String,
        /// User to run as.
        #[arg(long, short, default_value = "user")]
        user: String,
        /// Folder to run in.
        #[arg(long, short)]
        cwd: Option<String>,
        /// The command; one word is run by `bash -l -c`.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(crate) enum TemplateCommand {
    /// List templates.
    List,
    /// Make the `base` root file system from Debian packages.
    Rootfs(Rootfs),
    /// Boot a root file system once and save it as a template. The server must not be running.
    Build(TemplateBuild),
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Rootfs {
    /// The static guest daemon to put in.
    #[arg(long, value_name = "FILE")]
    pub(crate) envd: PathBuf,
    /// Where the image goes.
    #[arg(long, value_name = "FILE")]
    pub(crate) output: PathBuf,
    /// Folder that keeps the package tree between builds.
    #[arg(long, value_name = "DIR")]
    pub(crate) cache: PathBuf,
    /// Size of the disk, in MiB.
    #[arg(long, default_value_t = 2048, value_name = "MIB")]
    pub(crate) disk_mib: u32,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct TemplateBuild {
    /// The template's name.
    pub(crate) name: String,
    /// The guest kernel, an uncompressed `vmlinux`.
    #[arg(long, value_name = "FILE")]
    pub(crate) kernel: PathBuf,
    /// The root file system image.
    #[arg(long, value_name = "FILE")]
    pub(crate) rootfs: PathBuf,
    /// Virtual processors.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub(crate) cpus: u32,
    /// Memory, in MiB.
    #[arg(long, default_value_t = 512, value_name = "MIB")]
    pub(crate) memory_mib: u32,
    /// How the template's machine is isolated; sandboxes run the same way.
    #[arg(long, env = "BELLJAR_RUNTIME", value_enum, default_value_t = RuntimeChoice::Auto)]
    pub(crate) runtime: RuntimeChoice,
    #[command(flatten)]
    pub(crate) firecracker: FirecrackerOptions,
    /// Build even when an equal template is there.
    #[arg(long)]
    pub(crate) force: bool,
}
