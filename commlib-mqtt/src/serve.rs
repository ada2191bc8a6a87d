//! Serving one link: moving bytes, packets and commands until it ends.

use std::pin::pin;

use futures_util::{FutureExt, StreamExt};
use tokio::io::AsyncWriteExt;
use tokio::time::{Instant, sleep_until};

use crate::config::Session as Keep;
use crate::conn::Conn;
use crate::keepalive::{Check, KeepAlive};
use crate::net::{self, Wire};
use crate::packet::{self, CodecError, Packet};
use crate::session::OUT_CAP;

/// How many packets or commands are handled before something else gets its turn.
const BATCH: usize = 64;

/// Why a link ended.
#[derive(Debug)]
pub(crate) enum End {
    /// Closed from this side.
    Closed,
    Lost(String),
    /// Dropped by the other side.
    Dropped(String),
    /// Too much was unacknowledged.
    Flooded,
}

impl Conn {
    /// Serves a link. `up_since` is set when everything works again.
    pub(crate) async fn serve(
        &mut self,
        mut wire: Wire,
        again: bool,
        up_since: &mut Option<Instant>,
    ) -> End {
        let resumed = wire.session_present && self.config.session == Keep::Persistent;
        self.session.link_up(resumed, again, Instant::now());
        let end = self.drive(&mut wire, resumed, up_since).await;
        if matches!(end, End::Closed) {
            self.session.goodbye();
            wire.finish(&mut self.session.out).await;
        } else {
            self.session.link_lost();
        }
        end
    }

    /// Moves bytes until the link ends. Every arm of the select is cancel safe, and none waits for a user.
    async fn drive(
        &mut self,
        wire: &mut Wire,
        resumed: bool,
        up_since: &mut Option<Instant>,
    ) -> End {
        let mut now = Instant::now();
        let mut keepalive = KeepAlive::new(self.config.keep_alive, now);
        let mut timer = pin!(sleep_until(keepalive.deadline()));
        let mut batch = Vec::with_capacity(BATCH);
        let mut intake = true;
        let mut handles = true;
        let mut close_by = None;
        loop {
            self.session.pump(up_since.is_some());
            if up_since.is_none() && self.session.subscriptions.settled() {
                self.session.pump(true);
                self.announce(resumed);
                *up_since = Some(now);
            }
            let up = up_since.is_some();
            if self.session.closing.is_some() && close_by.is_none() {
                close_by = Some(now + self.config.close_timeout);
                self.room.close();
                self.best_effort.close();
            }
            if close_by.is_some_and(|by| now >= by)
                || (close_by.is_some() && up && !intake && self.session.outbox.len() == 0)
            {
                while let Ok(reply) = self.acks.try_recv() {
                    self.session.acked(reply, now);
                }
                self.session.pump(false);
                return End::Closed;
            }
            if !self.session.out.is_empty() {
                keepalive.queued(now);
            }
            keepalive.received(wire.packets.get_ref().last_read());
            for _ in 0..std::mem::take(&mut self.session.answered_probes) {
                keepalive.answered();
            }
            let due = [
                Some(keepalive.deadline()),
                self.session.release_at(),
                close_by,
            ];
            if let Some(due) = due.into_iter().flatten().min()
                && (due < timer.deadline() || timer.is_elapsed())
            {
                timer.as_mut().reset(due);
            }
            let room = self.session.out.len() < OUT_CAP;
            tokio::select! {
                packet = wire.packets.next() => {
                    now = Instant::now();
                    if let Some(end) = self.read(packet, wire, now) {
                        return end;
                    }
                }
                written = wire.writer.write_buf(&mut self.session.out), if !self.session.out.is_empty() => {
                    now = Instant::now();
                    match written {
                        Ok(bytes) => keepalive.sent(bytes, self.session.out.len(), now),
                        Err(error) => return End::Dropped(error.to_string()),
                    }
                    self.session.trim();
                }
                _ = self.best_effort.recv_many(&mut batch, BATCH), if intake && up && room => {
                    now = Instant::now();
                    intake = !batch.is_empty();
                    for message in batch.drain(..) {
                        packet::put_publish(&mut self.session.out, &message.publish);
                    }
                }
                command = self.control.recv(), if handles => {
                    now = Instant::now();
                    let mut next = command;
                    // Every handle is dropped: nobody is left to close the connection.
                    handles = next.is_some();
                    if !handles {
                        self.session.closing.get_or_insert_default();
                    }
                    while let Some(command) = next {
                        self.session.control(command, now);
                        next = self.control.try_recv().ok();
                    }
                }
                Some(reply) = self.acks.recv() => {
                    now = Instant::now();
                    let mut next = Some(reply);
                    while let Some(reply) = next {
                        self.session.acked(reply, now);
                        next = self.acks.try_recv().ok();
                    }
                }
                () = &mut timer => {
                    now = Instant::now();
                    keepalive.received(wire.packets.get_ref().last_read());
                    match keepalive.check(now) {
                        Check::Fine => {}
                        Check::Probe => {
                            packet::put(&mut self.session.out, &Packet::PingReq);
                            keepalive.probing(self.session.out.len());
                        }
                        Check::Dead(cause) => return End::Lost(cause),
                    }
                    self.session.release(now);
                }
            }
        }
    }

    /// Takes in a packet and those that have arrived behind it.
    fn read(
        &mut self,
        first: Option<Result<Packet, CodecError>>,
        wire: &mut Wire,
        now: Instant,
    ) -> Option<End> {
        let mut packet = first;
        let mut left = BATCH;
        loop {
            match packet {
                Some(Ok(packet)) => {
                    if let Err(cause) = self.session.packet(packet, now) {
                        return Some(End::Lost(cause));
                    }
                }
                Some(Err(CodecError::Io(error))) => return Some(End::Dropped(error.to_string())),
                Some(Err(error)) => {
                    return Some(End::Lost(net::read_error(&error, &self.config)));
                }
                None => {
                    let cause = "the broker closed the connection".to_owned();
                    return Some(End::Dropped(cause));
                }
            }
            if self.session.flooded() {
                return Some(End::Flooded);
            }
            left -= 1;
            if left == 0 {
                return None;
            }
            packet = wire.packets.next().now_or_never()?;
        }
    }
}
