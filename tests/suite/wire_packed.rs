//! Compression on the wire: what a server compresses is stored as it came and restores to the test's own bytes, peers that
//! know nothing of it go on as before, and a server that lies about what it packed has made no restore point.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::repo_common::pattern;
use crate::wire_begun::begun;
use bytes::Bytes;
use livebackup::backup::{self, BackupError, BackupOptions, Report, Sidecar};
use livebackup::codec::{Codec, Packed, Packer, Piece};
use livebackup::machine::{FoundDisk, Machine, Verdict};
use livebackup::repo::packfile::read_directory;
use livebackup::repo::{Compression, Digest, ReadOptions, Repository};
use livebackup::units::{KIB, MIB};
use livebackup::wire::message::*;
use livebackup::wire::packing::{How, Packing, Wanted};
use livebackup::wire::{Answer, Client, Common, Stream, Timing, serve_with};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

const CHUNK: usize = 64 * KIB as usize;
/// The last chunk is short.
const SIZE: usize = 6 * MIB as usize + 3 * CHUNK + 512;

/// A disk of which a third compresses by half, a third very well, and the rest not at all; some of it twice, some zero.
fn disk() -> Vec<u8> {
    let mut state = 9u64;
    let mut noise = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    };
    let chunks = (0..SIZE.div_ceil(CHUNK)).map(|n| match n % 7 {
        0 | 1 => pattern(n as u64, CHUNK),
        2 | 3 => vec![n as u8; CHUNK],
        4 => vec![0; CHUNK],
        5 => pattern(1, CHUNK),
        _ => (0..CHUNK).map(|_| noise()).collect(),
    });
    let mut bytes = chunks.collect::<Vec<_>>().concat();
    bytes.truncate(SIZE);
    bytes
}

/// The events of a whole disk, as a sidecar sends them.
fn honest(disk: &[u8]) -> Vec<Event> {
    let event = |(n, bytes): (usize, &[u8])| Event::Data {
        disk: 0,
        offset_bytes: n as u64 * MIB,
        bytes: Bytes::copy_from_slice(bytes),
    };
    disk.chunks(MIB as usize).enumerate().map(event).collect()
}

fn session(events: Vec<Event>) -> Session {
    let begun = begun(&[SIZE as u64]);
    let (to_client, queue) = mpsc::channel(2);
    let (acks, mut acked) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        for event in events.into_iter().chain([Event::Sent, Event::End(Totals::default())]) {
            if to_client.send(Ok(event)).await.is_err() {
                return;
            }
        }
        while acked.recv().await.is_some() {}
    });
    Session { begun, events: queue, acks, digests: None, lasting: None }
}

/// A client of a server that sends these events, over TCP.
async fn served(events: Vec<Event>, packing: Packing) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let events = Arc::new(events);
    tokio::spawn(async move {
        while let Ok((socket, _)) = listener.accept().await {
            let events = events.clone();
            let handler = move |request| {
                let events = (*events).clone();
                async move {
                    match request {
                        Request::Disks { .. } => Ok(Answer::Reply(Reply::Disks {
                            machine: Machine::default(),
                            disks: vec![FoundDisk {
                                disk: begun(&[SIZE as u64]).disks.remove(0).disk,
                                verdict: Verdict::Protectable,
                            }],
                        })),
                        Request::Begin(_) => Ok(Answer::Session(session(events))),
                        other => panic!("{other:?}"),
                    }
                }
            };
            let common = Common { packing: packing.clone(), ..Common::default() };
            tokio::spawn(serve_with(Stream::tcp(socket).unwrap(), Timing::default(), common, handler));
        }
    });
    let stream = Stream::tcp(TcpStream::connect(address).await.unwrap()).unwrap();
    Client::over(stream, Timing { alive_every: Duration::from_millis(20), ..Timing::default() }).await.unwrap()
}

async fn backed_up(repo: &Repository, client: Client, options: BackupOptions) -> Result<Report, BackupError> {
    let (_stop, interrupted) = watch::channel(false);
    backup::run(Sidecar::Remote(Box::new(client), "vm".into()), repo.clone(), options, |_| {}, interrupted).await
}

fn repository() -> (tempfile::TempDir, Repository) {
    let dir = tempfile::tempdir().unwrap();
    let repo = Repository::init(dir.path(), CHUNK as u32).unwrap();
    (dir, repo)
}

fn image(repo: &Repository) -> Vec<u8> {
    let point = repo.points("vm").unwrap().points.pop().unwrap();
    let image = std::sync::Mutex::new(vec![0; SIZE]);
    let sink = |offset: u64, bytes: &[u8]| {
        image.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        Ok::<_, livebackup::repo::RepoError>(())
    };
    repo.reader().unwrap().read_image(point.disks[0].image, &ReadOptions::default(), sink).unwrap();
    image.into_inner().unwrap()
}

/// All chunks as they lie in the packs.
fn stored(repo: &std::path::Path) -> BTreeMap<Digest, (Codec, Vec<u8>)> {
    let mut chunks = BTreeMap::new();
    for dir in std::fs::read_dir(repo.join("packs")).unwrap() {
        for pack in std::fs::read_dir(dir.unwrap().path()).unwrap() {
            let path = pack.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            for blob in read_directory(&path).unwrap().1 {
                let at = blob.placed.offset_bytes as usize;
                let stored = bytes[at..at + blob.placed.stored_len as usize].to_vec();
                chunks.insert(blob.digest, (blob.placed.codec, stored));
            }
        }
    }
    chunks
}

fn options(how: Option<How>, compression: Compression) -> BackupOptions {
    BackupOptions { wire_compression: how, compression, ..BackupOptions::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_compressed_for_the_wire_is_stored_as_it_came() {
    let disk = disk();
    let zstd = Compression::Zstd(3);
    let (plain_dir, plain) = repository();
    let report = backed_up(&plain, served(honest(&disk), Packing::default()).await, options(Some(How::None), zstd));
    assert_eq!(report.await.unwrap().wire_bytes, Some(SIZE as u64));
    let expected = stored(plain_dir.path());

    // By the client's wish, or the server's.
    for (how, default) in [(Some(How::Zstd), How::None), (None, How::Zstd)] {
        let (dir, repo) = repository();
        let report = backed_up(&repo, served(honest(&disk), Packing::new(default, 2)).await, options(how, zstd)).await;
        let report = report.unwrap();
        assert!(image(&repo) == disk);
        assert!(stored(dir.path()) == expected, "the same bytes as if the repository had compressed them");
        let wire_bytes = report.wire_bytes.unwrap();
        assert!(wire_bytes < SIZE as u64 / 2, "{wire_bytes}");
        assert!(wire_bytes >= report.stored_bytes - 20_000, "{wire_bytes} {}", report.stored_bytes);
    }

    // lz4 goes over the wire, and zstd into the repository.
    let (dir, repo) = repository();
    let report = backed_up(&repo, served(honest(&disk), Packing::default()).await, options(Some(How::Lz4), zstd)).await;
    assert!(report.unwrap().wire_bytes.unwrap() < SIZE as u64 * 2 / 3);
    assert!(image(&repo) == disk && stored(dir.path()) == expected);

    // A repository that is to hold chunks as they are does so.
    for how in [How::Zstd, How::Lz4] {
        let (dir, repo) = repository();
        let client = served(honest(&disk), Packing::default()).await;
        backed_up(&repo, client, options(Some(how), Compression::None)).await.unwrap();
        assert!(image(&repo) == disk);
        let chunks = disk.chunks(CHUNK).filter(|chunk| chunk.iter().any(|byte| *byte != 0));
        for chunk in chunks {
            assert!(stored(dir.path())[&Digest::of(chunk)] == (Codec::Raw, chunk.to_vec()));
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_ask_gets_data_as_ever() {
    let disk = disk();
    let begin = Begin { vm: "vm".into(), chunk_bytes: CHUNK as u32, ..Begin::default() };
    assert!(
        !serde_json::to_string(&begin).unwrap().contains("compression"),
        "nothing that an older server has not seen"
    );
    let mut session = served(honest(&disk), Packing::new(How::Zstd, 1)).await.begin(begin.clone()).await.unwrap();
    for event in honest(&disk) {
        assert_eq!(session.events.recv().await.unwrap().unwrap(), event);
    }
    // And one that asks for what this server does not know, as the server likes it.
    let text =
        r#"{"vm":"vm","chunk_bytes":65536,"checkpoint":true,"compression":{"how":"brotli","level":99,"more":1}}"#;
    let begin: Begin = serde_json::from_str(text).unwrap();
    assert_eq!(begin.compression, Some(Wanted { how: Some(How::Other), level: 99 }));
    let mut session = served(honest(&disk), Packing::new(How::Zstd, 1)).await.begin(begin).await.unwrap();
    assert!(matches!(session.events.recv().await.unwrap().unwrap(), Event::Packed { .. }));
}

/// The first mebibyte packed, and its chunks.
fn packed(disk: &[u8]) -> (Vec<Piece>, Vec<u8>) {
    let mut into = vec![0; MIB as usize];
    let (pieces, used) =
        Packer::new(1).unwrap().pack_all(Codec::Zstd, &disk[..MIB as usize], CHUNK, &mut into).unwrap();
    (pieces, into[..used].to_vec())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lies_about_what_it_packed_makes_no_point() {
    let disk = disk();
    let (pieces, bytes) = packed(&disk);
    let of = |raw_len: usize, pieces: &[Piece], bytes: &[u8]| Event::Packed {
        disk: 0,
        offset_bytes: 0,
        packed: Packed::new(raw_len as u32, pieces.to_vec(), bytes.to_vec().into()).unwrap(),
    };
    let begin = {
        let compression = Some(Wanted { how: Some(How::None), level: 1 });
        Begin { vm: "vm".into(), chunk_bytes: CHUNK as u32, compression, ..Begin::default() }
    };
    // What does not fit its frame is refused by it.
    let mut too_few = pieces.clone();
    let last = too_few.pop().unwrap();
    let less = &bytes[..bytes.len() - last.len as usize];
    let raw = Piece { len: 5, codec: Codec::Raw };
    for event in
        [of(MIB as usize, &too_few, less), of(MIB as usize - CHUNK, &pieces, &bytes), of(CHUNK, &[raw], b"short")]
    {
        let mut session = served(vec![event], Packing::default()).await.begin(begin.clone()).await.unwrap();
        let failure = session.events.recv().await.unwrap().unwrap_err();
        assert_eq!(failure.code, FailureCode::Protocol);
        assert!(failure.message.contains("not in chunks of 65536"), "{failure}");
    }
    let unasked = Begin { compression: None, ..begin };
    let mut session =
        served(vec![of(MIB as usize, &pieces, &bytes)], Packing::default()).await.begin(unasked).await.unwrap();
    let failure = session.events.recv().await.unwrap().unwrap_err();
    assert!(failure.message.contains("which nobody asked for") && failure.code == FailureCode::Protocol, "{failure}");

    // What fits, and is not what it is said to be, is found when it is unpacked.
    let one = |codec, bytes: &[u8]| of(CHUNK, &[Piece { len: bytes.len() as u32, codec }], bytes);
    let bomb = zstd::bulk::compress(&vec![0; 1 << 30], 1).unwrap();
    assert!(bomb.len() < CHUNK);
    let short = zstd::bulk::compress(&disk[..CHUNK - 1], 1).unwrap();
    let twice =
        [zstd::bulk::compress(&disk[..CHUNK / 2], 1).unwrap(), zstd::bulk::compress(&disk[..CHUNK / 2], 1).unwrap()];
    let mut torn = bytes[..pieces[0].len as usize].to_vec();
    torn.truncate(torn.len() / 2);
    let lies = [
        (one(Codec::Zstd, &bomb), "does not say that it holds 65536 bytes"),
        (one(Codec::Zstd, &short), "does not say that it holds 65536 bytes"),
        (one(Codec::Zstd, &twice.concat()), "does not say that it holds 65536 bytes"),
        (one(Codec::Zstd, &torn), "is not one whole zstd frame"),
        (one(Codec::Zstd, b"no frame at all"), "is no zstd frame"),
        (one(Codec::Lz4, b"\x1fno block"), "does not decompress"),
        (one(Codec::Lz4, &lz4_flex::block::compress(&disk[..CHUNK - 1])), "holds 65535 bytes, not 65536"),
        (one(Codec::Lz4, &lz4_flex::block::compress(&vec![0; 1 << 20])), "does not decompress"),
    ];
    for (lie, words) in lies {
        let (_dir, repo) = repository();
        let rest = honest(&disk).split_off(1);
        let client = served([vec![lie], rest].concat(), Packing::default()).await;
        let error = backed_up(&repo, client, options(Some(How::Zstd), Compression::Zstd(1))).await.unwrap_err();
        let BackupError::Sidecar(failure) = error else { panic!("{error}") };
        assert_eq!(failure.code, FailureCode::Protocol);
        assert!(failure.message.contains(words), "{failure}");
        assert!(
            failure.message.contains("the server sent") && failure.message.contains("no restore point"),
            "{failure}"
        );
        assert!(repo.points("vm").unwrap().points.is_empty());
    }
    // Other content is content: nobody else knows what the disk held. It is what is restored.
    let (_dir, repo) = repository();
    let mut other = disk.clone();
    other[..CHUNK].fill(0x77);
    let first = zstd::bulk::compress(&other[..CHUNK], 1).unwrap();
    let rest = Event::Data { disk: 0, offset_bytes: CHUNK as u64, bytes: other[CHUNK..MIB as usize].to_vec().into() };
    let events = [vec![one(Codec::Zstd, &first), rest], honest(&other).split_off(1)].concat();
    let client = served(events, Packing::default()).await;
    backed_up(&repo, client, options(Some(How::Zstd), Compression::Zstd(1))).await.unwrap();
    assert!(image(&repo) == other);
}
