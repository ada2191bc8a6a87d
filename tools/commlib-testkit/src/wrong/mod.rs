//! Transports that misbehave on purpose: the proof that the cases of [`conformance`](mod@crate::conformance) can fail.

mod incoming;
mod outgoing;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use commlib_core::{
    Connection, Error, ErrorKind, Inbox, Link, LinkState, ListenOptions, Message, Receipt, Result,
    SendOptions, Source, Target, Transport,
};
use tokio::sync::watch;
use tokio::task::AbortHandle;

use incoming::Shared;

/// Lists the faults with the case that must notice each.
macro_rules! faults {
    ($($(#[$doc:meta])* $fault:ident $case:literal)*) => {
        /// One way to misbehave.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Fault {
            /// No fault: passes everything on.
            None,
            $($(#[$doc])* $fault,)*
        }

        impl Fault {
            /// All real faults.
            pub const ALL: &[Self] = &[$(Self::$fault),*];

            /// The case, as `group::name`, that a transport with this fault fails; maybe among others.
            pub fn caught_by(self) -> Option<&'static str> {
                match self {
                    Self::None => None,
                    $(Self::$fault => Some($case),)*
                }
            }
        }
    };
}

faults! {
    /// Drops every tenth message on topics.
    DropsEveryTenth "topics::order_from_one_publisher"
    /// Sends each message on a topic twice.
    SendsTwice "topics::two_subscribers_each_get_all"
    /// Lets a later message overtake an earlier one.
    Reorders "topics::order_from_one_publisher"
    /// Takes a star at the end for one segment.
    ShallowStars "patterns::last_star_is_one_or_more_segments"
    /// Never delivers for a pattern with a star in the middle.
    NoInnerStars "patterns::inner_star_is_one_segment"
    /// Reports a name that also matches, but is not the one.
    WrongName "patterns::arrival_names_are_reported"
    /// Says that it listens before it does.
    ListensLate "topics::first_message_after_subscribing_arrives"
    /// Gives a message to one of several matching subscriptions of a connection.
    OneOfOverlapping "topics::overlapping_subscriptions_get_each_message_once"
    /// Gives a message to each matching subscription as often as there are any.
    EachForEach "topics::overlapping_subscriptions_get_each_message_once"
    /// Ends all subscriptions to a topic when one of them is dropped.
    DropsNeighbours "topics::a_dropped_subscription_leaves_overlapping_ones_alone"
    /// Keeps what is not taken away from a subscriber that comes back.
    StaleMessages "topics::a_dropped_subscriber_gets_nothing_more"
    /// Loses what a slow subscriber does not take, without a word.
    HidesGaps "topics::a_slow_subscriber_stalls_nobody_and_sees_a_gap"
    /// Waits for a slow subscriber before it serves the others.
    StallsForTheSlow "topics::a_slow_subscriber_stalls_nobody_and_sees_a_gap"
    /// Confirms at-least-once messages that it does not send.
    ConfirmsWithoutSending "delivery::confirmed_messages_arrive"
    /// Confirms at-least-once messages before the broker has.
    ConfirmsEarly "outage::at_least_once_waits_for_the_link"
    /// Never confirms anything.
    NeverConfirms "delivery::many_receipts_are_confirmed_in_order"
    /// Acknowledges what arrives before anybody has used it.
    AcksEarly "delivery::a_failed_handler_gets_the_message_again"
    /// Does not pass acknowledgements on.
    LosesAcks "delivery::every_message_is_acknowledged_by_use"
    /// Forgets the name of a durable subscription.
    ForgetsDurable "delivery::a_durable_subscription_keeps_messages_while_away"
    /// Does not repeat what was dropped or rejected.
    NeverRedelivers "delivery::a_dropped_ack_brings_the_message_again"
    /// Runs each request at two services.
    RequestsTwice "queues::services_share_the_work"
    /// Keeps listening for a service that has been dropped.
    KeepsListening "queues::a_service_can_restart"
    /// Says nothing when nobody serves a name, although it could.
    HidesRefusals "queues::a_request_for_nobody"
    /// Brings replies to the wrong call.
    WrongKeys "rpc::a_hundred_calls_answered_out_of_order"
    /// Loses every tenth reply.
    LosesReplies "rpc::a_hundred_calls_answered_out_of_order"
    /// Takes the deadline off requests.
    ForgetsDeadlines "services::expired_requests_are_answered"
    /// Drops requests that their sender has dated in the past or future.
    TrustsClocks "services::clocks_ten_years_off"
    /// Takes the error off replies.
    LosesErrors "services::a_handlers_error_is_remote"
    /// Accepts what is too large and loses it.
    AcceptsTooLarge "messages::too_large_is_refused_before_sending"
    /// Cuts large data.
    CutsLarge "messages::two_hundred_kilobytes"
    /// Says nothing of what it cannot read.
    SwallowsMalformed "messages::malformed_is_reported_and_skipped"
    /// Loses header fields that it does not know.
    LosesHeaderFields "messages::header_fields_travel"
    /// Reads data and writes it anew.
    RewritesData "messages::json_text_is_untouched"
    /// Fails to close what is closed.
    ClosesOnce "life::close_is_idempotent"
    /// Goes on after the close.
    WorksAfterClose "life::use_after_close_is_closed"
    /// Leaves inboxes open when it is closed.
    NeverEnds "life::closing_ends_endpoints"
    /// Throws away on closing what it has accepted.
    ClosesWithoutFlush "life::accepted_messages_leave_before_the_close"
    /// Does not show that the link is lost.
    HidesOutages "outage::states_go_reconnecting_then_connected"
    /// Does not tell callers that the link is lost.
    KeepsCallersWaiting "outage::calls_in_flight_fail_at_once"
    /// Does not tell subscribers that the link was lost.
    HidesLostLinks "outage::subscribers_resume_and_see_a_gap"
    /// Does not listen again after an outage.
    DeafAfterOutage "outage::subscribers_resume_and_see_a_gap"
    /// Serves no more after an outage.
    IdleAfterOutage "outage::services_and_clients_resume"
    /// Takes best-effort messages while the link is down, and loses them.
    LosesWhileDown "outage::best_effort_says_that_the_link_is_down"
}

/// The same connection, with a fault.
pub fn wrong(inner: Connection, fault: Fault) -> Connection {
    Connection::new(Wrong::new(inner, fault))
}

/// A transport around another.
#[derive(Debug)]
struct Wrong {
    inner: Connection,
    fault: Fault,
    link: Link,
    // Keeps the link of `HidesOutages` open.
    _state: Option<watch::Sender<LinkState>>,
    sent: AtomicU64,
    held: tokio::sync::Mutex<Option<(Target, Message, SendOptions)>>,
    underway: Mutex<Vec<AbortHandle>>,
    closed: AtomicBool,
    shared: Arc<Shared>,
}

impl Wrong {
    fn new(inner: Connection, fault: Fault) -> Self {
        let (link, state) = if fault == Fault::HidesOutages {
            let capabilities = inner.link().capabilities().clone();
            let (link, state) = Link::new(inner.link().url(), capabilities);
            state.send_replace(LinkState::Connected { resumed: false });
            (link, Some(state))
        } else {
            (inner.link().clone(), None)
        };
        Self {
            inner,
            fault,
            link,
            _state: state,
            sent: AtomicU64::new(0),
            held: tokio::sync::Mutex::default(),
            underway: Mutex::default(),
            closed: AtomicBool::new(false),
            shared: Arc::default(),
        }
    }

    /// True for every tenth call.
    fn tenth(&self) -> bool {
        self.sent.fetch_add(1, Ordering::SeqCst) % 10 == 9
    }
}

#[async_trait]
impl Transport for Wrong {
    fn link(&self) -> &Link {
        &self.link
    }

    async fn send(&self, to: &Target, message: Message, options: SendOptions) -> Result<Receipt> {
        self.send_wrongly(to, message, options).await
    }

    async fn listen(&self, from: &Source, options: ListenOptions) -> Result<Inbox> {
        self.listen_wrongly(from, options).await
    }

    async fn close(&self) -> Result<()> {
        let again = self.closed.swap(true, Ordering::SeqCst);
        match self.fault {
            Fault::WorksAfterClose => return Ok(()),
            Fault::ClosesOnce if again => return Err(Error::new(ErrorKind::Closed, "close")),
            _ => {}
        }
        for task in self.underway.lock().unwrap().drain(..) {
            task.abort();
        }
        self.inner.close().await
    }
}
