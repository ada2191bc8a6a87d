//! A queue with acknowledgements: a durable subscription or a service. One task and one channel each.

use std::sync::Arc;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use commlib_core::envelope::Use;
use commlib_core::{Ack, AckReply, Arrival, Gap, GapCause, Malformed};
use futures_util::{FutureExt, StreamExt};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicCancelOptions, BasicNackOptions, BasicQosOptions, QueueBindOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::sync::{mpsc, oneshot};

use crate::acks::{Frame, Ledger, mark};
use crate::address;
use crate::listener::{Kind, Listener};
use crate::net;
use crate::session::{Attached, Context, Report};

/// How many words of receivers are taken at a time.
const BATCH: usize = 256;

/// How long the broker keeps the queue of a service without services, and of a subscription without a name: longer than
/// a reconnect takes.
const EXPIRES_MS: i32 = 60_000;

/// How many requests may wait at the broker for one service.
const MAX_REQUESTS: i32 = 65_536;

/// How often a queue is declared again that is gone before it is consumed.
const TRIES: u32 = 3;

/// Why a consumer ended, other than by an error.
enum End {
    /// Nobody listens any more, and everything that was handed out is settled.
    Left,
    /// The connection closes.
    Closing,
    /// The broker cancelled it: the queue was deleted.
    Cancelled,
}

/// Serves one listener until its inbox is dropped, which `left` tells, or the connection ends. What closes its channel is
/// its own affair: the first time the listener is told, later it is tried again.
pub(crate) async fn run(
    mut context: Context,
    listener: Arc<Listener>,
    mut left: oneshot::Receiver<()>,
) {
    let mut backoff = context.backoff();
    loop {
        let error = match open(&context, &listener).await {
            Ok((channel, consumer, kept)) => {
                if !kept {
                    listener.gap();
                }
                listener.established.store(true, Ordering::Relaxed);
                context.report(Report::Attached(listener.id, Ok(Attached { kept })));
                let ended = pump(&mut context, &listener, &channel, consumer, &mut left).await;
                if let Ok(End::Closing) = ended {
                    return;
                }
                if let Ok(End::Left) = ended {
                    delete(&channel, &listener.kind).await;
                    return context.close(&channel).await;
                }
                context.close(&channel).await;
                let deleted = "the broker cancelled it; was its queue deleted?";
                ended.map_or_else(|error| net::text(&error), |_| deleted.to_owned())
            }
            Err(error) => {
                let shown = listener.kind.queue().map_or("", ShortString::as_str);
                let refused = net::refused("listen to", shown, &error);
                let first = !listener.is_established();
                let is_exception = net::is_exception(&error);
                if is_exception {
                    context.report(Report::Attached(listener.id, Err(refused)));
                }
                if first && is_exception {
                    return;
                }
                net::text(&error)
            }
        };
        let queue = listener.kind.queue().map_or("", ShortString::as_str);
        tokio::select! {
            up = context.repair(queue, &error, &mut backoff) => if !up {
                return;
            },
            _ = &mut left => return,
        }
    }
}

/// Declares, binds and consumes. The last of the three says whether the queue was there all the time.
async fn open(context: &Context, listener: &Listener) -> lapin::Result<(Channel, Consumer, bool)> {
    let mut kept = true;
    if listener.is_established()
        && let Kind::Acked { queue, .. } = &listener.kind
    {
        // A broker that lost its data lost the queue as well.
        let passive = QueueDeclareOptions {
            passive: true,
            ..QueueDeclareOptions::default()
        };
        let channel = context.channel().await?;
        let found = channel.queue_declare(queue.clone(), passive, FieldTable::default());
        match found.await {
            Err(error) if net::is_exception(&error) => kept = false,
            found => drop(found?),
        }
        context.close(&channel).await;
    }
    let mut tries = 0;
    loop {
        let channel = context.channel().await?;
        match consume(context, listener, &channel).await {
            // The last service of the name left between our declaration and our consumer, and took the queue along.
            Err(error) if tries < TRIES && net::is_missing(&error) => tries += 1,
            consumer => return Ok((channel, consumer?, kept)),
        }
    }
}

async fn consume(
    context: &Context,
    listener: &Listener,
    channel: &Channel,
) -> lapin::Result<Consumer> {
    let Some(queue) = listener.kind.queue() else {
        return Err(lapin::ErrorKind::InvalidChannel(channel.id()).into());
    };
    declare(context, channel, listener, queue).await?;
    if let Kind::Acked { binding, .. } = &listener.kind {
        let (queue, exchange, key) = (queue.clone(), context.exchange.clone(), binding.clone());
        let options = QueueBindOptions::default();
        let arguments = FieldTable::default();
        channel
            .queue_bind(queue, exchange, key, options, arguments)
            .await?;
    }
    let qos = BasicQosOptions::default();
    channel.basic_qos(listener.prefetch, qos).await?;
    context.consume(channel, queue.clone(), false).await
}

async fn declare(
    context: &Context,
    channel: &Channel,
    listener: &Listener,
    queue: &ShortString,
) -> lapin::Result<()> {
    let mut arguments = FieldTable::default();
    let mut set = |key: &str, value: AMQPValue| {
        arguments.insert(key.into(), value);
    };
    let mut options = QueueDeclareOptions::default();
    if let Some(exchange) = &context.dead_letter {
        set(
            "x-dead-letter-exchange",
            AMQPValue::LongString(exchange.as_str().into()),
        );
    }
    match &listener.kind {
        // What commlib-py services do, for fleets that count on it: one service of a name, gone with its connection.
        Kind::Service { .. } if listener.dialect.is_bare() => {
            options.exclusive = true;
            options.auto_delete = true;
        }
        Kind::Service { .. } => {
            options.durable = true;
            set("x-expires", AMQPValue::LongInt(EXPIRES_MS));
            set("x-max-length", AMQPValue::LongInt(MAX_REQUESTS));
            set("x-overflow", AMQPValue::LongString("reject-publish".into()));
        }
        _ => {
            options.durable = true;
            let durable = matches!(listener.kind, Kind::Acked { durable: true, .. });
            let ms = if durable {
                context.expires_ms
            } else {
                i64::from(EXPIRES_MS)
            };
            set("x-expires", AMQPValue::LongLongInt(ms));
        }
    }
    channel
        .queue_declare(queue.clone(), options, arguments)
        .await
        .map(drop)
}

/// Deliveries in, acknowledgements out.
async fn pump(
    context: &mut Context,
    listener: &Listener,
    channel: &Channel,
    mut consumer: Consumer,
    left: &mut oneshot::Receiver<()>,
) -> lapin::Result<End> {
    // A channel of its own: words about an earlier connection find nobody.
    let (acks, mut words) = mpsc::unbounded_channel();
    let mut ledger = Ledger::default();
    let mut leaving = false;
    let mut batch = Vec::new();
    loop {
        tokio::select! {
            biased;
            _ = words.recv_many(&mut batch, BATCH) => {
                settle(listener, channel, &mut ledger, &mut batch, leaving);
                if leaving && ledger.is_empty() {
                    return Ok(End::Left);
                }
            }
            () = context.closing() => {
                while let Ok(word) = words.try_recv() {
                    batch.push(word);
                }
                settle(listener, channel, &mut ledger, &mut batch, leaving);
                return Ok(End::Closing);
            }
            _ = &mut *left, if !leaving => {
                leaving = true;
                channel.basic_cancel(consumer.tag(), BasicCancelOptions::default()).await?;
                // What came and was not handed out goes back at once, not when the last handler is done.
                while let Some(Ok(delivery)) = consumer.next().await {
                    send(channel, Frame::Nack { tag: delivery.delivery_tag, requeue: true });
                }
                if ledger.is_empty() {
                    return Ok(End::Left);
                }
            }
            delivery = consumer.next(), if !leaving => match delivery {
                Some(delivery) => deliver(context, listener, channel, &mut ledger, delivery?, &acks),
                None => return Ok(End::Cancelled),
            },
        }
    }
}

fn deliver(
    context: &Context,
    listener: &Listener,
    channel: &Channel,
    ledger: &mut Ledger,
    delivery: Delivery,
    acks: &mpsc::UnboundedSender<AckReply>,
) {
    let tag = delivery.delivery_tag;
    let name = address::name(delivery.routing_key.as_str());
    let usage = match &listener.kind {
        Kind::Acked { .. } => Use::Topic,
        _ => Use::Rpc,
    };
    let mark = mark(&delivery);
    let body = Bytes::from(delivery.data);
    match context
        .reader
        .read(&delivery.properties, body, usage, listener.dialect)
    {
        Ok(message) => {
            ledger.delivered(tag, mark);
            let mut arrival = Arrival::new(name, message);
            arrival.ack = Some(Ack::new(tag, context.epoch, acks.clone()));
            // If the inbox is gone, the arrival is dropped and its word says so.
            listener.inbox.deliver(arrival);
        }
        Err(error) => {
            listener.inbox.malformed(Malformed::new(name, error));
            send(
                channel,
                Frame::Ack {
                    tag,
                    multiple: false,
                },
            );
        }
    }
}

fn settle(
    listener: &Listener,
    channel: &Channel,
    ledger: &mut Ledger,
    batch: &mut Vec<AckReply>,
    leaving: bool,
) {
    let mut tries = listener
        .tries
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let (frames, given_up) = ledger.settle(batch.drain(..), &mut tries, leaving);
    drop(tries);
    for frame in frames {
        send(channel, frame);
    }
    if given_up > 0 {
        listener
            .inbox
            .gap(Gap::new(GapCause::GivenUp, Some(given_up)));
    }
}

/// Queues a frame with the client crate; nobody waits until it is written. The prefetch bounds how many there can be.
fn send(channel: &Channel, frame: Frame) {
    let queued = match frame {
        Frame::Ack { tag, multiple } => channel
            .basic_ack(tag, BasicAckOptions { multiple })
            .now_or_never(),
        Frame::Nack { tag, requeue } => {
            let options = BasicNackOptions {
                requeue,
                ..BasicNackOptions::default()
            };
            channel.basic_nack(tag, options).now_or_never()
        }
    };
    if let Some(Err(error)) = queued {
        // The channel is gone, and the broker delivers the message again by itself.
        tracing::debug!(%error, "not acknowledged");
    }
}

/// Removes a queue that nobody else uses and nobody will ask for.
async fn delete(channel: &Channel, kind: &Kind) {
    let (queue, if_empty) = match kind {
        Kind::Acked {
            queue,
            durable: false,
            ..
        } => (queue, false),
        // Requests that wait are for a service that may come.
        Kind::Service { queue } => (queue, true),
        _ => return,
    };
    let options = QueueDeleteOptions {
        if_unused: true,
        if_empty,
        ..QueueDeleteOptions::default()
    };
    // Refused if it is in use, and gone already if it was exclusive.
    if let Err(error) = channel.queue_delete(queue.clone(), options).await {
        tracing::debug!(%queue, %error, "queue left to the broker");
    }
}
