//! Whoever knows the ancestor finds everything by the name it had there.

/// Names of commlib-py, and the file of ours in which rustdoc's search finds them.
const ALIASES: [(&str, &str); 17] = [
    ("ConnectionParameters", include_str!("../src/connection.rs")),
    ("endpoint_factory", include_str!("../src/connection.rs")),
    ("create_publisher", include_str!("../src/pubsub/mod.rs")),
    ("create_mpublisher", include_str!("../src/pubsub/mod.rs")),
    ("create_subscriber", include_str!("../src/pubsub/mod.rs")),
    ("create_psubscriber", include_str!("../src/pubsub/mod.rs")),
    ("create_rpc", include_str!("../src/rpc/mod.rs")),
    ("create_rpc_client", include_str!("../src/rpc/mod.rs")),
    ("RPCService", include_str!("../src/rpc/mod.rs")),
    ("RPCClient", include_str!("../src/rpc/client.rs")),
    ("RPCServer", include_str!("../src/rpc/server.rs")),
    ("MPublisher", include_str!("../src/pubsub/publisher.rs")),
    ("WPublisher", include_str!("../src/pubsub/publisher.rs")),
    ("PSubscriber", include_str!("../src/pubsub/subscriber.rs")),
    ("WSubscriber", include_str!("../src/pubsub/subscriber.rs")),
    ("run_forever", include_str!("../src/node.rs")),
    ("node_name", include_str!("../src/node.rs")),
];

#[test]
fn every_name_of_the_ancestor_is_an_alias() {
    for (alias, file) in ALIASES {
        let attribute = format!("#[doc(alias = \"{alias}\")]");
        assert!(file.contains(&attribute), "no item is marked {attribute}");
    }
}
