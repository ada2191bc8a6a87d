//! What the tests of this crate share: shorthands, and a broker whose every packet the test decides.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(clippy::unwrap_used, reason = "a panic is how a test fails")]

use std::future::Future;
use std::net::Ipv4Addr;
use std::time::Duration;

use bytes::BytesMut;
use commlib_core::{
    Arrival, Delivery, Gap, Inbox, Incoming, LinkState, ListenOptions, Message, Name, Pattern,
    Receipt, Result, SendOptions, Source, Target, Transport,
};
use commlib_mqtt::{MqttConfig, MqttTransport};
use futures_util::StreamExt;
use rumqttc::mqttbytes::QoS;
use rumqttc::mqttbytes::v4::{
    Codec, ConnAck, Connect, ConnectReturnCode, Packet, Publish, SubAck, Subscribe,
    SubscribeReasonCode,
};
use tokio::io::AsyncWriteExt;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::codec::FramedRead;

/// Waits for what happens soon.
#[track_caller]
pub(crate) fn soon<F: Future>(future: F) -> impl Future<Output = F::Output> {
    let place = std::panic::Location::caller();
    async move {
        match tokio::time::timeout(Duration::from_secs(15), future).await {
            Ok(output) => output,
            Err(_) => panic!("{place}: waited in vain"),
        }
    }
}

pub(crate) async fn connect(config: MqttConfig) -> MqttTransport {
    soon(MqttTransport::connect(config)).await.unwrap()
}

pub(crate) fn topic(name: &str) -> Target {
    Target::Topic(Name::new(name).unwrap())
}

pub(crate) fn pattern(text: &str) -> Source {
    Source::Topic(Pattern::new(text).unwrap())
}

pub(crate) fn surely() -> SendOptions {
    SendOptions::default().delivery(Delivery::AtLeastOnce)
}

pub(crate) fn number(n: usize) -> Message {
    Message::new(n.to_string())
}

pub(crate) async fn try_send(
    link: &MqttTransport,
    name: &str,
    message: Message,
    options: SendOptions,
) -> Result<Receipt> {
    soon(link.send(&topic(name), message, options)).await
}

pub(crate) async fn try_listen(
    link: &MqttTransport,
    text: &str,
    options: ListenOptions,
) -> Result<Inbox> {
    soon(link.listen(&pattern(text), options)).await
}

/// Publishes at least once.
pub(crate) async fn publish(link: &MqttTransport, name: &str, message: Message) -> Receipt {
    try_send(link, name, message, surely()).await.unwrap()
}

/// Publishes at best effort.
pub(crate) async fn post(link: &MqttTransport, name: &str, message: Message) {
    let sent = try_send(link, name, message, SendOptions::default()).await;
    drop(sent.unwrap());
}

pub(crate) async fn listen(link: &MqttTransport, text: &str) -> Inbox {
    try_listen(link, text, ListenOptions::default())
        .await
        .unwrap()
}

pub(crate) fn acked() -> ListenOptions {
    ListenOptions::default().delivery(Delivery::AtLeastOnce)
}

pub(crate) fn durable() -> ListenOptions {
    acked().durable(Some(Name::new("d").unwrap()))
}

pub(crate) async fn listen_acked(link: &MqttTransport, text: &str) -> Inbox {
    try_listen(link, text, acked()).await.unwrap()
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

/// The data of the next message, which is accepted.
pub(crate) async fn data(inbox: &mut Inbox) -> String {
    let mut arrival = arrival(inbox).await;
    if let Some(ack) = arrival.ack.take() {
        ack.accept();
    }
    String::from_utf8(arrival.message.data.to_vec()).unwrap()
}

pub(crate) async fn state(link: &MqttTransport, wanted: impl Fn(&LinkState) -> bool) -> LinkState {
    let mut watch = link.link().watch();
    let state = soon(watch.wait_for(wanted)).await.unwrap();
    state.clone()
}

pub(crate) async fn until_down(link: &MqttTransport) -> String {
    let down = |state: &LinkState| matches!(state, LinkState::Reconnecting { .. });
    match state(link, down).await {
        LinkState::Reconnecting { cause, .. } => cause,
        other => panic!("{other:?}"),
    }
}

pub(crate) async fn until_up(link: &MqttTransport) -> bool {
    match state(link, LinkState::is_connected).await {
        LinkState::Connected { resumed } => resumed,
        other => panic!("{other:?}"),
    }
}

/// A broker whose every packet the test decides.
#[derive(Debug)]
pub(crate) struct Fake {
    listener: TcpListener,
}

/// One client of a [`Fake`].
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) connect: Connect,
    packets: FramedRead<OwnedReadHalf, Codec>,
    writer: OwnedWriteHalf,
}

impl Fake {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        Self { listener }
    }

    pub(crate) fn config(&self) -> MqttConfig {
        MqttConfig::new(self.listener.local_addr().unwrap().to_string())
    }

    /// The next connection, before anything is said.
    pub(crate) async fn accept_raw(&self) -> TcpStream {
        soon(self.listener.accept()).await.unwrap().0
    }

    /// The next client, with this answer to its login.
    pub(crate) async fn answer(&self, code: ConnectReturnCode, session_present: bool) -> Peer {
        let (reader, writer) = self.accept_raw().await.into_split();
        let codec = Codec {
            max_incoming_size: usize::MAX,
            max_outgoing_size: usize::MAX,
        };
        let mut packets = FramedRead::new(reader, codec);
        let Some(Ok(Packet::Connect(connect))) = soon(packets.next()).await else {
            panic!("no CONNECT");
        };
        let mut peer = Peer {
            connect,
            packets,
            writer,
        };
        peer.send(Packet::ConnAck(ConnAck::new(code, session_present)))
            .await;
        peer
    }

    pub(crate) async fn accept(&self, session_present: bool) -> Peer {
        self.answer(ConnectReturnCode::Success, session_present)
            .await
    }

    /// A connected pair with a session of this kind.
    pub(crate) async fn pair(&self, config: MqttConfig) -> (MqttTransport, Peer) {
        tokio::join!(connect(config), self.accept(false))
    }
}

impl Peer {
    pub(crate) async fn send(&mut self, packet: Packet) {
        let mut out = BytesMut::new();
        packet.write(&mut out, usize::MAX).unwrap();
        self.writer.write_all(&out).await.unwrap();
    }

    pub(crate) async fn publish(&mut self, topic: &str, qos: QoS, id: u16, payload: &str) {
        let mut publish = Publish::new(topic, qos, payload);
        publish.pkid = id;
        self.send(Packet::Publish(publish)).await;
    }

    /// The next packet; `None` at the end of the connection.
    pub(crate) async fn next(&mut self) -> Option<Packet> {
        soon(self.packets.next()).await.and_then(Result::ok)
    }

    /// The next SUBSCRIBE with its filters, answered with these codes: `None` refuses.
    pub(crate) async fn subscribed(&mut self, codes: &[Option<QoS>]) -> Vec<(String, QoS)> {
        let subscribe = self.subscribe().await;
        self.grant(&subscribe, codes).await;
        subscribe
            .filters
            .into_iter()
            .map(|filter| (filter.path, filter.qos))
            .collect()
    }

    pub(crate) async fn subscribe(&mut self) -> Subscribe {
        match self.next().await {
            Some(Packet::Subscribe(subscribe)) => subscribe,
            other => panic!("no SUBSCRIBE but {other:?}"),
        }
    }

    pub(crate) async fn grant(&mut self, subscribe: &Subscribe, codes: &[Option<QoS>]) {
        let codes = codes
            .iter()
            .map(|code| code.map_or(SubscribeReasonCode::Failure, SubscribeReasonCode::Success));
        self.send(Packet::SubAck(SubAck::new(subscribe.pkid, codes.collect())))
            .await;
    }

    pub(crate) async fn unsubscribed(&mut self) -> Vec<String> {
        match self.next().await {
            Some(Packet::Unsubscribe(unsubscribe)) => unsubscribe.topics,
            other => panic!("no UNSUBSCRIBE but {other:?}"),
        }
    }

    pub(crate) async fn puback(&mut self) -> u16 {
        match self.next().await {
            Some(Packet::PubAck(ack)) => ack.pkid,
            other => panic!("no PUBACK but {other:?}"),
        }
    }

    pub(crate) async fn published(&mut self) -> Publish {
        match self.next().await {
            Some(Packet::Publish(publish)) => publish,
            other => panic!("no PUBLISH but {other:?}"),
        }
    }

    /// Nothing comes for a while. The only wait for time: there is no signal for what must not happen.
    pub(crate) async fn quiet(&mut self) {
        let quiet = tokio::time::timeout(Duration::from_millis(150), self.packets.next());
        if let Ok(Some(Ok(packet))) = quiet.await {
            panic!("an unwanted {packet:?}");
        }
    }
}
