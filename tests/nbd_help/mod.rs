//! What the NBD tests share: servers of others, QEMU's exports, and a server that says what the test wants. The wire
//! is built here by hand, not by the code under test.

#![allow(dead_code, clippy::unwrap_used)]

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use livebackup::block::SourceRules;
use livebackup::extent::Extent;
use livebackup::nbd::{Address, Client, ConnectOptions, NbdSource, SourceOptions, Wanted, connect};
use serde_json::json;

use crate::common::*;

pub const K64: u64 = 65536;
pub const MIB: u64 = 1 << 20;

/// A server process on a unix socket in its own directory; killed when dropped.
pub struct Server {
    pub dir: tempfile::TempDir,
    pub child: Child,
}

impl Server {
    /// Starts `command` with `DIR` replaced in its arguments; it must make `DIR/sock`, a socket
    /// or a file.
    pub fn start(dir: tempfile::TempDir, program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Server {
        let at = dir.path().to_str().unwrap();
        let mut command = Command::new(program.as_ref());
        command.args(args.iter().map(|a| a.replace("DIR", at))).stdin(Stdio::null());
        let child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}; run tests/setup.sh, install nbdkit"));
        let server = Server { dir, child };
        // A socket is there a moment before it listens; a file with the process's id is written after that.
        let listens = |sock: PathBuf| sock.is_file() || UnixStream::connect(sock).is_ok();
        wait_until("the server to listen", || listens(server.path("sock")));
        server
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn address(&self) -> Address {
        Address::Unix(self.path("sock"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn tempdir() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("livebackup-nbd-").tempdir().unwrap()
}

/// `nbdkit` in the foreground on `DIR/sock`.
pub fn nbdkit(dir: tempfile::TempDir, args: &[&str]) -> Server {
    Server::start(dir, "nbdkit", &[&["-f", "--exit-with-parent", "-U", "DIR/sock"], args].concat())
}

/// `qemu-nbd` of a version, for up to 8 clients, read-only.
pub fn qemu_nbd(version: Version, dir: tempfile::TempDir, args: &[&str]) -> Server {
    Server::start(dir, version.program("qemu-nbd"), &[&["-t", "-r", "-e", "8", "-k", "DIR/sock"], args].concat())
}

pub fn wanted(export: &str, contexts: &[&str]) -> Wanted {
    Wanted { export: export.into(), contexts: contexts.iter().map(|c| c.to_string()).collect() }
}

pub async fn client(address: &Address, export: &str, contexts: &[&str]) -> Client {
    connect(address, &wanted(export, contexts), &ConnectOptions::default()).await.unwrap()
}

pub fn source_options(address: &Address, export: &str, connections: usize, boundary_bytes: u64) -> SourceOptions {
    let connect = ConnectOptions { handshake: Duration::from_secs(5), ..ConnectOptions::default() };
    let rules = SourceRules { boundary_bytes, in_flight_bytes: 16 * MIB };
    SourceOptions { address: address.clone(), export: export.into(), connections, rules, request_bytes: None, connect }
}

pub async fn source(address: &Address, export: &str, connections: usize, boundary_bytes: u64) -> NbdSource {
    NbdSource::open(&source_options(address, export, connections, boundary_bytes)).await.unwrap()
}

/// Reads everything with `deep` reads of `step` under way.
pub async fn read_all(source: &NbdSource, step: u64, deep: usize) -> Result<Vec<u8>, livebackup::block::SourceError> {
    use futures_util::{StreamExt, TryStreamExt, stream};
    use livebackup::block::BlockSource;
    let size = source.size_bytes();
    let pieces = (0..size).step_by(step as usize).map(|at| Extent::between(at, (at + step).min(size)));
    let mut all = Vec::with_capacity(size as usize);
    let mut reads = stream::iter(pieces).map(|e| source.read(e)).buffered(deep);
    while let Some(bytes) = reads.try_next().await? {
        all.extend_from_slice(&bytes);
    }
    Ok(all)
}

/// Everything that a context says about the disk, as (start, end, flags).
pub async fn status(client: &Client, context: &str) -> Vec<(u64, u64, u32)> {
    let mut found = vec![];
    let all = Extent::new(0, client.export().size_bytes);
    client.block_status_all(context, all, |e, flags| found.push((e.offset_bytes, e.end(), flags))).await.unwrap();
    found
}

/// Panics with the first difference, not with megabytes.
pub fn assert_same(got: &[u8], expected: &[u8]) {
    assert_eq!(got.len(), expected.len(), "the lengths differ");
    if let Some(at) = got.iter().zip(expected).position(|(a, b)| a != b) {
        panic!("byte {at} is {:#04x}, not {:#04x}", got[at], expected[at]);
    }
}

/// A sparse image: of every MiB the parts that `rng` chooses hold data.
pub fn make_image(path: &Path, size: u64, rng: &mut Rng) -> Vec<u8> {
    use std::os::unix::fs::FileExt;
    let mut bytes = vec![0; size as usize];
    let file = std::fs::File::create(path).unwrap();
    file.set_len(size).unwrap();
    for _ in 0..(size / (256 << 10)).max(1) {
        let start = rng.below(size) / 512 * 512;
        let end = (start + 512 + rng.below(200 << 10)).min(size);
        rng.fill(&mut bytes[start as usize..end as usize]);
        file.write_all_at(&bytes[start as usize..end as usize], start).unwrap();
    }
    bytes
}

impl Qemu {
    /// Starts QEMU's NBD server on `nbd` in the VM's directory.
    pub fn nbd_server(&mut self) -> Address {
        let path = self.path("nbd");
        self.qmp("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": path}}}));
        Address::Unix(path)
    }

    /// A helper null-co node `name` of `size` with bitmap `h`.
    pub fn helper(&mut self, name: &str, size: u64, disabled: bool) {
        let node = json!({"driver": "null-co", "node-name": name, "size": size, "read-zeroes": true});
        self.qmp("blockdev-add", node);
        let bitmap = json!({"node": name, "name": "h", "granularity": K64, "disabled": disabled});
        self.qmp("block-dirty-bitmap-add", bitmap);
    }

    /// Copy-before-write over `disk0` into the disk `vd0`, and the snapshot of it exported as `snap`, writable.
    pub fn fleece(&mut self) {
        std::fs::File::create(self.path("scratch")).unwrap().set_len(1 << 30).unwrap();
        let scratch = self.path("scratch");
        self.qmp(
            "blockdev-add",
            json!({"driver": "file", "filename": scratch, "node-name": "scr", "discard": "unmap"}),
        );
        let cbw = json!({"driver": "copy-before-write", "node-name": "cbw", "file": "disk0", "target": "scr",
            "on-cbw-error": "break-snapshot", "cbw-timeout": 4, "discard": "unmap"});
        self.qmp("blockdev-add", cbw);
        let path = "/machine/peripheral/vd0/virtio-backend";
        self.qmp("qom-set", json!({"path": path, "property": "drive", "value": "cbw"}));
        let snap = json!({"driver": "snapshot-access", "node-name": "snap", "file": "cbw", "discard": "unmap"});
        self.qmp("blockdev-add", snap);
        self.export("snap", "snap", true);
    }

    /// Exports `node` as `name`.
    pub fn export(&mut self, node: &str, name: &str, writable: bool) {
        let id = format!("e-{name}");
        let export = json!({"id": id, "type": "nbd", "node-name": node, "name": name, "writable": writable});
        self.qmp("block-export-add", export);
    }

    /// Dirty bytes of a bitmap as QEMU counts them.
    pub fn dirty_bytes(&mut self, node: &str, bitmap: &str) -> u64 {
        let nodes = self.qmp("query-named-block-nodes", json!({"flat": true}));
        let node = nodes.as_array().unwrap().iter().find(|n| n["node-name"] == node).unwrap();
        let bitmaps = node["dirty-bitmaps"].as_array().unwrap();
        bitmaps.iter().find(|b| b["name"] == bitmap).unwrap()["count"].as_u64().unwrap()
    }
}

/// The wire, by hand.
pub mod say {
    pub const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\0\x03";

    pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
        let mut out = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend(data);
        out
    }

    /// A whole negotiation: structured replies or not, contexts (with ids from 1), size, flags.
    pub fn negotiation(structured: bool, contexts: &[&str], size: u64, flags: u16) -> Vec<u8> {
        let mut out = GREETING.to_vec();
        out.extend(option_reply(8, if structured { 1 } else { (1 << 31) + 1 }, b""));
        for (i, name) in contexts.iter().enumerate() {
            let data = [&(i as u32 + 1).to_be_bytes(), name.as_bytes()].concat();
            out.extend(option_reply(10, 4, &data));
        }
        if !contexts.is_empty() {
            out.extend(option_reply(10, 1, b""));
        }
        let mut info = vec![0, 0];
        info.extend(size.to_be_bytes());
        info.extend(flags.to_be_bytes());
        out.extend(option_reply(7, 3, &info));
        let mut info = vec![0, 3];
        [1u32, 4096, 32 << 20].iter().for_each(|n| info.extend(n.to_be_bytes()));
        out.extend(option_reply(7, 3, &info));
        out.extend(option_reply(7, 1, b""));
        out
    }

    pub fn simple(cookie: u64, error: u32, data: &[u8]) -> Vec<u8> {
        let mut out = 0x6744_6698_u32.to_be_bytes().to_vec();
        out.extend(error.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(data);
        out
    }

    pub fn chunk(done: bool, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
        let mut out = 0x668e_33ef_u32.to_be_bytes().to_vec();
        out.extend(u16::from(done).to_be_bytes());
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend((payload.len() as u32).to_be_bytes());
        out.extend(payload);
        out
    }

    pub fn data(done: bool, cookie: u64, offset: u64, bytes: &[u8]) -> Vec<u8> {
        chunk(done, 1, cookie, &[&offset.to_be_bytes(), bytes].concat())
    }

    pub fn hole(done: bool, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        chunk(done, 2, cookie, &[&offset.to_be_bytes()[..], &len.to_be_bytes()].concat())
    }

    pub fn status(done: bool, cookie: u64, context: u32, descriptors: &[(u32, u32)]) -> Vec<u8> {
        let mut payload = context.to_be_bytes().to_vec();
        for (len, flags) in descriptors {
            payload.extend(len.to_be_bytes());
            payload.extend(flags.to_be_bytes());
        }
        chunk(done, 5, cookie, &payload)
    }

    pub fn error(done: bool, cookie: u64, errno: u32, message: &str, offset: Option<u64>) -> Vec<u8> {
        let mut payload = errno.to_be_bytes().to_vec();
        payload.extend((message.len() as u16).to_be_bytes());
        payload.extend(message.as_bytes());
        offset.iter().for_each(|o| payload.extend(o.to_be_bytes()));
        chunk(done, 0x8001 + u16::from(offset.is_some()), cookie, &payload)
    }
}
