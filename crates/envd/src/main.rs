//! `belljar-envd`: PID 1 of a guest, or a plain server in host mode.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use belljar_envd::accounts::Accounts;
use belljar_envd::args::{self, Command, Options};
use belljar_envd::log::Console;
use belljar_envd::state::DEFAULT_PATH;
use belljar_envd::{Settings, State, guest, serve};
use belljar_wire::{ENVD_PORT, ENVD_VERSION};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Threads that read and write files. An upload holds one while its client sends.
const BLOCKING_THREADS: usize = 256;

fn main() -> ExitCode {
    let options = match args::parse(std::env::args().skip(1)) {
        // The kernel hands PID 1 whatever its command line holds beyond its own options.
        _ if is_init() => Options::default(),
        Ok(Command::Help) => {
            print!("{}", args::HELP);
            return ExitCode::SUCCESS;
        }
        Ok(Command::Version) => {
            println!("{ENVD_VERSION} (belljar-envd {})", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(Command::Run(options)) => options,
        Err(error) => {
            eprintln!("failed to {error}");
            return ExitCode::from(2);
        }
    };
    let level = if options.verbose { tracing::Level::DEBUG } else { tracing::Level::INFO };
    tracing::subscriber::set_global_default(Console::new(level))
        .expect("nothing has set one before");
    if is_init() {
        return run_guest();
    }
    if !options.host_mode {
        eprintln!("failed to start: this is not PID 1 of a guest; see --host-mode in --help");
        return ExitCode::from(2);
    }
    report(run_host(options))
}

fn is_init() -> bool {
    std::process::id() == 1
}

fn report(outcome: Result<(), StartError>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("failed to {error}");
            ExitCode::FAILURE
        }
    }
}

/// Why the daemon did not serve, or stopped.
#[derive(Debug, thiserror::Error)]
enum StartError {
    #[error("start the runtime: {0}")]
    Runtime(std::io::Error),
    #[error("listen on {0}: {1}")]
    Listen(SocketAddr, std::io::Error),
    #[error("start the control thread: {0}")]
    Control(std::io::Error),
    #[error("watch for signals: {0}")]
    Signals(std::io::Error),
    #[error("accept connections: {0}")]
    Serve(std::io::Error),
    #[error("find the account of uid {0}; name one with --root-user")]
    NoAccount(u32),
}

/// Sets the machine up and serves until it ends. Returning would be a kernel panic, so a daemon
/// that cannot serve ends the machine.
fn run_guest() -> ExitCode {
    guest::set_up_machine();
    let outcome = runtime().and_then(|runtime| {
        runtime.block_on(async {
            let state = Arc::new(State::new(guest::settings()));
            let listener = listen(SocketAddr::from(([0, 0, 0, 0], ENVD_PORT))).await?;
            guest::control::start(Arc::clone(&state)).map_err(StartError::Control)?;
            serve(listener, state, CancellationToken::new()).await.map_err(StartError::Serve)
        })
    });
    let code = report(outcome);
    guest::reboot();
    code
}

fn run_host(options: Options) -> Result<(), StartError> {
    let address = options.listen.unwrap_or(SocketAddr::from(([127, 0, 0, 1], ENVD_PORT)));
    let settings = host_settings(options)?;
    runtime()?.block_on(async {
        let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
        let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
        let listener = listen(address).await?;
        // The port asked for may be 0, which takes a free one.
        let address = listener.local_addr().map_err(|error| StartError::Listen(address, error))?;
        tracing::info!(%address, user = settings.default_user, "serving");
        let stop = CancellationToken::new();
        let serving = serve(listener, Arc::new(State::new(settings)), stop.clone());
        tokio::pin!(serving);
        tokio::select! {
            outcome = &mut serving => return outcome.map_err(StartError::Serve),
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        stop.cancel();
        serving.await.map_err(StartError::Serve)
    })
}

fn host_settings(options: Options) -> Result<Settings, StartError> {
    let uid = rustix::process::geteuid().as_raw();
    let user = match options.default_user {
        Some(user) => user,
        None => Accounts::load().user_by_id(uid).ok_or(StartError::NoAccount(uid))?.name,
    };
    #[expect(clippy::disallowed_methods, reason = "configuration is read here, in main")]
    let search_path = std::env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.to_owned());
    let default_workdir = options.default_workdir;
    Ok(Settings { search_path, default_workdir, ..Settings::on_host(user) })
}

/// One thread serves: a guest has few processors and its work is waiting.
fn runtime() -> Result<tokio::runtime::Runtime, StartError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(BLOCKING_THREADS)
        .build()
        .map_err(StartError::Runtime)
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|error| StartError::Listen(address, error))
}
