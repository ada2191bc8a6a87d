//! The harness itself: brokers start, die, come back and never outlive their starter.

use std::process::Command;
use std::time::Duration;

use commlib_testkit::Mosquitto;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// The return code of a CONNACK, after a clean 3.1.1 CONNECT; `None` if the broker does not answer.
async fn connect(port: u16, login: Option<(&str, &str)>) -> Option<u8> {
    // Clean session; with a login also the flags for user and password.
    let flags = if login.is_some() { 0xc2 } else { 0x02 };
    let mut body = b"\0\x04MQTT\x04".to_vec();
    body.extend([flags, 0, 60]);
    body.extend(b"\0\x04test");
    if let Some((user, password)) = login {
        for text in [user, password] {
            body.extend((text.len() as u16).to_be_bytes());
            body.extend(text.bytes());
        }
    }
    let mut packet = vec![0x10, body.len() as u8];
    packet.append(&mut body);
    let mut answer = [0; 4];
    let exchange = async {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await?;
        stream.write_all(&packet).await?;
        stream.read_exact(&mut answer).await
    };
    let outcome = tokio::time::timeout(Duration::from_millis(500), exchange).await;
    matches!(outcome, Ok(Ok(_))).then_some(answer[3])
}

#[tokio::test]
async fn lives_dies_and_comes_back_on_its_port() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::start().await;
    assert_eq!(connect(broker.port(), None).await, Some(0));
    broker.kill9();
    assert_eq!(connect(broker.port(), None).await, None);
    broker.restart().await;
    assert_eq!(connect(broker.port(), None).await, Some(0));
    broker.pause();
    assert_eq!(connect(broker.port(), None).await, None);
    broker.resume();
    assert_eq!(connect(broker.port(), None).await, Some(0));
    broker.stop().await;
    assert_eq!(connect(broker.port(), None).await, None);
    assert!(
        broker.folder().join("mosquitto.db").is_file(),
        "{}",
        broker.log()
    );
    broker.restart_without_data().await;
    assert_eq!(connect(broker.port(), None).await, Some(0));
    let port = broker.port();
    drop(broker);
    assert_eq!(connect(port, None).await, None);
}

#[tokio::test]
async fn asks_for_the_login_it_was_given() {
    if !Mosquitto::available() {
        return;
    }
    let broker = Mosquitto::builder()
        .login("robot", "secret")
        .acl("topic readwrite robots/#")
        .setting("max_packet_size 2000")
        .listener("max_connections 5")
        .start()
        .await;
    assert_eq!(connect(broker.port(), None).await, Some(5));
    assert_eq!(
        connect(broker.port(), Some(("robot", "secret"))).await,
        Some(0)
    );
    assert!(broker.url().starts_with("mqtt://robot:secret@127.0.0.1:"));
}

#[tokio::test]
async fn wrong_settings_are_told_in_the_brokers_words() {
    if !Mosquitto::available() {
        return;
    }
    let error = Mosquitto::builder()
        .setting("no_such_setting 1")
        .try_start()
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no_such_setting"), "{error}");
}

/// Starts the `commlib-testkit` program, whose command prints the URL and waits, and kills it with SIGKILL.
#[tokio::test]
async fn ends_when_its_starter_is_killed() {
    if !Mosquitto::available() {
        return;
    }
    let mut starter = tokio::process::Command::new(env!("CARGO_BIN_EXE_commlib-testkit"))
        .args([
            "run",
            "--",
            "sh",
            "-c",
            "echo $COMMLIB_TEST_MQTT_URL; exec sleep 5",
        ])
        .env_remove("COMMLIB_TEST_MQTT_URL")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut url = String::new();
    BufReader::new(starter.stdout.take().unwrap())
        .read_line(&mut url)
        .await
        .unwrap();
    let port = url.trim().rsplit(':').next().unwrap().parse().unwrap();
    assert_eq!(connect(port, None).await, Some(0));
    starter.kill().await.unwrap();
    let gone = async {
        while connect(port, None).await.is_some() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), gone)
        .await
        .expect("the broker outlives its starter");
}

#[test]
fn the_program_passes_the_exit_code_on() {
    if !Mosquitto::available() {
        return;
    }
    for (command, code) in [
        ("test -n \"$COMMLIB_TEST_MQTT_URL\"", 0),
        ("exit 7", 7),
        ("kill -9 $$", 137),
    ] {
        let status = Command::new(env!("CARGO_BIN_EXE_commlib-testkit"))
            .args(["run", "--", "sh", "-c", command])
            .env_remove("COMMLIB_TEST_MQTT_URL")
            .status()
            .unwrap();
        assert_eq!(status.code(), Some(code), "{command}");
    }
}
