//! When a quiet link is probed, and when it counts as dead. Holds no clock: time is an argument.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// A verdict that the link is dead is looked at twice: a task that was not run for a while must first read what has
/// arrived meanwhile.
const SECOND_LOOK: Duration = Duration::from_millis(20);

/// The slowest link that is not taken for a dead one, in bytes per second. What was written may wait in buffers of the
/// system and of the network, which we do not see, and the answer to a probe waits behind it.
const SLOWEST: u64 = 32 << 10;

/// What fits into those buffers. Beyond it writing itself gets stuck, which is watched too.
const BUFFERS: u64 = 4 << 20;

/// Watches the traffic of one link.
#[derive(Debug)]
pub(crate) struct KeepAlive {
    period: Duration,
    last_in: Instant,
    last_out: Instant,
    /// Bytes written over this link, and how many of them the broker is known to have read.
    written: u64,
    read: u64,
    /// Where the unanswered probes stand among the bytes written.
    probes: VecDeque<u64>,
    /// Since when bytes wait to be written without progress.
    stuck: Option<Instant>,
    probe: Probe,
    doubted: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Probe {
    None,
    /// A PINGREQ ends this many bytes behind the front of what is to be written.
    Queued(usize),
    Sent(Instant),
}

/// What to do now.
#[derive(Debug, PartialEq)]
pub(crate) enum Check {
    /// Nothing.
    Fine,
    /// Append a PINGREQ and call [`KeepAlive::probing`].
    Probe,
    /// Give the link up, for this reason.
    Dead(String),
}

impl KeepAlive {
    /// Starts with a link on which both sides just spoke.
    pub(crate) fn new(period: Duration, now: Instant) -> Self {
        Self {
            period,
            last_in: now,
            last_out: now,
            written: 0,
            read: 0,
            probes: VecDeque::new(),
            stuck: None,
            probe: Probe::None,
            doubted: None,
        }
    }

    /// When bytes arrived last.
    pub(crate) fn received(&mut self, at: Instant) {
        self.last_in = self.last_in.max(at);
        if matches!(self.probe, Probe::Sent(sent) if self.last_in >= sent) {
            self.probe = Probe::None;
        }
    }

    /// A probe was answered: all that was written before it has arrived.
    pub(crate) fn answered(&mut self) {
        if let Some(place) = self.probes.pop_front() {
            self.read = place;
        }
    }

    /// Bytes wait to be written.
    pub(crate) fn queued(&mut self, now: Instant) {
        self.stuck.get_or_insert(now);
    }

    /// `bytes` were written and `rest` still wait.
    pub(crate) fn sent(&mut self, bytes: usize, rest: usize, now: Instant) {
        self.last_out = now;
        self.written += bytes as u64;
        self.stuck = (rest > 0).then_some(now);
        if let Probe::Queued(ahead) = self.probe {
            self.probe = match ahead.saturating_sub(bytes) {
                0 => {
                    self.probes.push_back(self.written);
                    Probe::Sent(now)
                }
                ahead => Probe::Queued(ahead),
            };
        }
    }

    /// A PINGREQ was appended, and `bytes` now wait to be written.
    pub(crate) fn probing(&mut self, bytes: usize) {
        self.probe = Probe::Queued(bytes);
    }

    /// What to do now.
    pub(crate) fn check(&mut self, now: Instant) -> Check {
        if now >= self.end() {
            match self.doubted {
                None => self.doubted = Some(now),
                Some(since) if now >= since + SECOND_LOOK => {
                    return Check::Dead(self.epitaph());
                }
                Some(_) => {}
            }
            return Check::Fine;
        }
        self.doubted = None;
        if self.probe == Probe::None && now >= self.quiet_until() {
            return Check::Probe;
        }
        Check::Fine
    }

    /// When to check next.
    pub(crate) fn deadline(&self) -> Instant {
        if let Some(since) = self.doubted {
            return since + SECOND_LOOK;
        }
        if self.probe == Probe::None {
            return self.quiet_until().min(self.end());
        }
        self.end()
    }

    /// The broker closes links on which it heard nothing, and we want to hear from it: either side counts.
    fn quiet_until(&self) -> Instant {
        self.last_in.min(self.last_out) + self.period
    }

    fn end(&self) -> Instant {
        let silent = match self.probe {
            Probe::Sent(at) => Some(at + self.patience()),
            Probe::None | Probe::Queued(_) => None,
        };
        let stuck = self.stuck.map(|since| since + self.period * 3 / 2);
        let never = self.last_in.max(self.last_out) + self.period * 4;
        silent.into_iter().chain(stuck).min().unwrap_or(never)
    }

    /// How long an answer to a probe may take.
    fn patience(&self) -> Duration {
        let under_way = (self.written - self.read).min(BUFFERS);
        self.period / 2 + Duration::from_secs(under_way / SLOWEST)
    }

    fn epitaph(&self) -> String {
        match self.probe {
            Probe::Sent(_) => format!(
                "the broker was silent for {:?} after a probe (keep_alive {:?})",
                self.patience(),
                self.period
            ),
            _ => format!(
                "nothing could be written for {:?} (keep_alive {:?})",
                self.period * 3 / 2,
                self.period
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEEP_ALIVE: Duration = Duration::from_secs(10);

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    /// Checks at each deadline up to `until` as the connection does; the seconds at which it probed or died.
    fn run(
        keepalive: &mut KeepAlive,
        start: Instant,
        until: u64,
        answers: bool,
    ) -> Vec<(u64, bool)> {
        let mut log = Vec::new();
        loop {
            let now = keepalive.deadline();
            if now > start + s(until) {
                return log;
            }
            match keepalive.check(now) {
                Check::Fine => {}
                Check::Probe => {
                    log.push(((now - start).as_secs(), false));
                    keepalive.probing(2);
                    keepalive.sent(2, 0, now);
                    if answers {
                        keepalive.received(now + Duration::from_millis(1));
                    }
                }
                Check::Dead(_) => {
                    log.push(((now - start).as_secs(), true));
                    return log;
                }
            }
        }
    }

    #[test]
    fn a_quiet_link_is_probed_once_a_period() {
        let start = Instant::now();
        let mut keepalive = KeepAlive::new(KEEP_ALIVE, start);
        let log = run(&mut keepalive, start, 35, true);
        assert_eq!(log, [(10, false), (20, false), (30, false)]);
    }

    #[test]
    fn a_silent_broker_is_given_up_after_one_and_a_half_periods() {
        let start = Instant::now();
        let mut keepalive = KeepAlive::new(KEEP_ALIVE, start);
        let log = run(&mut keepalive, start, 60, false);
        assert_eq!(log, [(10, false), (15, true)]);
    }

    #[test]
    fn a_link_that_takes_nothing_is_given_up_after_one_and_a_half_periods() {
        let start = Instant::now();
        let mut keepalive = KeepAlive::new(KEEP_ALIVE, start);
        keepalive.queued(start + s(1));
        keepalive.queued(start + s(2));
        assert_eq!(keepalive.check(start + s(10)), Check::Probe);
        keepalive.probing(1_000_002);
        keepalive.received(start + s(12));
        assert_eq!(keepalive.check(start + s(16)), Check::Fine);
        assert!(
            matches!(keepalive.check(start + s(17)), Check::Dead(why) if why.contains("written"))
        );
    }

    #[test]
    fn a_long_write_that_makes_progress_is_no_death() {
        let start = Instant::now();
        let mut keepalive = KeepAlive::new(KEEP_ALIVE, start);
        keepalive.queued(start);
        for second in 1..100 {
            let now = start + s(second);
            match keepalive.check(now) {
                Check::Probe => keepalive.probing(10_000),
                other => assert_eq!(other, Check::Fine),
            }
            keepalive.sent(10, 10_000, now);
        }
    }

    #[test]
    fn what_was_written_before_a_probe_buys_time() {
        let start = Instant::now();
        let mut keepalive = KeepAlive::new(KEEP_ALIVE, start);
        assert_eq!(keepalive.check(start + s(10)), Check::Probe);
        keepalive.probing(20 * 32_768);
        keepalive.sent(20 * 32_768, 0, start + s(10));
        assert_eq!(keepalive.deadline(), start + s(10 + 5 + 20));
        // Something else arrives: alive, but what was written may still be on its way.
        keepalive.received(start + s(11));
        keepalive.probing(2);
        keepalive.sent(2, 0, start + s(21));
        assert_eq!(keepalive.deadline(), start + s(21 + 5 + 20));
        keepalive.answered();
        assert_eq!(keepalive.deadline(), start + s(21 + 5));
    }

    #[test]
    fn a_task_that_slept_reads_before_it_judges() {
        let start = Instant::now();
        let mut keepalive = KeepAlive::new(KEEP_ALIVE, start);
        assert_eq!(keepalive.check(start + s(10)), Check::Probe);
        keepalive.probing(2);
        keepalive.sent(2, 0, start + s(10));
        assert_eq!(keepalive.check(start + s(40)), Check::Fine);
        keepalive.received(start + s(40));
        assert_eq!(keepalive.check(start + s(41)), Check::Probe);
        assert!(keepalive.doubted.is_none());
    }
}
