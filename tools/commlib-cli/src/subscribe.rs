//! `commlib sub`: prints what is published.

use std::pin::pin;
use std::time::Duration;

use clap::{Args as ClapArgs, ValueEnum};
use commlib::{
    Ack, Connection, Delivery, Gap, Header, Incoming, Malformed, Name, Pattern, PubSub, RawValue,
    Received, Subscriber, SubscriberOptions,
};
use futures_util::FutureExt;
use serde::Serialize;

use crate::broker::{Broker, confirmed};
use crate::durable::Durable;
use crate::failure::{Failure, chain, note};
use crate::output::Output;
use crate::stop::Stop;

/// How many best-effort messages may wait for a slow reader of stdout before the oldest are dropped.
const BURST: usize = 16_384;

const EXAMPLES: &str = "\
Examples:
  commlib sub 'sensors.*'
  commlib sub sensors.sonar.front --count 1 | jq .data.distance
  commlib sub 'alarms.*' --for 1m
  commlib sub 'orders.*' --delivery at-least-once --name order-log >> orders.jsonl

Prints `ready` on stderr once everything that is published from now on will be
printed. Missed messages show as {\"gap\":…}, unreadable ones as
{\"malformed\":…}.

With --delivery at-least-once a message counts as received once it was written to
stdout; the broker keeps what comes while the command does not run, and sends it
to the next one with the same --name. A client_id in the URL is used instead of
one made from the name; its session is then left as it is.";

/// Subscribe and print what arrives.
#[derive(Debug, ClapArgs)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A topic, or a pattern such as 'sensors.*'
    pattern: Pattern,
    /// How sure delivery is
    #[arg(long, value_enum, default_value_t = Sure::BestEffort)]
    delivery: Sure,
    /// The name of the durable subscription; without it one is made up and removed at the end
    #[arg(long)]
    name: Option<Name>,
    /// End after so many messages
    #[arg(long)]
    count: Option<u64>,
    /// End after this time of listening
    #[arg(long = "for", value_name = "TIME", value_parser = commlib::parse_duration)]
    limit: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Sure {
    BestEffort,
    AtLeastOnce,
}

pub(crate) async fn run(broker: &Broker, args: Args) -> Result<(), Failure> {
    let mut stop = Stop::new()?;
    let durable = match (args.delivery, args.name.clone()) {
        (Sure::AtLeastOnce, name) => Some(Durable::new(name, broker)?),
        (Sure::BestEffort, None) => None,
        (Sure::BestEffort, Some(_)) => {
            return Err(Failure::usage(
                "--name is for durable subscriptions: add --delivery at-least-once",
            ));
        }
    };
    let connecting = async {
        match &durable {
            Some(durable) => durable.prepare(broker)?.connect().await,
            None => broker.connect().await,
        }
    };
    let Some(connection) = stop.or(connecting).await else {
        return Ok(());
    };
    let connection = connection?;
    let outcome = listen(&connection, &args, durable.as_ref(), &mut stop).await;
    // Whatever closing says: what was printed has been printed.
    let _ = connection.close().await;
    if let Some(durable) = durable {
        durable.remove(broker).await;
    }
    outcome
}

async fn listen(
    connection: &Connection,
    args: &Args,
    durable: Option<&Durable>,
    stop: &mut Stop,
) -> Result<(), Failure> {
    let options = match durable {
        Some(durable) => SubscriberOptions::default()
            .delivery(Delivery::AtLeastOnce)
            .durable(durable.name()),
        None => SubscriberOptions::default().prefetch(BURST),
    };
    let subscribing = connection.subscriber_with(args.pattern.as_str(), options);
    let Some(subscriber) = stop.or(confirmed(subscribing)).await else {
        return Ok(());
    };
    let mut subscriber = subscriber?;
    note("ready");
    stop.after(args.limit);
    let mut printer = Printer {
        output: Output::new(),
        acks: Vec::new(),
    };
    let printed = stop.or(printer.run(&mut subscriber, args.count)).await;
    match printed {
        Some(outcome) => outcome,
        // A signal or the time of `--for` came in between.
        None => printer.last_flush().await,
    }
}

/// Prints messages, and acknowledges them when their lines have reached the reader of stdout.
struct Printer {
    output: Output,
    acks: Vec<Ack>,
}

#[derive(Serialize)]
struct MessageLine<'a> {
    topic: &'a str,
    data: &'a RawValue,
    header: &'a Header,
}

#[derive(Serialize)]
struct GapLine {
    gap: Gap,
}

#[derive(Serialize)]
struct MalformedLine<'a> {
    malformed: Unreadable<'a>,
}

#[derive(Serialize)]
struct Unreadable<'a> {
    topic: &'a str,
    reason: String,
}

impl Printer {
    /// Prints until `count` messages are printed or the connection ends. Cancel safe: call [`flush`](Self::flush) then.
    async fn run(
        &mut self,
        subscriber: &mut Subscriber<Box<RawValue>>,
        count: Option<u64>,
    ) -> Result<(), Failure> {
        let mut printed = 0;
        while count.is_none_or(|count| printed < count) {
            let Some(incoming) = self.next(subscriber).await? else {
                self.flush().await?;
                return Err(Failure::failed("the connection ended"));
            };
            match incoming {
                Incoming::Message(message) => {
                    self.message(message)?;
                    printed += 1;
                }
                Incoming::Gap(gap) => self.output.line(&GapLine { gap })?,
                Incoming::Malformed(malformed) => self.malformed(&malformed)?,
            }
            if self.output.is_full() {
                self.flush().await?;
            }
        }
        self.flush().await
    }

    /// The next item; what is printed becomes visible before we wait for it.
    async fn next(
        &mut self,
        subscriber: &mut Subscriber<Box<RawValue>>,
    ) -> Result<Option<Incoming<Received<Box<RawValue>>>>, Failure> {
        let mut next = pin!(subscriber.recv_incoming());
        if let Some(incoming) = next.as_mut().now_or_never() {
            return Ok(incoming);
        }
        self.flush().await?;
        Ok(next.await)
    }

    fn message(&mut self, mut message: Received<Box<RawValue>>) -> Result<(), Failure> {
        self.acks.extend(message.take_ack());
        self.output.line(&MessageLine {
            topic: message.topic.as_str(),
            data: &message.data,
            header: &message.header,
        })
    }

    fn malformed(&mut self, malformed: &Malformed) -> Result<(), Failure> {
        self.output.line(&MalformedLine {
            malformed: Unreadable {
                topic: malformed.name.as_str(),
                reason: chain(&malformed.error),
            },
        })
    }

    async fn flush(&mut self) -> Result<(), Failure> {
        self.output.flush().await?;
        self.accept();
        Ok(())
    }

    async fn last_flush(&mut self) -> Result<(), Failure> {
        if self.output.last_flush().await? {
            self.accept();
        }
        Ok(())
    }

    fn accept(&mut self) {
        self.acks.drain(..).for_each(Ack::accept);
    }
}
