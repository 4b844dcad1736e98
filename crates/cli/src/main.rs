//! `belljar`: every role of the server, and every command a user types.
//!
//! This crate composes and presents; what sandboxes are is decided below it.
#![forbid(unsafe_code)]

mod api;
mod args;
mod blob;
mod catalog;
mod doctor;
mod host;
mod lock;
mod logs;
mod node;
mod operator;
mod output;
mod preset;
mod sandbox;
mod server_file;
mod stop;
mod template;
mod template_build;
mod up;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use belljar_daemon::clock::shift;
use belljar_daemon::fault;
use belljar_daemon::telemetry::{self, LogFormat};
use belljar_domain::Secret;
use clap::Parser as _;
use serde::Serialize;

use api::{SdkEnv, Target};
use args::{Cli, Command, SandboxCommand, TemplateCommand};
use blob::AwsEnv;
use operator::token_file::{self, AdminEnv};
use preset::Local;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let format = if cli.json { LogFormat::Json } else { LogFormat::Text };
    telemetry::init(&cli.log, format);
    raise_descriptor_limit();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(e) => return fail(&anyhow::Error::new(e).context("failed to start the async runtime")),
    };
    match runtime.block_on(dispatch(cli)) {
        Ok(code) => code,
        Err(e) => fail(&e),
    }
}

/// Takes every descriptor this process may have: a sandbox costs some seven, a connection one or
/// two, and the usual soft limit of 1,024 is a hundred sandboxes with a handful of users.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }) {
        tracing::warn!(error = %e, "the descriptor limit stays as it is");
    }
}

fn fail(error: &anyhow::Error) -> ExitCode {
    use std::io::Write as _;
    // With standard error closed there is nobody left to tell.
    let _closed = writeln!(std::io::stderr(), "belljar: {error:#}").is_err();
    ExitCode::FAILURE
}

async fn dispatch(cli: Cli) -> Result<ExitCode> {
    let environment = Environment::read();
    if let Some(fault) = &environment.fault {
        fault::arm(fault).context("failed to do what BELLJAR_FAULT asks for")?;
    }
    if let Some(pipe) = &environment.clock_shift {
        shift::follow(pipe).context("failed to do what BELLJAR_CLOCK_SHIFT asks for")?;
    }
    let local = Local::open(&cli.place, environment.home.as_deref())?;
    let target = || Target::find(&local, &environment.sdk);
    let admin = AdminEnv {
        token: environment.admin_token,
        file: cli.place.admin_token_file.clone(),
        api_url: environment.sdk.api_url.clone(),
    };
    match cli.command {
        Command::Up(options) => up::run(local, options, &admin, environment.aws, cli.json).await,
        Command::Node(options) => node::run(local, options, environment.aws, cli.json).await,
        Command::Env => print_env(&local, cli.json),
        Command::Doctor(options) => doctor::run(&local, &options, cli.json).await,
        Command::Sandbox(SandboxCommand::List) => sandbox::list(target()?, cli.json).await,
        Command::Sandbox(SandboxCommand::Kill { ids, all }) => {
            sandbox::kill(target()?, cli.json, ids, all).await
        }
        Command::Sandbox(SandboxCommand::Logs { id, follow, level }) => {
            logs::print(target()?, cli.json, &id, follow, level).await
        }
        Command::Sandbox(SandboxCommand::Exec { id, user, cwd, command }) => {
            let exec = sandbox::Exec { id, user, cwd, command };
            sandbox::exec(target()?, cli.json, exec).await
        }
        Command::Template(TemplateCommand::List) => template::list(target()?, cli.json).await,
        Command::Template(TemplateCommand::Rootfs(options)) => {
            template_build::rootfs(options, cli.json).await
        }
        Command::Template(TemplateCommand::Build(options)) => {
            template_build::build(&local, options, cli.json).await
        }
        Command::Blob(options) => blob::run(&local, options, environment.aws, cli.json).await,
        Command::Team(command) => {
            operator::team::run(&token_file::api(&local, &admin)?, command, cli.json).await
        }
        Command::Tier(command) => {
            operator::tier::run(&token_file::api(&local, &admin)?, command, cli.json).await
        }
        Command::User(command) => {
            operator::user::run(&token_file::api(&local, &admin)?, command, cli.json).await
        }
        Command::Key(command) => {
            operator::credentials::keys(&token_file::api(&local, &admin)?, command, cli.json).await
        }
        Command::Token(command) => {
            let api = token_file::api(&local, &admin)?;
            operator::credentials::tokens(&api, command, cli.json).await
        }
    }
}

/// What is read from the environment besides the flags: once, here.
struct Environment {
    home: Option<PathBuf>,
    sdk: SdkEnv,
    /// What the operator shows the server.
    admin_token: Option<Secret<String>>,
    /// Where a test wants this process to die.
    fault: Option<String>,
    /// A named pipe through which a test moves this process's clock.
    clock_shift: Option<PathBuf>,
    /// Who asks a blob store that speaks S3.
    aws: AwsEnv,
}

impl Environment {
    #[expect(clippy::disallowed_methods, reason = "this is main, where configuration is read")]
    fn read() -> Environment {
        let text = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        Environment {
            home: text("HOME").map(PathBuf::from),
            admin_token: text("BELLJAR_ADMIN_TOKEN").map(Secret::new),
            fault: text("BELLJAR_FAULT"),
            clock_shift: text("BELLJAR_CLOCK_SHIFT").map(PathBuf::from),
            aws: AwsEnv {
                key_id: text("AWS_ACCESS_KEY_ID"),
                secret: text("AWS_SECRET_ACCESS_KEY").map(Secret::new),
                session_token: text("AWS_SESSION_TOKEN").map(Secret::new),
                region: text("AWS_REGION").or_else(|| text("AWS_DEFAULT_REGION")),
                endpoint: text("AWS_ENDPOINT_URL_S3").or_else(|| text("AWS_ENDPOINT_URL")),
            },
            sdk: SdkEnv {
                api_url: text("E2B_API_URL"),
                sandbox_url: text("E2B_SANDBOX_URL"),
                api_key: text("E2B_API_KEY"),
            },
        }
    }
}

#[derive(Serialize)]
struct Exports {
    #[serde(rename = "E2B_API_KEY")]
    api_key: String,
    #[serde(rename = "E2B_API_URL")]
    api_url: String,
    #[serde(rename = "E2B_SANDBOX_URL")]
    sandbox_url: String,
}

fn print_env(local: &Local, as_json: bool) -> Result<ExitCode> {
    let Target { api_key, api_url, sandbox_url } = Target::of_server(local)?;
    let exports = Exports { api_key, api_url, sandbox_url };
    if as_json {
        output::json(&exports)?;
    } else {
        output::line(&format!("export E2B_API_KEY={}", exports.api_key))?;
        output::line(&format!("export E2B_API_URL={}", exports.api_url))?;
        output::line(&format!("export E2B_SANDBOX_URL={}", exports.sandbox_url))?;
    }
    Ok(ExitCode::SUCCESS)
}
