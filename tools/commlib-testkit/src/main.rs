//! Starts the brokers that a whole test run shares.

use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use commlib_testkit::{MQTT_URL, Mosquitto, given_mqtt_url};

/// Brokers for tests of commlib.
#[derive(Debug, Parser)]
#[command(name = "commlib-testkit", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Runs a command with brokers around it: their URLs are in COMMLIB_TEST_MQTT_URL.
    Run {
        /// The command and its arguments.
        #[arg(trailing_var_arg = true, required = true, value_name = "COMMAND")]
        command: Vec<String>,
    },
}

#[tokio::main]
async fn main() -> ExitCode {
    let Task::Run { command } = Arguments::parse().command;
    run(&command).await
}

async fn run(command: &[String]) -> ExitCode {
    let Some((program, arguments)) = command.split_first() else {
        return ExitCode::from(2);
    };
    let mut child = Command::new(program);
    child.args(arguments);
    let mut broker = None;
    if let Some(url) = given_mqtt_url() {
        eprintln!(
            "commlib-testkit: tests use the MQTT broker that {MQTT_URL} names ({})",
            without_login(&url)
        );
    } else if Mosquitto::available() {
        match Mosquitto::builder().try_start().await {
            Ok(started) => {
                child.env(MQTT_URL, broker.insert(started).url());
            }
            Err(error) => {
                eprintln!("error: {error}");
                return ExitCode::FAILURE;
            }
        }
    }
    // The broker dies with this process; Ctrl-C reaches all three by itself.
    let status = tokio::task::spawn_blocking(move || child.status()).await;
    if let Some(broker) = &broker {
        broker.stop().await;
    }
    match status {
        Ok(Ok(status)) => exit_code(status),
        Ok(Err(error)) => {
            eprintln!("error: {program}: {error}");
            ExitCode::from(127)
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// The command's own exit code; as shells do, 128 and the number of the signal that ended it.
fn exit_code(status: std::process::ExitStatus) -> ExitCode {
    #[cfg(unix)]
    let signal = std::os::unix::process::ExitStatusExt::signal(&status).map(|number| 128 + number);
    #[cfg(not(unix))]
    let signal = None;
    let code = status.code().or(signal).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// The URL without user, password and options.
fn without_login(url: &str) -> String {
    commlib_core::BrokerUrl::parse(url)
        .map_or_else(|_| "not a URL".to_owned(), |url| url.to_string())
}
