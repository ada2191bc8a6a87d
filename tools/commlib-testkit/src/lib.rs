//! Real brokers, broken links and one list of cases for every transport of commlib.
//!
//! Test support: everything here panics with a plain text when it cannot do its work, because that is how a test fails.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "test support: a panic is how a test fails"
)]

pub mod conformance;
mod forward;
mod mosquitto;
mod port;
mod process;
mod proxy;
mod shared;
mod spy;
mod wait;
pub mod wrong;

pub use mosquitto::{Mosquitto, MosquittoBuilder};
pub use port::free_port;
pub use proxy::{Connections, Proxy};
pub use shared::{MQTT_URL, mqtt_url};
