//! Best-effort topics: all listeners of a connection share one queue, with a binding for each pattern.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::StreamExt;
use lapin::options::{QueueBindOptions, QueueDeclareOptions};
use lapin::types::{AMQPValue, FieldTable, ShortString};
use lapin::{Channel, Consumer};
use tokio::sync::mpsc;

use crate::address;
use crate::listener::{Kind, Listener, Routes};
use crate::net;
use crate::session::{Attached, Context, Report};

/// What may wait at the broker while the link is slow. Beyond it the oldest are dropped there, which shows as a jump in
/// the sender's count.
const MAX_MESSAGES: i32 = 100_000;
const MAX_BYTES: i32 = 64 << 20;

/// A change of who listens. The routes are changed before it is asked for.
pub(crate) enum Change {
    Joined(Arc<Listener>),
    Left(Arc<Listener>),
}

/// The queue, and how it is changed.
struct Hub<'a> {
    context: &'a Context,
    queue: ShortString,
    /// The listeners it has bindings for.
    bound: HashSet<u64>,
    /// For bindings. The broker closes it over one that it refuses, and not the one that consumes.
    bind: Option<Channel>,
}

/// Serves the listeners in `routes` until the connection ends.
pub(crate) async fn run(
    context: Context,
    routes: Routes,
    mut changes: mpsc::UnboundedReceiver<Change>,
) {
    let mut backoff = context.backoff();
    let mut closing = context.clone();
    loop {
        let served = tokio::select! {
            biased;
            () = closing.closing() => return,
            served = serve(&context, &routes, &mut changes) => served,
        };
        let cause = match served {
            Ok(()) => "the broker cancelled it; was its queue deleted?".to_owned(),
            Err(error) => net::text(&error),
        };
        if !context.repair("topics", &cause, &mut backoff).await {
            return;
        }
    }
}

async fn serve(
    context: &Context,
    routes: &Routes,
    changes: &mut mpsc::UnboundedReceiver<Change>,
) -> lapin::Result<()> {
    let mut waiting = routes.topics();
    if waiting.is_empty() {
        // A connection that only publishes costs the broker no queue.
        loop {
            match changes.recv().await {
                Some(Change::Joined(listener)) => {
                    waiting.push(listener);
                    break;
                }
                Some(Change::Left(_)) => {}
                None => std::future::pending().await,
            }
        }
    }
    let mut hub = Hub {
        context,
        queue: address::unique("topics"),
        bound: HashSet::new(),
        bind: None,
    };
    let (channel, mut consumer) = hub.open().await?;
    for listener in waiting {
        hub.join(&listener).await?;
    }
    let pump = async {
        while let Some(delivery) = consumer.next().await {
            routes.deliver(delivery?, context.reader);
        }
        Ok(())
    };
    let change = async {
        loop {
            match changes.recv().await {
                Some(Change::Joined(listener)) => hub.join(&listener).await?,
                Some(Change::Left(listener)) => hub.leave(routes, &listener).await?,
                None => std::future::pending().await,
            }
        }
    };
    // Side by side: a change waits for the broker, arrivals do not.
    let ended = tokio::select! {
        ended = pump => ended,
        failed = change => failed,
    };
    for channel in hub.bind.iter().chain([&channel]) {
        context.close(channel).await;
    }
    ended
}

impl Hub<'_> {
    async fn open(&self) -> lapin::Result<(Channel, Consumer)> {
        let channel = self.context.channel().await?;
        let mut arguments = FieldTable::default();
        arguments.insert("x-max-length".into(), AMQPValue::LongInt(MAX_MESSAGES));
        arguments.insert("x-max-length-bytes".into(), AMQPValue::LongInt(MAX_BYTES));
        let options = QueueDeclareOptions {
            exclusive: true,
            auto_delete: true,
            ..QueueDeclareOptions::default()
        };
        channel
            .queue_declare(self.queue.clone(), options, arguments)
            .await?;
        let consumer = self
            .context
            .consume(&channel, self.queue.clone(), true)
            .await?;
        Ok((channel, consumer))
    }

    /// Binds for a listener and tells it. An error is one of the connection, not of the binding.
    async fn join(&mut self, listener: &Listener) -> lapin::Result<()> {
        let Kind::Topic { binding, pattern } = &listener.kind else {
            return Ok(());
        };
        if !self.bound.insert(listener.id) {
            return Ok(());
        }
        let (queue, exchange) = (self.queue.clone(), self.context.exchange.clone());
        let options = QueueBindOptions::default();
        let channel = self.bind_channel().await?;
        // What is bound already stays bound.
        let bound = channel
            .queue_bind(
                queue,
                exchange,
                binding.clone(),
                options,
                FieldTable::default(),
            )
            .await;
        let outcome = match bound {
            Ok(()) => {
                listener.gap();
                listener.established.store(true, Ordering::Relaxed);
                Ok(Attached { kept: true })
            }
            Err(error) if net::is_exception(&error) => {
                self.bind = None;
                tracing::warn!(%pattern, %error, "the broker refused a subscription");
                Err(net::refused("subscribe to", pattern.as_str(), &error))
            }
            Err(error) => return Err(error),
        };
        self.context.report(Report::Attached(listener.id, outcome));
        Ok(())
    }

    /// Unbinds if nobody else listens to the same.
    async fn leave(&mut self, routes: &Routes, listener: &Listener) -> lapin::Result<()> {
        let Kind::Topic { binding, pattern } = &listener.kind else {
            return Ok(());
        };
        self.bound.remove(&listener.id);
        if routes.needs(pattern) {
            return Ok(());
        }
        let (queue, exchange) = (self.queue.clone(), self.context.exchange.clone());
        let channel = self.bind_channel().await?;
        match channel
            .queue_unbind(queue, exchange, binding.clone(), FieldTable::default())
            .await
        {
            Err(error) if net::is_exception(&error) => self.bind = None,
            outcome => outcome?,
        }
        Ok(())
    }

    async fn bind_channel(&mut self) -> lapin::Result<Channel> {
        match &self.bind {
            Some(channel) => Ok(channel.clone()),
            None => Ok(self.bind.insert(self.context.channel().await?).clone()),
        }
    }
}
