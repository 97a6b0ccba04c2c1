//! The hello is frozen: these bytes and no others, for all versions to come.

#![allow(clippy::unwrap_used)]

use std::time::Duration;

use livebackup::wire::Stream;
use livebackup::wire::hello::{self, HelloError, Version};
use livebackup::wire::message::{Failure, FailureCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

const OFFER: &[u8] = b"LIVEBACKUP\r\n\x00\x1a\n\xff\x01\x00\x01\x00";
const LIMIT: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(50);

fn answer_bytes() -> Vec<u8> {
    let software = concat!("livebackup ", env!("CARGO_PKG_VERSION")).as_bytes();
    [b"LIVEBACKUP\r\n\x00\x1a\n\xff\x01\x00\x01\x00\x01\x00", &[software.len() as u8][..], software].concat()
}

/// What a server makes of a client that sends `bytes` and then closes or waits; and what the client gets to read.
async fn to_server(bytes: &[u8], then_close: bool) -> (Result<Version, HelloError>, Vec<u8>) {
    let (mut near, far) = tokio::io::duplex(4096);
    near.write_all(bytes).await.unwrap();
    if then_close {
        near.shutdown().await.unwrap();
    }
    let mut stream = Stream::new(far, "peer");
    let outcome = hello::answer(&mut stream, if then_close { LIMIT } else { SHORT }).await;
    drop(stream);
    let mut said = Vec::new();
    near.read_to_end(&mut said).await.unwrap();
    (outcome, said)
}

/// What a client makes of a server that answers `bytes` and then closes or waits.
async fn to_client(bytes: &[u8], then_close: bool) -> (Result<hello::Welcome, HelloError>, Vec<u8>) {
    let (mut near, far) = tokio::io::duplex(4096);
    near.write_all(bytes).await.unwrap();
    if then_close {
        near.shutdown().await.unwrap();
    }
    let mut stream = Stream::new(far, "peer");
    let outcome = hello::offer(&mut stream, if then_close { LIMIT } else { SHORT }).await;
    drop(stream);
    let mut said = Vec::new();
    near.read_to_end(&mut said).await.unwrap();
    (outcome, said)
}

#[tokio::test]
async fn both_ends_say_exactly_this() {
    let (outcome, said) = to_server(OFFER, true).await;
    assert_eq!((outcome.unwrap(), said), (Version::V1, answer_bytes()));
    let (outcome, said) = to_client(&answer_bytes(), true).await;
    assert_eq!(said, OFFER);
    assert_eq!(outcome.unwrap().software, concat!("livebackup ", env!("CARGO_PKG_VERSION")));
}

#[tokio::test]
async fn a_peer_that_knows_more_is_met_at_what_is_common() {
    let (outcome, _) = to_server(b"LIVEBACKUP\r\n\x00\x1a\n\xff\x03\x00\x07\x00\x01\x00\x02\x00", true).await;
    assert_eq!(outcome.unwrap(), Version::V1);
    let newer = b"LIVEBACKUP\r\n\x00\x1a\n\xff\x01\x00\x02\x00\x07\x00\x01\x00\x03new";
    assert_eq!(to_client(newer, true).await.0.unwrap().version, Version::V1);
}

#[tokio::test]
async fn a_newer_only_peer_is_told_and_named() {
    let (outcome, said) = to_server(b"LIVEBACKUP\r\n\x00\x1a\n\xff\x01\x00\x07\x00", true).await;
    assert!(matches!(outcome, Err(HelloError::NoCommonVersion { theirs, .. }) if theirs == [7]));
    assert_eq!(said[16..22], [0, 0, 1, 0, 1, 0], "none chosen, and the list of what is known");
    let newer = b"LIVEBACKUP\r\n\x00\x1a\n\xff\x00\x00\x02\x00\x07\x00\x08\x00\x0elivebackup 9.0";
    let error = to_client(newer, true).await.0.unwrap_err();
    assert!(error.to_string().contains("livebackup 9.0") && error.to_string().contains("[7, 8]"), "{error}");
    assert_eq!(Failure::from(error).code, FailureCode::Protocol);
}

#[tokio::test]
async fn strangers_are_recognised() {
    for (bytes, words) in [
        (&b"GET / HTTP/1.1\r\n\r\n"[..], "HTTP client"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01", "TLS client"),
        (b"\x00\x01\x02garbage", "it sent"),
        (b"LIVEBACKUP\n\x00", "it sent"),
    ] {
        let (outcome, said) = to_server(bytes, false).await;
        let error = outcome.unwrap_err();
        assert!(matches!(error, HelloError::Stranger { .. }) && error.to_string().contains(words), "{error}");
        assert!(said.is_empty(), "nothing is said to a stranger");
    }
    for (bytes, words) in [
        (&b"HTTP/1.1 400 Bad Request\r\n"[..], "HTTP server"),
        (b"NBDMAGICIHAVEOPT", "NBD server"),
        (b"{\"QMP\": {\"version\"", "use qmp:"),
    ] {
        let error = to_client(bytes, true).await.0.unwrap_err();
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[tokio::test]
async fn silence_and_closing_at_every_byte_are_errors() {
    for len in 0..OFFER.len() {
        assert!(matches!(to_server(&OFFER[..len], true).await.0, Err(HelloError::Closed { .. })), "{len}");
    }
    for len in 0..answer_bytes().len() {
        assert!(matches!(to_client(&answer_bytes()[..len], true).await.0, Err(HelloError::Closed { .. })), "{len}");
    }
    assert!(matches!(to_server(&OFFER[..17], false).await.0, Err(HelloError::Silent { .. })));
    assert!(matches!(to_client(b"", false).await.0, Err(HelloError::Silent { .. })));
}

#[tokio::test]
async fn lists_and_names_are_bounded() {
    for count in [[0, 0], [17, 0], [255, 255]] {
        let offer = [&hello::MAGIC[..], &count, &[1; 64]].concat();
        assert!(matches!(to_server(&offer, true).await.0, Err(HelloError::Malformed { .. })));
        let answer = [&hello::MAGIC[..], &[1, 0], &count, &[1; 64]].concat();
        assert!(matches!(to_client(&answer, true).await.0, Err(HelloError::Malformed { .. })));
    }
    let long = [&hello::MAGIC[..], &[1, 0, 1, 0, 1, 0, 65], &[b'x'; 65]].concat();
    assert!(matches!(to_client(&long, true).await.0, Err(HelloError::Malformed { .. })));
    let foreign = [&hello::MAGIC[..], &[9, 0, 1, 0, 9, 0, 1, b'x']].concat();
    assert!(matches!(to_client(&foreign, true).await.0, Err(HelloError::Malformed { .. })));
    let rude = [&hello::MAGIC[..], &[1, 0, 1, 0, 1, 0, 3], b"a\x1bb"].concat();
    assert_eq!(to_client(&rude, true).await.0.unwrap().software, "a?b");
}
