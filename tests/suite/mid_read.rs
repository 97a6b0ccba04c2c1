//! A reader killed in mid-read, over both transports, on both QEMUs, with and without I/O threads: QEMU lives on, the export
//! serves the next reader with the bytes of the instant, and can be deleted.

#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::common::*;
use crate::vhost_fixture::*;
use futures_util::StreamExt;
use livebackup::block::BlockSource;
use livebackup::extent::Extent;
use livebackup::nbd::{Address, NbdSource};
use livebackup::vhost::{VhostSource, wait_until_free};
use serde_json::json;

/// A multiple of 512 but not of a granule.
const SIZE: u64 = 24 * MIB + 37 * 512;
const ROUNDS: u64 = 4;
/// As a backup has.
const CONNECTIONS: usize = 2;
/// What the reader's process is told: transport, socket, size and QEMU's version.
const CHILD: &str = "LIVEBACKUP_TEST_READER";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Transport {
    Vhost,
    Nbd,
}

impl Transport {
    /// A QEMU with a snapshot that is exported so, and the export's socket.
    fn open(self, version: Version, device: Device) -> (Fleece, std::path::PathBuf) {
        let mut fleece = Fleece::without_export(version, device, SIZE);
        let socket = match self {
            Transport::Vhost => fleece.socket(),
            Transport::Nbd => {
                fleece.qemu.nbd_server();
                fleece.qemu.path("nbd")
            }
        };
        self.export(&mut fleece);
        (fleece, socket)
    }

    fn export(self, fleece: &mut Fleece) {
        match self {
            Transport::Vhost => {
                let socket = fleece.socket();
                fleece.export(json!({"type": "unix", "path": socket}));
            }
            Transport::Nbd => {
                let export = json!({"id": "e0", "type": "nbd", "node-name": "snap", "name": "snap", "writable": true});
                fleece.qemu.qmp("block-export-add", export);
            }
        }
    }

    /// Connects in its own way, and does something with the source.
    fn with<T>(self, socket: &Path, version: Version, work: impl AsyncFnOnce(&dyn BlockSource) -> T) -> T {
        let rules = rules(version);
        match self {
            Transport::Vhost => {
                let source = VhostSource::connect(socket, SIZE, rules).unwrap();
                block_on(async {
                    let done = work(&source).await;
                    source.close().await.unwrap();
                    done
                })
            }
            Transport::Nbd => block_on(async {
                let address = Address::Unix(socket.to_owned());
                let source = crate::nbd_help::source(&address, "snap", CONNECTIONS, rules.boundary_bytes).await;
                let done = work(&source).await;
                NbdSource::close(source).await;
                done
            }),
        }
    }
}

/// The part of the process that is killed. It compares nothing: it must be in the midst of reads at all times.
fn read_for_ever(told: &str) {
    let told: Vec<_> = told.splitn(3, ' ').collect();
    let transport = if told[0] == "Nbd" { Transport::Nbd } else { Transport::Vhost };
    let version = if told[1] == "V7" { Version::V7 } else { Version::V10 };
    transport.with(Path::new(told[2]), version, async |source| {
        let extents = (0..).map(|i: u64| Extent::new(i * 64 * KIB % (SIZE / MIB * MIB), 64 * KIB + i % 9 * 512));
        let mut reads = futures_util::stream::iter(extents.map(|extent| source.read(extent))).buffered(64);
        let mut count = 0_u64;
        while let Some(got) = reads.next().await {
            got.unwrap();
            count += 1;
            if count == 50 {
                eprintln!("reading");
            }
        }
    });
}

/// Starts this program again as a reader, and waits until it reads.
fn reader(test: &str, transport: Transport, version: Version, socket: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("mid_read::{test}"), "--nocapture"]);
    command.env(CHILD, format!("{transport:?} {version:?} {}", socket.display()));
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut said = vec![];
    let reads = lines.by_ref().map_while(Result::ok).any(|line| {
        said.push(line);
        said.last().is_some_and(|line| line == "reading")
    });
    assert!(reads, "the reader ended early: {said:?}");
    child
}

fn killed_in_mid_read(test: &str, transport: Transport) {
    if let Ok(told) = std::env::var(CHILD) {
        return read_for_ever(&told);
    }
    let mut rng = Rng::new();
    for (version, device) in VERSIONS.into_iter().flat_map(|v| DEVICES.map(|d| (v, d))) {
        // QEMU 7.2 aborts when such a reader goes away; no backup reads so there.
        if (transport, version) == (Transport::Nbd, Version::V7) && device != Device::Blk {
            continue;
        }
        println!("{transport:?} {version:?} {device:?}");
        let (mut fleece, socket) = transport.open(version, device);
        for round in 0..ROUNDS {
            let mut child = reader(test, transport, version, &socket);
            std::thread::sleep(Duration::from_micros(rng.below(20_000)));
            child.kill().unwrap();
            child.wait().unwrap();
            fleece.write_somewhere(&mut rng);
            assert!(fleece.qemu.alive());
            if round % 2 == 0 {
                transport.with(&socket, version, async |source| {
                    assert_eq!(source.size_bytes(), SIZE);
                    expect_whole(source, &fleece.bytes, MIB).await;
                });
                continue;
            }
            // Even now the export can be deleted, in any QEMU.
            if transport == Transport::Vhost {
                wait_until_free(&socket, Duration::from_secs(10)).unwrap();
            }
            fleece.qemu.qmp("block-export-del", json!({"id": "e0", "mode": "hard"}));
            let qemu = &mut fleece.qemu;
            wait_until("the export to go", || qemu.exports().is_empty());
            transport.export(&mut fleece);
        }
        transport.with(&socket, version, async |source| expect_whole(source, &fleece.bytes, 64 * KIB).await);
        fleece.take_down();
    }
}

#[test]
fn a_reader_killed_in_mid_read_leaves_qemu_alive_and_the_export_usable_over_vhost() {
    let me = "a_reader_killed_in_mid_read_leaves_qemu_alive_and_the_export_usable_over_vhost";
    killed_in_mid_read(me, Transport::Vhost);
}

#[test]
fn a_reader_killed_in_mid_read_leaves_qemu_alive_and_the_export_usable_over_nbd() {
    let me = "a_reader_killed_in_mid_read_leaves_qemu_alive_and_the_export_usable_over_nbd";
    killed_in_mid_read(me, Transport::Nbd);
}
