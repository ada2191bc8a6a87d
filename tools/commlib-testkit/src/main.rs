//! Starts the brokers that a whole test run shares.

use std::io;
use std::process::{Command, ExitCode};

use clap::{Parser, Subcommand};
use commlib_testkit::{
    AMQP_URL, MQTT_URL, Mosquitto, REDIS_URL, RabbitMq, Redis, given_amqp_url, given_mqtt_url,
    given_redis_url,
};

/// Brokers for tests of commlib.
#[derive(Debug, Parser)]
#[command(name = "commlib-testkit", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Runs a command with brokers around it: their URLs are in COMMLIB_TEST_MQTT_URL, COMMLIB_TEST_REDIS_URL and
    /// COMMLIB_TEST_AMQP_URL.
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
    let brokers = match Brokers::start().await {
        Ok(brokers) => brokers,
        Err(error) => {
            eprintln!("error: {error}");
            return ExitCode::FAILURE;
        }
    };
    child.envs(brokers.urls());
    // The brokers die with this process; Ctrl-C reaches all of them by itself.
    let status = tokio::task::spawn_blocking(move || child.status()).await;
    brokers.stop().await;
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

/// The brokers that were started here: those that are installed, and not given by the environment.
struct Brokers {
    mosquitto: Option<Mosquitto>,
    redis: Option<Redis>,
    rabbitmq: Option<RabbitMq>,
}

impl Brokers {
    async fn start() -> io::Result<Self> {
        let mut this = Self {
            mosquitto: None,
            redis: None,
            rabbitmq: None,
        };
        if !given(MQTT_URL, given_mqtt_url().as_deref()) && Mosquitto::available() {
            this.mosquitto = Some(Mosquitto::builder().try_start().await?);
        }
        if !given(REDIS_URL, given_redis_url().as_deref()) && Redis::available() {
            this.redis = Some(Redis::builder().try_start().await?);
        }
        if !given(AMQP_URL, given_amqp_url().as_deref()) && RabbitMq::available() {
            this.rabbitmq = Some(RabbitMq::try_start().await?);
        }
        Ok(this)
    }

    fn urls(&self) -> Vec<(&'static str, String)> {
        let mqtt = self.mosquitto.as_ref().map(|b| (MQTT_URL, b.url()));
        let amqp = self.rabbitmq.as_ref().map(|b| (AMQP_URL, b.url()));
        let redis = self.redis.as_ref().map(|b| (REDIS_URL, b.url()));
        mqtt.into_iter().chain(redis).chain(amqp).collect()
    }

    async fn stop(&self) {
        if let Some(broker) = &self.mosquitto {
            broker.stop().await;
        }
        if let Some(broker) = &self.redis {
            broker.stop().await;
        }
        if let Some(broker) = &self.rabbitmq {
            broker.stop().await;
        }
    }
}

/// Whether the environment names a broker; then says which.
fn given(variable: &str, url: Option<&str>) -> bool {
    if let Some(url) = url {
        eprintln!(
            "commlib-testkit: tests use the broker that {variable} names ({})",
            without_login(url)
        );
    }
    url.is_some()
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
