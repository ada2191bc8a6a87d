//! The `commlib` command: publish, subscribe, call and serve on any broker, from a shell.
//!
//! Results are JSON on stdout, one object per line; everything else goes to stderr. What it prints and how it exits is
//! a contract that scripts rely on.

mod broker;
mod call;
mod durable;
mod exec;
mod failure;
mod input;
mod output;
mod publish;
mod serve;
mod stop;
mod subscribe;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use commlib::Dialect;
use tracing_subscriber::EnvFilter;

use crate::broker::Broker;
use crate::failure::Failure;

const EXAMPLES: &str = "\
Examples:
  export COMMLIB_URL=mqtt://localhost:1883
  commlib sub 'sensors.*'
  commlib pub sensors.sonar.front '{\"distance\": 1.2}'
  commlib serve math.double --exec 'jq \". * 2\"'
  commlib call math.double 21

Exit status: 0 done, 1 the operation failed, 2 wrong usage.
COMMLIB_LOG=debug logs to stderr.";

/// Publish, subscribe, call and serve on any broker.
#[derive(Parser)]
#[command(name = "commlib", version, after_help = EXAMPLES)]
struct Cli {
    /// The broker, such as mqtt://user:password@host:1883
    // An environment variable may hold a password: the help must not show it.
    #[arg(long, env = "COMMLIB_URL", hide_env_values = true)]
    url: Option<String>,
    /// How other programs on the broker write messages: envelope, commlib-py, commlib-py-0.11
    #[arg(long)]
    dialect: Option<Dialect>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Pub(publish::Args),
    Sub(subscribe::Args),
    Call(call::Args),
    Serve(serve::Args),
}

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    let outcome = log().and_then(|()| {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .enable_all()
            .build()
            .map_err(|e| Failure::because("start", &e))?;
        let outcome = runtime.block_on(run(cli));
        // A read of stdin that is under way cannot be cancelled and must not keep us.
        runtime.shutdown_background();
        outcome
    });
    failure::exit(outcome)
}

async fn run(cli: Cli) -> Result<(), Failure> {
    let broker = Broker::new(cli.url, cli.dialect)?;
    match cli.command {
        Command::Pub(args) => publish::run(&broker, args).await,
        Command::Sub(args) => subscribe::run(&broker, args).await,
        Command::Call(args) => call::run(&broker, args).await,
        Command::Serve(args) => serve::run(&broker, args).await,
    }
}

/// Logs to stderr what `COMMLIB_LOG` asks for; nothing without it.
fn log() -> Result<(), Failure> {
    let wanted = std::env::var("COMMLIB_LOG").unwrap_or_default();
    if wanted.is_empty() {
        return Ok(());
    }
    let filter =
        EnvFilter::try_new(wanted).map_err(|e| Failure::usage(format_args!("COMMLIB_LOG: {e}")))?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    Ok(())
}
