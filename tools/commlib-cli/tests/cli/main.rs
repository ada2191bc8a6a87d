//! The contract of the `commlib` command, checked on the built binary and a real broker.

mod bad_input;
mod broker_restart;
mod pub_sub;
mod rpc;
mod support;
