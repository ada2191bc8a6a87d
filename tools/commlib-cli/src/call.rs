//! `commlib call`: calls a service and prints what it replies.

use std::time::Duration;

use clap::Args as ClapArgs;
use commlib::{Name, RawValue, Rpc, RpcClientOptions};

use crate::broker::Broker;
use crate::failure::Failure;
use crate::input::json;
use crate::output::Output;

const EXAMPLES: &str = "\
Examples:
  commlib call math.add '{\"a\": 1, \"b\": 2}'
  commlib call robot.battery
  commlib call robot.battery --timeout 2s --count 10

A service that answers with an error makes it exit 1, with the code and the text
of the error on stderr.";

/// Call a service and print its reply.
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The service, such as math.add
    service: Name,
    /// The request
    #[arg(value_parser = json, default_value = "{}", allow_negative_numbers = true)]
    json: Box<RawValue>,
    /// How long to wait for each reply
    #[arg(long, value_parser = commlib::parse_duration, default_value = "30s")]
    timeout: Duration,
    /// How many calls to make, one after the other
    #[arg(long, default_value_t = 1)]
    count: u64,
}

pub(crate) async fn run(broker: &Broker, args: Args) -> Result<(), Failure> {
    let connection = broker.connect().await?;
    let client = connection.rpc_client_with::<Box<RawValue>, Box<RawValue>>(
        args.service.as_str(),
        RpcClientOptions::default().timeout(args.timeout),
    )?;
    let mut output = Output::new();
    for _ in 0..args.count {
        let reply = client.call(&args.json).await?;
        output.line(&reply)?;
        output.flush().await?;
    }
    // Everything we wanted has been answered: a failing goodbye changes nothing.
    let _ = connection.close().await;
    Ok(())
}
