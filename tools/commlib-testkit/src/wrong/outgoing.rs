//! Faults of sending and closing.

use std::time::Duration;

use commlib_core::{
    Delivery, ErrorKind, LinkState, Message, Receipt, Result, SendOptions, Target, Value,
};

use super::{Fault, Wrong};

impl Wrong {
    pub(super) async fn send_wrongly(
        &self,
        to: &Target,
        mut message: Message,
        options: SendOptions,
    ) -> Result<Receipt> {
        let surely = options.delivery == Delivery::AtLeastOnce;
        let state = self.inner.link().state();
        let down = matches!(state, LinkState::Reconnecting { .. });
        match (self.fault, to) {
            (Fault::DropsEveryTenth, Target::Topic(_))
            | (Fault::LosesReplies, Target::Reply(_))
                if self.tenth() =>
            {
                return Ok(Receipt::ready());
            }
            (Fault::SendsTwice, Target::Topic(_)) => {
                drop(self.pass(to, message.clone(), &options).await?);
            }
            (Fault::Reorders, Target::Topic(_)) => {
                return self.overtake(to, message, options).await;
            }
            (Fault::ConfirmsWithoutSending, Target::Topic(_)) if surely => {
                return Ok(Receipt::ready());
            }
            (Fault::ConfirmsEarly, Target::Topic(_)) if surely => {
                let (inner, to) = (self.inner.clone(), to.clone());
                tokio::spawn(async move {
                    inner
                        .transport()
                        .send(&to, message, options)
                        .await
                        .map(drop)
                });
                return Ok(Receipt::ready());
            }
            (Fault::NeverConfirms, Target::Topic(_)) if surely => {
                drop(self.pass(to, message, &options).await?);
                return Ok(never());
            }
            (Fault::ClosesWithoutFlush, Target::Topic(_)) if surely => {
                return Ok(self.send_later(to.clone(), message, options));
            }
            (Fault::RequestsTwice, Target::Queue(_)) => {
                let mut other = message.clone();
                other.header.message_id = Some(format!("{}-again", fastrand::u64(..)));
                drop(self.pass(to, other, &options).await?);
            }
            (Fault::HidesRefusals, Target::Queue(_)) => {
                return match self.pass(to, message, &options).await {
                    Err(error) if error.kind() == ErrorKind::NoService => Ok(never()),
                    outcome => outcome,
                };
            }
            (Fault::ForgetsDeadlines, Target::Queue(_)) => message.header.timeout_ms = None,
            (Fault::TrustsClocks, Target::Queue(_)) => {
                let (sent, now) = (message.header.timestamp, Message::new("").header.timestamp);
                let age = sent.zip(now).map(|(sent, now)| now.abs_diff(sent));
                if age.is_some_and(|age| age > 60_000_000_000) {
                    return Ok(Receipt::ready());
                }
            }
            (Fault::LosesErrors, Target::Reply(_)) => message.header.error = None,
            (Fault::AcceptsTooLarge, _)
                if message.data.len() > self.link.capabilities().max_payload =>
            {
                return Ok(Receipt::ready());
            }
            (Fault::CutsLarge, _) => message.data.truncate(64 << 10),
            (Fault::LosesHeaderFields, _) => message.header.extra.clear(),
            (Fault::RewritesData, _) => {
                if let Ok(value) = commlib_core::decode::<Value>(&message.data) {
                    message.data = value.to_string().into();
                }
            }
            (Fault::LosesWhileDown, Target::Topic(_)) if down && !surely => {
                return Ok(Receipt::ready());
            }
            _ => {}
        }
        self.pass(to, message, &options).await
    }

    async fn pass(&self, to: &Target, message: Message, options: &SendOptions) -> Result<Receipt> {
        self.inner
            .transport()
            .send(to, message, options.clone())
            .await
    }

    /// Holds every fifth message back until the next one has gone.
    async fn overtake(
        &self,
        to: &Target,
        message: Message,
        options: SendOptions,
    ) -> Result<Receipt> {
        let mut held = self.held.lock().await;
        if held.is_none() && self.sent.fetch_add(1, std::sync::atomic::Ordering::SeqCst) % 5 == 3 {
            *held = Some((to.clone(), message, options));
            return Ok(Receipt::ready());
        }
        let receipt = self.pass(to, message, &options).await?;
        if let Some((to, message, options)) = held.take() {
            drop(self.pass(&to, message, &options).await?);
        }
        Ok(receipt)
    }

    /// Sends in the background, until the close.
    fn send_later(&self, to: Target, message: Message, options: SendOptions) -> Receipt {
        let inner = self.inner.clone();
        let (confirm, receipt) = Receipt::pending();
        let task = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(100)).await;
            let sent = inner.transport().send(&to, message, options).await;
            confirm.confirm(sent.map(drop));
        });
        self.underway.lock().unwrap().push(task.abort_handle());
        receipt
    }
}

/// A receipt that never resolves.
fn never() -> Receipt {
    let (confirm, receipt) = Receipt::pending();
    std::mem::forget(confirm);
    receipt
}
