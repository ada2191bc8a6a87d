//! Free ports on the loopback interface.

use std::net::{Ipv4Addr, TcpListener};

/// Below the range from which systems take the ports of outgoing connections. A client that keeps reconnecting to a
/// dead port within that range can meet itself there (TCP simultaneous open), or find it taken by another client.
const RANGE: std::ops::Range<u16> = 12_000..32_000;

/// A port that nobody listens on at the moment.
///
/// Another process may take it before the caller does, so callers try again with another one.
///
/// # Panics
/// If a hundred ports in a row are taken.
pub fn free_port() -> u16 {
    (0..100)
        .map(|_| fastrand::u16(RANGE))
        .find(|&port| TcpListener::bind((Ipv4Addr::LOCALHOST, port)).is_ok())
        .expect("no free port between 12000 and 32000 on 127.0.0.1")
}
