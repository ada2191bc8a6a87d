//! The fault proxy, in front of an echo.

use std::time::{Duration, Instant};

use commlib_testkit::Proxy;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A server that sends back `greeting` and then what it gets; its address.
async fn echo(greeting: &'static [u8]) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("bind");
    let address = listener.local_addr().expect("address").to_string();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                write.write_all(greeting).await?;
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    address
}

async fn round_trip(stream: &mut TcpStream, bytes: &[u8]) -> std::io::Result<()> {
    stream.write_all(bytes).await?;
    let mut back = vec![0; bytes.len()];
    stream.read_exact(&mut back).await?;
    assert_eq!(back, bytes);
    Ok(())
}

async fn silent(stream: &mut TcpStream) -> bool {
    let read = stream.read_u8();
    tokio::time::timeout(Duration::from_millis(100), read)
        .await
        .is_err()
}

#[tokio::test]
async fn passes_cuts_refuses_and_counts() {
    let proxy = Proxy::start(echo(b"").await).await;
    let mut first = TcpStream::connect(proxy.address()).await.unwrap();
    let mut second = TcpStream::connect(proxy.address()).await.unwrap();
    round_trip(&mut first, &[7; 300_000]).await.unwrap();
    round_trip(&mut second, b"x").await.unwrap();
    assert_eq!(
        (proxy.connections().total, proxy.connections().open),
        (2, 2)
    );

    proxy.cut();
    let error = round_trip(&mut first, b"x").await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    proxy.wait_for(|connections| connections.open == 0).await;
    let mut third = TcpStream::connect(proxy.address()).await.unwrap();
    round_trip(&mut third, b"x").await.unwrap();

    proxy.refuse(true).await;
    let error = TcpStream::connect(proxy.address()).await.unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused);
    round_trip(&mut third, b"still open").await.unwrap();
    proxy.refuse(false).await;
    TcpStream::connect(proxy.address()).await.unwrap();

    drop(third);
    drop(proxy);
}

#[tokio::test]
async fn a_black_hole_holds_bytes_and_gives_them_back() {
    let proxy = Proxy::start(echo(b"").await).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    round_trip(&mut stream, b"x").await.unwrap();
    proxy.black_hole(true);
    stream.write_all(b"lost?").await.unwrap();
    assert!(silent(&mut stream).await);
    let mut late = TcpStream::connect(proxy.address()).await.unwrap();
    late.write_all(b"y").await.unwrap();
    assert!(silent(&mut late).await);
    proxy.black_hole(false);
    let mut back = [0; 5];
    stream.read_exact(&mut back).await.unwrap();
    assert_eq!(&back, b"lost?");
    assert_eq!(late.read_u8().await.unwrap(), b'y');
}

#[tokio::test]
async fn delays_without_throttling_and_throttles() {
    let proxy = Proxy::start(echo(b"").await).await;
    let mut stream = TcpStream::connect(proxy.address()).await.unwrap();
    proxy.delay(Duration::from_millis(50));
    let start = Instant::now();
    round_trip(&mut stream, &[1; 100_000]).await.unwrap();
    let took = start.elapsed();
    assert!(took >= Duration::from_millis(100), "{took:?}");
    assert!(took < Duration::from_millis(500), "{took:?}");
    proxy.delay(Duration::ZERO);
    proxy.throttle(Some(10_000));
    let start = Instant::now();
    round_trip(&mut stream, &[1; 3_000]).await.unwrap();
    assert!(
        start.elapsed() >= Duration::from_millis(250),
        "{:?}",
        start.elapsed()
    );
}

#[tokio::test]
async fn leads_elsewhere() {
    let proxy = Proxy::start(echo(b"a").await).await;
    let mut first = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(first.read_u8().await.unwrap(), b'a');
    proxy.retarget(echo(b"b").await);
    let mut second = TcpStream::connect(proxy.address()).await.unwrap();
    assert_eq!(second.read_u8().await.unwrap(), b'b');
    round_trip(&mut first, b"stays").await.unwrap();
}
