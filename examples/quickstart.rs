//! Publish and subscribe, patterns, calls and errors: the first tour of commlib.
//!
//! ```text
//! cargo run --example quickstart                                    # no broker: everything in this process
//! cargo run --example quickstart -- --url mqtt://localhost:1883     # the same on an MQTT broker
//! ```

use std::time::Duration;

use clap::Parser;
use commlib::prelude::*;
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
struct Sonar {
    distance: f64,
    horizontal_fov: f64,
    vertical_fov: f64,
}

#[derive(Debug, Serialize, Deserialize)]
struct AddTwoInts {
    a: i64,
    b: i64,
}

#[derive(Debug, Serialize, Deserialize)]
struct Sum {
    c: i64,
}

#[derive(Parser)]
struct Args {
    /// The broker.
    #[arg(long, default_value = "memory:")]
    url: String,
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args = Args::parse();
    // Every wait of the tour ends with it.
    tokio::time::timeout(Duration::from_secs(30), tour(&args.url)).await??;
    Ok(())
}

async fn tour(url: &str) -> commlib::Result<()> {
    // The namespace stands before all names below: on a shared broker this tour disturbs nobody.
    let connection = commlib::connect(url).await?;
    let node = Node::builder("tour")
        .namespace("quickstart")
        .start(connection)
        .await?;

    println!("1. A sonar publishes, we subscribe.");
    let mut sonar = node.subscriber::<Sonar>("sensors.sonar.front").await?;
    let publisher = node.publisher("sensors.sonar.front")?;
    let mut reading = Sonar {
        distance: 2.0,
        horizontal_fov: 30.0,
        vertical_fov: 14.0,
    };
    for _ in 0..3 {
        publisher.publish(&reading).await?;
        reading.distance += 1.0;
    }
    for _ in 0..3 {
        if let Some(message) = sonar.recv().await {
            println!("   {} m ahead", message?.data.distance);
        }
    }

    println!("2. A pattern hears all sensors; one publisher speaks for several.");
    let mut sensors = node.subscriber::<Sonar>("sensors.*").await?;
    let publisher = node.multi_publisher()?;
    for topic in ["sensors.sonar.front", "sensors.ir.rear"] {
        publisher.publish(topic, &reading).await?;
    }
    for _ in 0..2 {
        if let Some(message) = sensors.recv().await {
            let message = message?;
            println!("   {}: {} m", message.topic, message.data.distance);
        }
    }

    println!("3. A service adds two integers, we call it.");
    let service = node
        .rpc_service("thing.device0.ops.add_two_ints", add_two_ints)
        .await?;
    let adder = node.rpc_client::<AddTwoInts, Sum>("thing.device0.ops.add_two_ints")?;
    let Sum { c } = adder.call(&AddTwoInts { a: 1, b: 2 }).await?;
    println!("   1 + 2 = {c}");

    println!("4. What a service refuses comes back as an error with a code.");
    let too_much = AddTwoInts { a: i64::MAX, b: 1 };
    match adder.call(&too_much).await {
        Ok(Sum { c }) => println!("   unexpected: {c}"),
        Err(error) => match error.remote() {
            Some(refusal) => println!("   {}: {}", refusal.code, refusal.message),
            None => return Err(error),
        },
    }

    // Dropping a handle stops its service at once; this way running handlers come to their end.
    service.stop().await;
    node.shutdown(Duration::from_secs(5)).await?;
    println!("Done.");
    Ok(())
}

async fn add_two_ints(q: AddTwoInts) -> Result<Sum, RpcError> {
    match q.a.checked_add(q.b) {
        Some(c) => Ok(Sum { c }),
        None => Err(RpcError::new("overflow", "the sum has no room in 64 bits")),
    }
}
