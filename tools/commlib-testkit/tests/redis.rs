//! The Redis harness: servers start, die, come back with or without their data.

use commlib_testkit::Redis;

#[tokio::test]
async fn lives_dies_and_comes_back_on_its_port() {
    if !Redis::available() {
        return;
    }
    let server = Redis::start().await;
    assert_eq!(server.command(&["RPUSH", "list", "a", "b"]).await, ["2"]);
    server.kill9();
    server.restart().await;
    let list = ["LRANGE", "list", "0", "-1"];
    assert_eq!(server.command(&list).await, ["a", "b"]);
    assert_eq!(server.keys().await, ["list"]);
    server.pause();
    server.resume();
    server.restart_without_data().await;
    assert!(server.command(&list).await.is_empty());
    let port = server.port();
    drop(server);
    assert!(std::net::TcpStream::connect(("127.0.0.1", port)).is_err());
}

#[tokio::test]
async fn asks_for_the_login_it_was_given() {
    if !Redis::available() {
        return;
    }
    let server = Redis::builder()
        .login("robot", "secret")
        .setting("maxmemory 8mb")
        .start()
        .await;
    assert_eq!(server.command(&["ACL", "WHOAMI"]).await, ["robot"]);
    assert!(server.url().starts_with("redis://robot:secret@127.0.0.1:"));
}

#[tokio::test]
async fn wrong_settings_are_told_in_the_servers_words() {
    if !Redis::available() {
        return;
    }
    let builder = Redis::builder().setting("no_such_setting 1");
    let error = builder.try_start().await.unwrap_err();
    assert!(error.to_string().contains("no_such_setting"), "{error}");
}
