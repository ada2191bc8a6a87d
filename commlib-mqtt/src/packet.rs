//! The packets of MQTT 3.1.1: the one place that knows how our ideas are written on the wire.

use bytes::BytesMut;
use rumqttc::mqttbytes::v4::{
    Connect, Login, PubAck, PubRec, Subscribe, SubscribeFilter, Unsubscribe,
};

pub(crate) use rumqttc::mqttbytes::v4::{
    Codec, ConnectReturnCode, Packet, Publish, SubscribeReasonCode,
};
pub(crate) use rumqttc::mqttbytes::{Error as CodecError, QoS};

use crate::config::{MqttConfig, Session};

/// What a PUBLISH packet holds beside its payload, at most: the longest topic and the fixed parts.
pub(crate) const PUBLISH_OVERHEAD: usize = 65_535 + 16;

/// How many filters go into one SUBSCRIBE or UNSUBSCRIBE packet.
const FILTERS_PER_PACKET: usize = 100;

/// The stronger of two deliveries.
pub(crate) fn higher(a: QoS, b: QoS) -> QoS {
    if a < b { b } else { a }
}

/// The codec; it cuts the link over a payload above the hard limit.
pub(crate) fn codec(config: &MqttConfig) -> Codec {
    Codec {
        max_incoming_size: config.hard_limit.saturating_add(PUBLISH_OVERHEAD),
        max_outgoing_size: usize::MAX,
    }
}

/// The CONNECT packet.
pub(crate) fn connect(config: &MqttConfig, client_id: &str) -> Packet {
    let mut connect = Connect::new(client_id);
    connect.keep_alive = u16::try_from(config.keep_alive.as_secs()).unwrap_or(u16::MAX);
    connect.clean_session = config.session == Session::Clean;
    connect.login = config.username.as_ref().map(|user| {
        Login::new(
            user.as_str(),
            config.password.as_deref().unwrap_or_default(),
        )
    });
    Packet::Connect(connect)
}

/// Why a broker refused a login, and whether asking again is pointless until someone acts.
pub(crate) fn refusal(code: ConnectReturnCode, client_id: &str) -> (String, bool) {
    match code {
        ConnectReturnCode::Success => ("accepted".to_owned(), false),
        ConnectReturnCode::ServiceUnavailable => (
            "the broker says that its service is unavailable".to_owned(),
            false,
        ),
        ConnectReturnCode::RefusedProtocolVersion => (
            "the broker does not speak MQTT 3.1.1".to_owned(),
            true,
        ),
        ConnectReturnCode::BadClientId => (
            format!("the broker refused the client id `{client_id}`; set another with `client_id`"),
            true,
        ),
        ConnectReturnCode::BadUserNamePassword => (
            "the broker refused the user name or password".to_owned(),
            true,
        ),
        ConnectReturnCode::NotAuthorized => (
            "the broker says that this client is not authorized; check the user name, the password and the broker's access rules"
                .to_owned(),
            true,
        ),
    }
}

/// Appends a packet to what is to be sent.
pub(crate) fn put(out: &mut BytesMut, packet: &Packet) {
    // The codec refuses only packets above 256 MiB, and every limit of ours lies below.
    if let Err(error) = packet.write(out, usize::MAX) {
        tracing::error!(%error, "packet left out");
    }
}

/// Appends a PUBLISH without taking it apart.
pub(crate) fn put_publish(out: &mut BytesMut, publish: &Publish) {
    if let Err(error) = publish.write(out) {
        tracing::error!(%error, topic = %publish.topic, "message left out");
    }
}

/// Appends a PUBACK.
pub(crate) fn put_puback(out: &mut BytesMut, id: u16) {
    put(out, &Packet::PubAck(PubAck::new(id)));
}

/// Appends a PUBREC.
pub(crate) fn put_pubrec(out: &mut BytesMut, id: u16) {
    put(out, &Packet::PubRec(PubRec::new(id)));
}

/// Appends SUBSCRIBE packets; `next_id` gives each its id and gets the filters of it.
pub(crate) fn put_subscribes(
    out: &mut BytesMut,
    filters: &[(String, QoS)],
    mut next_id: impl FnMut(Vec<String>) -> u16,
) {
    for chunk in filters.chunks(FILTERS_PER_PACKET) {
        let pkid = next_id(chunk.iter().map(|(filter, _)| filter.clone()).collect());
        let filters = chunk
            .iter()
            .map(|(filter, qos)| SubscribeFilter::new(filter.clone(), *qos))
            .collect();
        put(out, &Packet::Subscribe(Subscribe { pkid, filters }));
    }
}

/// Appends UNSUBSCRIBE packets.
pub(crate) fn put_unsubscribes(
    out: &mut BytesMut,
    filters: &[String],
    mut next_id: impl FnMut() -> u16,
) {
    for chunk in filters.chunks(FILTERS_PER_PACKET) {
        let (pkid, topics) = (next_id(), chunk.to_vec());
        put(out, &Packet::Unsubscribe(Unsubscribe { pkid, topics }));
    }
}
