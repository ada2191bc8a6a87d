//! The scheme of a URL picks the transport, or the error says what to do.

use commlib::ErrorKind;

#[tokio::test]
async fn memory_is_always_there() {
    let connection = commlib::connect("memory:face").await.unwrap();
    assert!(connection.link().state().is_connected());
    connection.close().await.unwrap();
}

#[tokio::test]
async fn an_unknown_scheme_lists_the_known() {
    let error = commlib::connect("ftp://u:secret@host").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert_eq!(
        error.to_string(),
        "broker URL scheme `ftp`: it is unknown; known are memory, mqtt, mqtts, redis, rediss, amqp, amqps"
    );
}

#[cfg(not(feature = "mqtt"))]
#[tokio::test]
async fn a_scheme_whose_feature_is_off_names_the_feature() {
    let error = commlib::connect("mqtt://localhost").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("feature `mqtt`"), "{error}");
}

#[cfg(not(feature = "amqp"))]
#[tokio::test]
async fn each_broker_has_its_feature() {
    let error = commlib::connect("amqp://localhost").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("feature `amqp`"), "{error}");
}

#[cfg(feature = "amqp")]
#[tokio::test]
async fn amqp_options_are_checked_before_any_socket_opens() {
    let error = commlib::connect("amqp://localhost:1?heart_beat=1s")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("heart_beat"), "{error}");
}

#[cfg(feature = "mqtt")]
#[tokio::test]
async fn options_are_checked_before_any_socket_opens() {
    let error = commlib::connect("mqtt://localhost:1?keepalive=1s")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("keepalive"), "{error}");
}

#[cfg(not(feature = "redis"))]
#[tokio::test]
async fn so_does_redis() {
    let error = commlib::connect("redis://localhost").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("feature `redis`"), "{error}");
}

#[cfg(feature = "redis")]
#[tokio::test]
async fn redis_options_are_checked_before_any_socket_opens() {
    let error = commlib::connect("redis://localhost:1?stream=on")
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("streams"), "{error}");
    let error = commlib::connect("rediss://localhost:1").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
}
