//! `commlib serve`: answers calls.

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use clap::Args as ClapArgs;
use commlib::{Connection, Name, RawValue, Rpc, RpcError};
use serde::Serialize;
use tokio::sync::{mpsc, watch};

use crate::broker::{Broker, confirmed};
use crate::exec;
use crate::failure::{Failure, note};
use crate::input::json;
use crate::output::Output;
use crate::stop::Stop;

/// How many requests may wait to be printed.
const WINDOW: usize = 64;

/// How long the last replies may take to leave.
const LAST_REPLIES: Duration = Duration::from_secs(5);

/// The code of the error reply to requests that come too late.
const ENDED: &str = "ended";

const EXAMPLES: &str = "\
Examples:
  commlib serve test.echo --echo
  commlib serve robot.status --reply '{\"battery\": 0.8}'
  commlib serve math.double --exec 'jq \". * 2\"' --count 10
  commlib serve robot.beep --exec 'beep && echo true' --for 1h

Prints `ready` on stderr once calls arrive, and a line for each request. CMD gets
the request on its stdin and prints the reply, which must be JSON; if it fails,
the caller gets an error reply with what it has written to stderr. Several may
run at a time. All of them are killed when the command ends.";

/// Answer calls to a service.
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The service, such as math.double
    service: Name,
    #[command(flatten)]
    answer: AnswerArgs,
    /// End after so many requests
    #[arg(long)]
    count: Option<u64>,
    /// End after this time of serving
    #[arg(long = "for", value_name = "TIME", value_parser = commlib::parse_duration)]
    limit: Option<Duration>,
}

#[derive(Debug, ClapArgs)]
#[group(required = true, multiple = false)]
struct AnswerArgs {
    /// Reply with the request
    #[arg(long)]
    echo: bool,
    /// Always reply with this
    #[arg(long, value_name = "JSON", value_parser = json, allow_negative_numbers = true)]
    reply: Option<Box<RawValue>>,
    /// Reply with what a shell command prints
    #[arg(long, value_name = "CMD")]
    exec: Option<String>,
}

pub(crate) async fn run(broker: &Broker, args: Args) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let Some(connection) = stop.or(broker.connect()).await else {
        return Ok(());
    };
    let connection = connection?;
    let outcome = serve(&connection, args, &mut stop).await;
    let closed = connection.close().await;
    outcome?;
    Ok(closed?)
}

async fn serve(connection: &Connection, args: Args, stop: &mut Stop) -> Result<(), Failure> {
    let (requests, mut arrived) = mpsc::channel(WINDOW);
    let (end, ending) = watch::channel(false);
    let service = Arc::new(Service {
        answer: args.answer.into(),
        max_reply: connection.link().capabilities().max_payload,
        left: AtomicU64::new(args.count.unwrap_or(u64::MAX)),
        requests,
        ending,
    });
    let starting = connection.rpc_service(args.service.as_str(), move |request| {
        let service = service.clone();
        async move { service.answer(request).await }
    });
    let Some(handle) = stop.or(confirmed(starting)).await else {
        return Ok(());
    };
    let handle = handle?;
    note("ready");
    stop.after(args.limit);
    let mut output = Output::new();
    let printed = stop.or(print(&mut arrived, &mut output, args.count)).await;
    // After the last request of `--count` its reply is waited for; after anything else commands are killed.
    let finished = matches!(printed, Some(Ok(())));
    if !finished {
        end.send_replace(true);
    }
    drop(arrived);
    let mut stopped = pin!(handle.stop());
    if !finished || stop.or(&mut stopped).await.is_none() {
        end.send_replace(true);
        let _ = tokio::time::timeout(LAST_REPLIES, stopped).await;
    }
    match printed {
        Some(outcome) => outcome,
        None => output.last_flush().await.map(drop),
    }
}

/// What is printed for each request.
#[derive(Serialize)]
struct RequestLine {
    request: Box<RawValue>,
}

async fn print(
    requests: &mut mpsc::Receiver<Box<RawValue>>,
    output: &mut Output,
    count: Option<u64>,
) -> Result<(), Failure> {
    let mut printed = 0;
    while count.is_none_or(|count| printed < count) {
        let Some(request) = output.flush_before(requests.recv()).await? else {
            break;
        };
        output.line(&RequestLine { request })?;
        printed += 1;
        if output.is_full() {
            output.flush().await?;
        }
    }
    output.flush().await
}

/// How requests are answered.
#[derive(Debug)]
enum Answer {
    Echo,
    Reply(Box<RawValue>),
    Exec(String),
}

impl From<AnswerArgs> for Answer {
    fn from(args: AnswerArgs) -> Self {
        // The parser has seen to it that exactly one is given.
        match (args.reply, args.exec) {
            (Some(reply), _) => Self::Reply(reply),
            (None, Some(command)) => Self::Exec(command),
            (None, None) => Self::Echo,
        }
    }
}

struct Service {
    answer: Answer,
    max_reply: usize,
    /// How many more requests are answered.
    left: AtomicU64,
    requests: mpsc::Sender<Box<RawValue>>,
    ending: watch::Receiver<bool>,
}

impl Service {
    async fn answer(&self, request: Box<RawValue>) -> Result<Box<RawValue>, RpcError> {
        let ended = || RpcError::new(ENDED, "this service has ended");
        self.left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .map_err(|_| ended())?;
        // Fails only when we are about to end.
        let _ = self.requests.send(request.clone()).await;
        match &self.answer {
            Answer::Echo => Ok(request),
            Answer::Reply(reply) => Ok(reply.clone()),
            Answer::Exec(command) => {
                let mut ending = self.ending.clone();
                tokio::select! {
                    biased;
                    // An error means that whoever would say so is gone.
                    _ = ending.wait_for(|ending| *ending) => Err(ended()),
                    reply = exec::run(command, &request, self.max_reply) => reply,
                }
            }
        }
    }
}
