//! `commlib pub`: publishes a message, or each line of stdin.

use std::fmt;
use std::time::Duration;

use clap::Args as ClapArgs;
use commlib::{
    Connection, Delivery, Error, ErrorKind, Name, PubSub, Publisher, PublisherOptions, RawValue,
    Receipt,
};
use serde::Serialize;
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::broker::Broker;
use crate::failure::{Failure, chain, report};
use crate::input::{Lines, NotJson, json};
use crate::output::{LAST_FLUSH, Output};
use crate::stop::Stop;

/// How many messages may wait for their confirmation to be printed.
const WINDOW: usize = 4096;

const EXAMPLES: &str = "\
Examples:
  commlib pub sensors.sonar.front '{\"distance\": 1.2}'
  commlib pub lights.hall '\"on\"' --confirm
  commlib pub clock.tick 1 --count 10 --interval 1s
  jq -c '.[]' readings.json | commlib pub sensors.import --confirm

Without --confirm messages are sent as they come and not kept: those that meet a
broken link are lost, which is said on stderr. With --confirm each is kept and
sent again until the broker has confirmed it, over restarts of the broker.";

/// Publish a message, or each line of stdin.
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// The topic, such as sensors.sonar.front
    topic: Name,
    /// The message; without it each line of stdin is one
    #[arg(value_parser = json, allow_negative_numbers = true)]
    json: Option<Box<RawValue>>,
    /// How often to publish JSON, by default once; or how many lines of stdin at most
    #[arg(long)]
    count: Option<u64>,
    /// How long to wait between two messages
    #[arg(long, value_parser = commlib::parse_duration)]
    interval: Option<Duration>,
    /// Keep each message until the broker has confirmed it (at least once), and print that it has
    #[arg(long)]
    confirm: bool,
}

pub(crate) async fn run(broker: &Broker, args: Args) -> Result<(), Failure> {
    let connection = broker.connect().await?;
    let delivery = if args.confirm {
        Delivery::AtLeastOnce
    } else {
        Delivery::BestEffort
    };
    let options = PublisherOptions::default().delivery(delivery);
    let mut feed = Feed {
        publisher: connection.publisher_with(args.topic.as_str(), options)?,
        interval: args.interval,
        messages: match args.json {
            Some(json) => Messages::Same {
                json,
                count: args.count.unwrap_or(1),
                number: 0,
            },
            None => Messages::Lines {
                lines: Lines::new(),
                left: args.count.unwrap_or(u64::MAX),
            },
        },
        stop: Stop::new()?,
        problems: Problems::default(),
    };
    if args.confirm {
        confirmed(&connection, feed).await
    } else {
        let fed = feed.run(None).await;
        let closed = connection.close().await;
        fed?;
        closed?;
        feed.problems.outcome("were not sent")
    }
}

/// Feeds, and prints what the broker has confirmed at the same time: with one message after the other each would cost
/// a round trip.
async fn confirmed(connection: &Connection, mut feed: Feed) -> Result<(), Failure> {
    let (receipts, waiting) = mpsc::channel(WINDOW);
    let mut printer = tokio::spawn(print(waiting));
    let fed = feed.run(Some(receipts)).await;
    // At the end of the input we wait for every confirmation, however long the broker is away. A signal ends that.
    let printed = feed.stop.or(&mut printer).await;
    let closed = connection.close().await;
    let printed = match printed {
        Some(printed) => printed,
        // Closing has settled every receipt; what is left is to print them.
        None => timeout(LAST_FLUSH, printer)
            .await
            .map_err(|_| Failure::failed("stdout takes no more"))?,
    };
    let unconfirmed = printed.map_err(|e| Failure::because("print", &e))??;
    fed?;
    feed.problems.outcome("were not sent")?;
    // What this would say about missing confirmations has been said for each message.
    unconfirmed.outcome("were not confirmed")?;
    Ok(closed?)
}

/// What `--confirm` prints for each message.
#[derive(Serialize)]
struct Confirmed {
    n: u64,
    confirmed: bool,
}

async fn print(mut receipts: mpsc::Receiver<(u64, Receipt)>) -> Result<Problems, Failure> {
    let mut output = Output::new();
    let mut problems = Problems::default();
    while let Some((n, receipt)) = output.flush_before(receipts.recv()).await? {
        match output.flush_before(receipt).await? {
            Ok(()) => output.line(&Confirmed { n, confirmed: true })?,
            Err(error) => problems.lost(&Place::Message(n), &error),
        }
        if output.is_full() {
            output.flush().await?;
        }
    }
    output.flush().await?;
    Ok(problems)
}

/// Messages on their way from the command line or stdin to the broker.
struct Feed {
    publisher: Publisher<Box<RawValue>>,
    interval: Option<Duration>,
    messages: Messages,
    stop: Stop,
    problems: Problems,
}

impl Feed {
    /// Publishes until the messages end, a signal comes, or nobody wants the receipts any more.
    async fn run(&mut self, receipts: Option<mpsc::Sender<(u64, Receipt)>>) -> Result<(), Failure> {
        let unwanted = async {
            match &receipts {
                Some(receipts) => receipts.closed().await,
                None => std::future::pending().await,
            }
        };
        let Self {
            publisher,
            interval,
            messages,
            stop,
            problems,
        } = self;
        let feeding = async {
            let mut number = 0;
            while let Some((place, message)) = messages.next().await? {
                let message = match message {
                    Ok(message) => message,
                    Err(error) => {
                        problems.skipped(&place, &error);
                        continue;
                    }
                };
                number += 1;
                if let (Some(pause), true) = (*interval, number > 1) {
                    tokio::time::sleep(pause).await;
                }
                match publisher.enqueue(&message).await {
                    Ok(receipt) => {
                        if let Some(receipts) = &receipts {
                            // Fails only if nobody wants them any more.
                            let _ = receipts.send((number, receipt)).await;
                        }
                    }
                    Err(error) if error.kind() == ErrorKind::Closed => return Err(error.into()),
                    Err(error) if error.kind() == ErrorKind::ConnectionLost => {
                        problems.lost(&place, &error);
                    }
                    Err(error) => problems.skipped(&place, &error),
                }
            }
            Ok(())
        };
        tokio::select! {
            biased;
            () = stop.wait() => Ok(()),
            fed = feeding => fed,
            () = unwanted => Ok(()),
        }
    }
}

/// Where messages come from.
enum Messages {
    /// One message, so many times.
    Same {
        json: Box<RawValue>,
        count: u64,
        number: u64,
    },
    /// The lines of stdin, so many at most.
    Lines { lines: Lines, left: u64 },
}

/// A message as it is called in errors.
enum Place {
    Only,
    Message(u64),
    Line(u64),
}

impl Messages {
    async fn next(&mut self) -> Result<Option<(Place, Result<Box<RawValue>, NotJson>)>, Failure> {
        match self {
            Self::Same {
                json,
                count,
                number,
            } => {
                if number == count {
                    return Ok(None);
                }
                *number += 1;
                let place = match *count {
                    1 => Place::Only,
                    _ => Place::Message(*number),
                };
                Ok(Some((place, Ok(json.clone()))))
            }
            Self::Lines { left: 0, .. } => Ok(None),
            Self::Lines { lines, left } => {
                let Some((number, text)) = lines.next().await? else {
                    return Ok(None);
                };
                let message = crate::input::from_slice(text);
                if message.is_ok() {
                    *left -= 1;
                }
                Ok(Some((Place::Line(number), message)))
            }
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Only => Ok(()),
            Self::Message(number) => write!(f, "message {number}: "),
            Self::Line(number) => write!(f, "line {number}: "),
        }
    }
}

/// Messages that did not make it: told on stderr, and remembered for the exit code.
#[derive(Debug, Default)]
struct Problems {
    skipped: u64,
    lost: u64,
}

impl Problems {
    /// A message that no retry would help: each is told.
    fn skipped(&mut self, place: &Place, error: &dyn std::error::Error) {
        self.skipped += 1;
        report(format_args!("{place}{}", chain(error)));
    }

    /// A message that met a broken link: the first is told, and then how many there were.
    fn lost(&mut self, place: &Place, error: &Error) {
        self.lost += 1;
        if self.lost == 1 {
            report(format_args!("{place}{}", chain(error)));
        }
    }

    fn outcome(&self, what: &str) -> Result<(), Failure> {
        match (self.skipped, self.lost) {
            (0, 0) => Ok(()),
            (_, 0 | 1) => Err(Failure::Reported),
            (_, lost) => Err(Failure::failed(format_args!("{lost} messages {what}"))),
        }
    }
}
