//! What happens to a message that arrives.

use std::collections::VecDeque;
use std::sync::Arc;

use commlib_core::envelope::{self, Use};
use commlib_core::{
    Ack, Arrival, Dialect, Error, ErrorKind, Gap, GapCause, Malformed, Message, Result,
};
use tokio::time::Instant;

use crate::address;
use crate::filter::covers;
use crate::listeners::{Kind, Listener};
use crate::packet::{self, Publish, QoS};
use crate::session::Session;

/// How much longer than its data a payload may be.
const HEADER_ROOM: usize = 64 << 10;

/// How many messages back a copy of a message is recognised.
const RECENT: usize = 64;

impl Session {
    /// Hands a message to all who listen for it.
    pub(crate) fn arrived(&mut self, publish: &Publish, now: Instant) {
        let mut route = std::mem::take(&mut self.route);
        self.listeners.route(&publish.topic, &mut route);
        let mut decoded = Decoded::default();
        match publish.qos {
            QoS::AtLeastOnce => self.enter(publish, &route, &mut decoded, now),
            _ if self.is_copy(publish, &route, &mut decoded) => {}
            qos => {
                for listener in &route {
                    self.deliver(listener, publish, None, &mut decoded);
                }
                if qos == QoS::ExactlyOnce {
                    packet::put_pubrec(&mut self.out, publish.pkid);
                }
            }
        }
        route.clear();
        self.route = route;
    }

    fn enter(
        &mut self,
        publish: &Publish,
        route: &[Arc<Listener>],
        decoded: &mut Decoded,
        now: Instant,
    ) {
        let Some(number) = self.ledger.enter(publish) else {
            return;
        };
        if self.is_copy(publish, route, decoded) {
            return;
        }
        let mut taken = false;
        for listener in route {
            let id = (listener.qos == QoS::AtLeastOnce)
                .then(|| self.ledger.add_receiver(number, listener.id));
            taken |= id.is_some();
            self.deliver(listener, publish, id, decoded);
        }
        if !taken
            && self.grace_end.is_some_and(|end| now < end)
            && self.expects_listener(&publish.topic)
        {
            self.ledger.hold(number);
        }
    }

    /// Gives a new listener what came for it before it did.
    pub(crate) fn hand_over_held(&mut self, listener: &Arc<Listener>) {
        let wants = |topic: &str| covers(&listener.filter, topic);
        for (id, publish) in self.ledger.claim(listener.id, wants) {
            self.deliver(listener, &publish, Some(id), &mut Decoded::default());
        }
    }

    /// Puts a message into an inbox. `ack` is the id under which the receiver answers for it.
    pub(crate) fn deliver(
        &mut self,
        listener: &Listener,
        publish: &Publish,
        ack: Option<u64>,
        decoded: &mut Decoded,
    ) {
        let name = || match &listener.name {
            Some(name) => name.clone(),
            None => address::name(&publish.topic),
        };
        let key = match listener.kind {
            Kind::Replies(prefix) => publish.topic.get(prefix..).map(str::to_owned),
            Kind::Topic | Kind::Queue => None,
        };
        let message = match decoded.get(listener, publish, self.config.max_payload) {
            Ok(message) => message,
            Err(error) => {
                let mut malformed = Malformed::new(name(), error);
                malformed.key = key;
                listener.inbox.malformed(malformed);
                if let Some(id) = ack {
                    self.ledger.gone(id, false);
                }
                return;
            }
        };
        let mut arrival = Arrival::new(name(), message);
        arrival.key = key;
        match ack {
            Some(id) => arrival.ack = Some(Ack::new(id, 0, self.acks.clone())),
            // A best-effort message to an at-least-once inbox, which does not bound itself.
            None if listener.qos == QoS::AtLeastOnce && listener.inbox.is_full() => {
                listener
                    .inbox
                    .gap(Gap::new(GapCause::SlowConsumer, Some(1)));
                return;
            }
            None => {}
        }
        listener.inbox.deliver(arrival);
    }

    /// Whether a broker sent this for another of several filters that match, and it was handed out then.
    ///
    /// Only messages that name sender and id can be told apart from equal ones.
    fn is_copy(
        &mut self,
        publish: &Publish,
        route: &[Arc<Listener>],
        decoded: &mut Decoded,
    ) -> bool {
        self.subscriptions.may_repeat(&publish.topic)
            && route.first().is_some_and(|listener| {
                decoded
                    .get(listener, publish, self.config.max_payload)
                    .is_ok_and(|message| self.recent.repeats(&message))
            })
    }
}

/// A payload, decoded once for all listeners that read it the same way.
#[derive(Debug, Default)]
pub(crate) struct Decoded(Option<(Use, Dialect, Message)>);

impl Decoded {
    fn get(&mut self, listener: &Listener, publish: &Publish, max: usize) -> Result<Message> {
        let usage = match listener.kind {
            Kind::Topic => Use::Topic,
            Kind::Queue | Kind::Replies(_) => Use::Rpc,
        };
        match &self.0 {
            Some((u, dialect, message)) if (*u, *dialect) == (usage, listener.dialect) => {
                return Ok(message.clone());
            }
            _ => {}
        }
        let too_large = |size: usize| {
            Error::new(ErrorKind::TooLarge, "message on")
                .at(&publish.topic)
                .because(format_args!("{size} bytes, and `max_payload` is {max}"))
        };
        let size = publish.payload.len();
        if size > max.saturating_add(HEADER_ROOM) {
            return Err(too_large(size));
        }
        let message = envelope::decode(&publish.payload, usage, listener.dialect)?;
        if message.data.len() > max {
            return Err(too_large(message.data.len()));
        }
        self.0 = Some((usage, listener.dialect, message.clone()));
        Ok(message)
    }
}

/// The messages that came last from senders of ours, where a broker may send several copies.
#[derive(Debug, Default)]
pub(crate) struct Recent(VecDeque<(Arc<str>, String)>);

impl Recent {
    /// Whether the message was seen before. It is now.
    fn repeats(&mut self, message: &Message) -> bool {
        let header = &message.header;
        let (Some(sender), Some(id)) = (&header.sender, &header.message_id) else {
            return false;
        };
        if self.0.iter().any(|(s, i)| s == sender && i == id) {
            return true;
        }
        if self.0.len() == RECENT {
            self.0.pop_front();
        }
        self.0.push_back((sender.clone(), id.clone()));
        false
    }
}
