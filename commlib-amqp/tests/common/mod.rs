//! What the tests of this crate share: shorthands, and a plain AMQP client.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::future::Future;
use std::time::Duration;

use commlib_amqp::{AmqpConfig, AmqpTransport};
use commlib_core::{
    Arrival, Delivery, Gap, Inbox, Incoming, LinkState, ListenOptions, Message, Name, Pattern,
    Receipt, Result, SendOptions, Source, Target, Transport,
};
use lapin::{Channel, Connection, ConnectionProperties};

/// Waits for what happens soon.
#[track_caller]
pub(crate) fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(Duration::from_secs(30), future).await {
            Ok(output) => output,
            Err(_) => panic!("{place}: waited in vain"),
        }
    }
}

pub(crate) async fn connect(config: AmqpConfig) -> AmqpTransport {
    soon(AmqpTransport::connect(config)).await.unwrap()
}

pub(crate) fn unique(stem: &str) -> String {
    format!("{stem}-{:016x}", fastrand::u64(..))
}

pub(crate) fn name(text: &str) -> Name {
    Name::new(text).unwrap()
}

pub(crate) fn topic(text: &str) -> Target {
    Target::Topic(name(text))
}

pub(crate) fn surely() -> SendOptions {
    SendOptions::default().delivery(Delivery::AtLeastOnce)
}

pub(crate) fn acked() -> ListenOptions {
    ListenOptions::default().delivery(Delivery::AtLeastOnce)
}

pub(crate) fn number(n: usize) -> Message {
    Message::new(n.to_string())
}

pub(crate) fn read(arrival: &Arrival) -> usize {
    std::str::from_utf8(&arrival.message.data)
        .unwrap()
        .parse()
        .unwrap()
}

/// Publishes at least once.
pub(crate) async fn publish(link: &AmqpTransport, to: &str, message: Message) -> Receipt {
    soon(link.send(&topic(to), message, surely()))
        .await
        .unwrap()
}

/// Publishes at best effort.
pub(crate) async fn post(link: &AmqpTransport, to: &str, message: Message) {
    let sent = soon(link.send(&topic(to), message, SendOptions::default())).await;
    drop(sent.unwrap());
}

pub(crate) async fn try_listen(
    link: &AmqpTransport,
    pattern: &str,
    options: ListenOptions,
) -> Result<Inbox> {
    let source = Source::Topic(Pattern::new(pattern).unwrap());
    soon(link.listen(&source, options)).await
}

pub(crate) async fn listen(link: &AmqpTransport, pattern: &str, options: ListenOptions) -> Inbox {
    try_listen(link, pattern, options).await.unwrap()
}

pub(crate) async fn next(inbox: &mut Inbox) -> Incoming {
    soon(inbox.recv()).await.expect("the inbox is open")
}

pub(crate) async fn arrival(inbox: &mut Inbox) -> Arrival {
    match next(inbox).await {
        Incoming::Message(arrival) => arrival,
        other => panic!("no message but {other:?}"),
    }
}

pub(crate) async fn gap(inbox: &mut Inbox) -> Gap {
    match next(inbox).await {
        Incoming::Gap(gap) => gap,
        other => panic!("no gap but {other:?}"),
    }
}

/// Waits for a state of the link.
pub(crate) async fn until(
    link: &(impl Transport + ?Sized),
    wanted: impl Fn(&LinkState) -> bool + Send + Sync,
) -> LinkState {
    let mut watch = link.link().watch();
    let state = soon(watch.wait_for(|state| wanted(state))).await;
    state.unwrap().clone()
}

pub(crate) async fn connected(link: &impl Transport) {
    until(link, |state| matches!(state, LinkState::Connected { .. })).await;
}

pub(crate) async fn reconnecting(link: &impl Transport) {
    until(link, |state| {
        matches!(state, LinkState::Reconnecting { .. })
    })
    .await;
}

/// A plain client: keep the connection as long as the channel is used.
pub(crate) async fn plain(address: &str) -> (Connection, Channel) {
    let uri = format!("amqp://{address}/%2f");
    let connection = Connection::connect(&uri, ConnectionProperties::default())
        .await
        .unwrap();
    let channel = connection.create_channel().await.unwrap();
    (connection, channel)
}
