//! What a star stands for.

use commlib_core::{PubSub, Subscriber};

use super::peer::{next, subscribe};
use super::{Fixture, unique, within};

/// Publishes its own name on each topic of `names` below a new prefix; what arrived on `pattern` below it, without
/// the prefix. The last of the names must be among those that the pattern stands for.
async fn arrivals(fixture: &dyn Fixture, pattern: &str, names: &[&str]) -> Vec<String> {
    let prefix = unique("pattern");
    let connection = fixture.connect().await;
    let pattern = format!("{prefix}.{pattern}");
    let mut subscriber: Subscriber<String> = subscribe(&connection, &pattern).await;
    let publisher = fixture
        .connect()
        .await
        .multi_publisher()
        .expect("publisher");
    for name in names {
        let topic = match *name {
            "" => prefix.clone(),
            name => format!("{prefix}.{name}"),
        };
        publisher.publish(&topic, &topic).await.expect("publish");
    }
    let last = format!("{prefix}.{}", names.last().expect("names"));
    let mut arrived = Vec::new();
    while arrived.last() != Some(&last) {
        let message = next(&mut subscriber).await;
        assert_eq!(message.topic.as_str(), message.data, "the reported name");
        arrived.push(message.data);
    }
    let cut = |name: String| {
        name.strip_prefix(&prefix)
            .map(|rest| rest.trim_start_matches('.').to_owned())
    };
    arrived.into_iter().filter_map(cut).collect()
}

/// `a.*` is everything below `a`, however deep, and not `a` itself.
pub async fn last_star_is_one_or_more_segments(fixture: &dyn Fixture) {
    let names = ["", "one", "two.deep", "three.very.deep", "last"];
    assert_eq!(arrivals(fixture, "*", &names).await, names[1..]);
}

/// `a.*.c` is exactly one segment between `a` and `c`.
pub async fn inner_star_is_one_segment(fixture: &dyn Fixture) {
    let names = ["c", "b.c", "b.b.c", "b.d", "b.c.d", "last.c"];
    assert_eq!(arrivals(fixture, "*.c", &names).await, ["b.c", "last.c"]);
}

/// `*` is every topic there is.
pub async fn star_alone_is_everything(fixture: &dyn Fixture) {
    let connection = fixture.connect().await;
    let mut subscriber: Subscriber = subscribe(&connection, "*").await;
    let topic = unique("everything");
    let publisher = fixture
        .connect()
        .await
        .multi_publisher()
        .expect("publisher");
    for topic in [topic.clone(), format!("{topic}.deep.down")] {
        publisher.publish(&topic, &"here").await.expect("publish");
        // Others may use the broker too, in any form.
        let found = async {
            loop {
                match subscriber.recv().await.expect("the subscription goes on") {
                    Ok(message) if message.topic.as_str() == topic => return,
                    _ => {}
                }
            }
        };
        within("a message on any topic", found).await;
    }
}

/// A pattern's subscriber sees the topic of each message, whichever subscription of the connection it came by.
pub async fn arrival_names_are_reported(fixture: &dyn Fixture) {
    let names = ["x.b", "a-b_c", "9.8.7", "UPPER.lower", "last"];
    assert_eq!(arrivals(fixture, "*", &names).await, names);
}
