//! Arguments, configuration, logs, server, signals, exit code.
//!
//! Exit codes: 0 stopped in an orderly way, 2 the configuration is wrong, 1 everything else.

use std::io::IsTerminal;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use opamp_server::config::{Config, ConfigError, Loaded, LogFormat, Overrides};
use opamp_server::healthcheck;
use opamp_server::server::Server;
use opamp_server::store;
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

/// An OpAMP server that never lies about the fleet: who was connected, when, why it ended, and how sure we are.
#[derive(Debug, Parser)]
#[command(version, about)]
struct Arguments {
    /// Configuration file (TOML); every key also has an environment variable `OPAMP_SECTION_KEY`.
    #[arg(long, global = true, value_name = "FILE", env = "OPAMP_CONFIG")]
    config: Option<PathBuf>,
    /// Address and port where agents connect [default: 127.0.0.1:4320].
    #[arg(long, global = true, value_name = "ADDRESS")]
    agents_listen: Option<String>,
    /// Address and port where operators connect [default: 127.0.0.1:4321].
    #[arg(long, global = true, value_name = "ADDRESS")]
    operators_listen: Option<String>,
    /// Where state and history are kept: `sqlite://FILE` or `postgres://…` [default: `sqlite://opamp-server.db`].
    #[arg(long, global = true, value_name = "URL")]
    store_url: Option<String>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server (the default).
    Serve {
        /// Refuse to start when migrations are missing, instead of applying them.
        #[arg(long)]
        no_migrate: bool,
    },
    /// Ask the running server of this configuration whether it is ready; exit code 1 if it is not.
    Healthcheck,
    /// Look at the store's schema or change it.
    #[command(subcommand)]
    Migrate(Migrate),
    /// Look at the configuration.
    #[command(subcommand, name = "config")]
    Configuration(Configuration),
}

#[derive(Debug, Subcommand)]
enum Migrate {
    /// Apply all migrations that are missing.
    Up,
    /// Take back the newest migration; what only it can hold is lost.
    Down {
        /// Confirm that data may be lost.
        #[arg(long)]
        yes: bool,
    },
    /// Say which migrations are applied.
    Status,
}

#[derive(Debug, Subcommand)]
enum Configuration {
    /// Print the effective configuration, where each value comes from, and what is wrong with it.
    Check,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let overrides = Overrides {
        config: arguments.config,
        agents_listen: arguments.agents_listen,
        operators_listen: arguments.operators_listen,
        store_url: arguments.store_url,
    };
    let loaded = match Config::load(&overrides) {
        Ok(loaded) => loaded,
        Err(error) => return refuse(&error),
    };
    if let Some(Command::Configuration(Configuration::Check)) = arguments.command {
        print(&loaded.render());
        loaded.warnings.iter().for_each(|warning| complain(&format!("warning: {warning}")));
        return ExitCode::SUCCESS;
    }
    start_logs(&loaded);
    match run(&loaded, arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn refuse(error: &ConfigError) -> ExitCode {
    complain(&error.to_string());
    ExitCode::from(2)
}

#[expect(clippy::print_stderr, reason = "logs do not exist yet")]
fn complain(text: &str) {
    eprintln!("opamp-server: {text}");
}

#[expect(clippy::print_stdout, reason = "the answer to the command")]
fn print(text: &str) {
    println!("{text}");
}

fn start_logs(loaded: &Loaded) {
    let log = &loaded.config.log;
    // The filter was checked with the rest of the configuration.
    let filter = EnvFilter::new(with_driver(&log.level));
    let human = match log.format {
        Some(format) => format == LogFormat::Human,
        None => std::io::stderr().is_terminal(),
    };
    let logs =
        tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false);
    if human {
        logs.with_ansi(std::io::stderr().is_terminal()).init();
    } else {
        logs.json().flatten_event(true).with_current_span(false).with_span_list(false).init();
    }
    for warning in &loaded.warnings {
        tracing::warn!("{warning}");
    }
}

/// The database driver tells of every hiccup what the server says once: only its errors are logged
/// unless somebody asks for more.
fn with_driver(level: &str) -> String {
    if level.contains("sqlx") { level.to_owned() } else { format!("{level},sqlx=error") }
}

fn run(loaded: &Loaded, command: Option<Command>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = match command {
        None => runtime.block_on(serve(&loaded.config, true)),
        Some(Command::Serve { no_migrate }) => runtime.block_on(serve(&loaded.config, !no_migrate)),
        Some(Command::Healthcheck) => runtime.block_on(healthcheck(&loaded.config)),
        Some(Command::Migrate(migrate)) => runtime.block_on(migrations(&loaded.config, migrate)),
        Some(Command::Configuration(Configuration::Check)) => Ok(()),
    };
    // Whatever is still running was given its time.
    runtime.shutdown_background();
    result
}

/// Runs the server until a signal; a second one ends it at once.
async fn serve(config: &Config, migrate: bool) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = tokio::select! {
        server = Server::start(config, migrate) => server?,
        // Nobody is connected yet: there is nothing to wait for.
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let (agents, operators) = (server.agents_address(), server.operators_address());
    let path = &config.agents.path;
    tracing::info!("agents connect at ws://{agents}{path} or http://{agents}{path}");
    tracing::info!("operators look at http://{operators}/api/v1/agents, /metrics and /openapi.json");
    tracing::info!("state and history are kept in {}", config.store.url.masked_url());
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let running = server.run(async {
        // The sender is dropped or used: both mean stop.
        let _signalled = stopped.await;
    });
    tokio::pin!(running);
    tokio::select! {
        result = &mut running => return Ok(result?),
        _ = terminate.recv() => tracing::info!("SIGTERM: stopping; once more to stop at once"),
        _ = interrupt.recv() => tracing::info!("SIGINT: stopping; once more to stop at once"),
    }
    drop(stop);
    tokio::select! {
        result = running => {
            result?;
            tracing::info!("stopped");
            Ok(())
        }
        _ = terminate.recv() => anyhow::bail!("stopped at once by a second SIGTERM"),
        _ = interrupt.recv() => anyhow::bail!("stopped at once by a second SIGINT"),
    }
}

/// Prints what the server says of itself; an error unless it is ready.
async fn healthcheck(config: &Config) -> anyhow::Result<()> {
    print(&healthcheck::ask(config.operators.listen).await?);
    Ok(())
}

async fn migrations(config: &Config, command: Migrate) -> anyhow::Result<()> {
    let create = matches!(command, Migrate::Up);
    let migrations = store::migrations(config.store.url.expose(), create).await?;
    let state = match command {
        Migrate::Status => migrations.state().await?,
        Migrate::Up => migrations.up().await?,
        Migrate::Down { yes: true } => migrations.down().await?,
        Migrate::Down { yes: false } => {
            anyhow::bail!("going back a migration can lose data: add --yes to confirm, and keep a backup")
        }
    };
    print(&state.to_string());
    Ok(())
}
