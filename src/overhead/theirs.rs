//! What others do with QEMU's own means.
//!
//! Each function leaves QEMU as it found it, unless it fails: then the machine is thrown away.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use serde_json::{Value, json};
use tokio::sync::broadcast;
use tokio::time::timeout_at;

use super::error::{OverheadError, path};
use super::method::{Bench, Outcome, keep_pace};
use super::rig::NODE;
use crate::block::{BlockSource, SourceRules};
use crate::extent::Extent;
use crate::limits::MAX_READ_BYTES;
use crate::monitor::{Event, Monitor, MonitorError};
use crate::nbd::{self, NbdSource, SourceOptions};
use crate::units::{KIB, MIB};

/// A slow target's rate.
pub const SLOW_BYTES_PER_SECOND: u64 = 20 * MIB;
/// As nbdcopy asks.
const REQUEST_BYTES: u64 = 256 * KIB;
const CONNECTIONS: usize = 4;
const IN_FLIGHT_BYTES: u64 = 16 * MIB;
const READS: usize = 12;
const EXPORT: &str = "scratch";
const JOB: &str = "overhead";
/// How long a job may take to end when it is told to.
const JOB_ENDS_WITHIN: Duration = Duration::from_secs(60);

/// A job of QEMU's that was started.
struct Job<'a> {
    monitor: &'a Monitor,
    events: broadcast::Receiver<Event>,
}

impl<'a> Job<'a> {
    async fn start(monitor: &'a Monitor, command: &str, arguments: Value) -> Result<Self, OverheadError> {
        let events = monitor.subscribe();
        monitor.raw(command, arguments).await?;
        Ok(Self { monitor, events })
    }

    /// Waits for one of these events of the job; `None` at the deadline.
    async fn wait(&mut self, names: &[&str], deadline: Instant) -> Result<Option<Event>, OverheadError> {
        loop {
            let event = match timeout_at(deadline.into(), self.events.recv()).await {
                Err(_) => return Ok(None),
                Ok(Ok(event)) => event,
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => continue,
                Ok(Err(broadcast::error::RecvError::Closed)) => {
                    return Err(OverheadError::Late("QEMU ended during its job".into()));
                }
            };
            if event.data["device"] != JOB || !names.contains(&event.name.as_str()) {
                continue;
            }
            return match event.data["error"].as_str() {
                Some(error) => Err(OverheadError::Late(format!("QEMU's job failed: {error}"))),
                None => Ok(Some(event)),
            };
        }
    }

    /// Breaks it off, unless it has just ended.
    async fn cancel(mut self) -> Result<(), OverheadError> {
        match self.monitor.raw("block-job-cancel", json!({"device": JOB})).await {
            Err(error) if error.refusal().is_none() => return Err(error.into()),
            Err(_) => {}
            Ok(_) => {
                self.ended(&["BLOCK_JOB_CANCELLED", "BLOCK_JOB_COMPLETED"]).await?;
            }
        }
        Ok(())
    }

    async fn ended(&mut self, names: &[&str]) -> Result<(), OverheadError> {
        let ended = self.wait(names, Instant::now() + JOB_ENDS_WITHIN).await?;
        ended.map(drop).ok_or_else(|| OverheadError::Late("QEMU's job did not end within a minute".into()))
    }
}

/// A node that a job has just let go of may be in use for another moment.
async fn remove_node(monitor: &Monitor, node: &str) -> Result<(), MonitorError> {
    for _ in 0..100 {
        match monitor.raw("blockdev-del", json!({"node-name": node})).await {
            Err(error) if error.refusal().is_some() => tokio::time::sleep(Duration::from_millis(20)).await,
            done => return done.map(drop),
        }
    }
    monitor.raw("blockdev-del", json!({"node-name": node})).await.map(drop)
}

/// Makes a qcow2 image as large as the disk.
async fn make_qcow2(bench: &Bench<'_>, image: &Path) -> Result<(), OverheadError> {
    let program = qemu_img(&bench.options.rig.qemu);
    let mut command = tokio::process::Command::new(&program);
    command.args(["create", "-q", "-f", "qcow2"]).arg(image).arg(bench.options.size_bytes.to_string());
    let failed = |why: String| OverheadError::Program { program: program.display().to_string(), why };
    let out = command.kill_on_drop(true).output().await.map_err(|e| failed(format!("cannot be run: {e}")))?;
    match out.status.success() {
        true => Ok(()),
        false => Err(failed(format!("failed: {}", String::from_utf8_lossy(&out.stderr).trim()))),
    }
}

/// The `qemu-img` beside this QEMU, else the one that is installed.
pub fn qemu_img(qemu: &Path) -> std::path::PathBuf {
    let beside = qemu.with_file_name("qemu-img");
    if beside.is_file() { beside } else { "qemu-img".into() }
}

fn qcow2(node: &str, image: &Path, backing: Value) -> Value {
    let file = json!({"driver": "file", "filename": image});
    json!({"driver": "qcow2", "node-name": node, "file": file, "backing": backing})
}

/// `sync=none` onto a qcow2 image with the disk behind it, exported and read.
pub async fn fleece(bench: &Bench<'_>) -> Result<Outcome, OverheadError> {
    let monitor = &bench.rig.monitor;
    let (image, socket) = (bench.work.path("scratch.qcow2"), bench.work.path("nbd"));
    make_qcow2(bench, &image).await?;
    let began_ns = bench.load.now_ns();
    let deadline = bench.deadline();
    monitor.raw("blockdev-add", qcow2("scratch", &image, json!(NODE))).await?;
    let arguments = json!({"job-id": JOB, "device": NODE, "target": "scratch", "sync": "none"});
    let job = Job::start(monitor, "blockdev-backup", arguments).await?;
    let address = json!({"type": "unix", "data": {"path": socket}});
    monitor.raw("nbd-server-start", json!({"addr": address})).await?;
    let export = json!({"type": "nbd", "id": EXPORT, "node-name": "scratch", "name": EXPORT});
    monitor.raw("block-export-add", export).await?;
    let rules = SourceRules { boundary_bytes: MAX_READ_BYTES, in_flight_bytes: IN_FLIGHT_BYTES };
    let options = SourceOptions {
        address: nbd::Address::Unix(socket),
        export: EXPORT.into(),
        connections: CONNECTIONS,
        rules,
        request_bytes: Some(REQUEST_BYTES),
        connect: Default::default(),
    };
    let source = NbdSource::open(&options).await?;
    let (read_bytes, finished) = read_all(&source, bench, deadline).await?;
    monitor.raw("block-export-del", json!({"id": EXPORT, "mode": "hard"})).await?;
    drop(source);
    monitor.raw("nbd-server-stop", json!({})).await?;
    job.cancel().await?;
    remove_node(monitor, "scratch").await?;
    let ended_ns = bench.load.now_ns();
    bench.work.remove("scratch.qcow2");
    Ok(Outcome { began_ns, ended_ns, finished, read_bytes, copied_bytes: None })
}

/// Reads a disk and throws it away. Gives how much that was, and whether it was all.
async fn read_all(source: &NbdSource, bench: &Bench<'_>, deadline: Instant) -> Result<(u64, bool), OverheadError> {
    let (began, rate, size_bytes) = (Instant::now(), bench.reader, source.size_bytes());
    let pieces = Extent::between(0, size_bytes).split_at_multiples(MAX_READ_BYTES);
    let mut reads = futures_util::stream::iter(pieces).map(|piece| source.read(piece)).buffered(READS);
    let mut read_bytes = 0;
    while let Ok(Some(read)) = timeout_at(deadline.into(), reads.next()).await {
        read_bytes +=
            read.map_err(|e| OverheadError::Late(format!("QEMU's export could not be read: {e}")))?.len() as u64;
        if timeout_at(deadline.into(), keep_pace(began, read_bytes, rate)).await.is_err() {
            break;
        }
    }
    Ok((read_bytes, read_bytes == size_bytes))
}

/// `sync=full` onto a raw file, of this rate if it is to be slow.
pub async fn push(bench: &Bench<'_>, slow: Option<u64>) -> Result<Outcome, OverheadError> {
    let monitor = &bench.rig.monitor;
    let image = bench.work.path("target.raw");
    let size_bytes = bench.options.size_bytes;
    File::create(&image).and_then(|file| file.set_len(size_bytes)).map_err(path("cannot make", &image))?;
    let limits = json!({"bps-write": slow.unwrap_or(0)});
    monitor.raw("qom-set", json!({"path": "/objects/slow", "property": "limits", "value": limits})).await?;
    let began_ns = bench.load.now_ns();
    let deadline = bench.deadline();
    let file = json!({"driver": "file", "filename": image});
    let target = json!({"driver": "throttle", "node-name": "target", "throttle-group": "slow", "file": file});
    monitor.raw("blockdev-add", target).await?;
    let speed = bench.reader.unwrap_or(0);
    let arguments = json!({"job-id": JOB, "device": NODE, "target": "target", "sync": "full", "speed": speed});
    let mut job = Job::start(monitor, "blockdev-backup", arguments).await?;
    let finished = job.wait(&["BLOCK_JOB_COMPLETED"], deadline).await?.is_some();
    let read_bytes = match finished {
        true => size_bytes,
        false => {
            let jobs = monitor.raw("query-block-jobs", json!({})).await?;
            // Nobody waits for what was to be slow.
            let free = json!({"path": "/objects/slow", "property": "limits", "value": {"bps-write": 0}});
            monitor.raw("qom-set", free).await?;
            job.cancel().await?;
            jobs[0]["offset"].as_u64().unwrap_or(0)
        }
    };
    remove_node(monitor, "target").await?;
    let ended_ns = bench.load.now_ns();
    bench.work.remove("target.raw");
    Ok(Outcome { began_ns, ended_ns, finished, read_bytes, copied_bytes: None })
}

/// An overlay above the disk, a reader of the image below, and the overlay committed back.
pub async fn overlay(bench: &Bench<'_>) -> Result<Outcome, OverheadError> {
    let monitor = &bench.rig.monitor;
    let image = bench.work.path("overlay.qcow2");
    make_qcow2(bench, &image).await?;
    let began_ns = bench.load.now_ns();
    let deadline = bench.deadline();
    monitor.raw("blockdev-add", qcow2("overlay", &image, Value::Null)).await?;
    monitor.raw("blockdev-snapshot", json!({"node": NODE, "overlay": "overlay"})).await?;
    let (read_bytes, copied) = copy_image(bench, &bench.work.path("disk.raw"), deadline).await?;
    let arguments = json!({"job-id": JOB, "device": "overlay", "base-node": NODE});
    let mut job = Job::start(monitor, "block-commit", arguments).await?;
    let ready = job.wait(&["BLOCK_JOB_READY"], deadline + bench.options.during()).await?.is_some();
    let mut ended_ns = bench.load.now_ns();
    if !ready {
        // The guest writes faster than the commit: left alone it would never end.
        bench.load.hold(true).await?;
        if job.wait(&["BLOCK_JOB_READY"], Instant::now() + JOB_ENDS_WITHIN).await?.is_none() {
            return Err(OverheadError::Late("the commit did not get ready within a minute, without any writes".into()));
        }
    }
    monitor.raw("block-job-complete", json!({"device": JOB})).await?;
    job.ended(&["BLOCK_JOB_COMPLETED"]).await?;
    remove_node(monitor, "overlay").await?;
    if ready {
        ended_ns = bench.load.now_ns();
    }
    bench.load.hold(false).await?;
    bench.work.remove("overlay.qcow2");
    Ok(Outcome { began_ns, ended_ns, finished: copied && ready, read_bytes, copied_bytes: None })
}

/// Reads an image or device as long as the disk, as a program beside QEMU does. Gives how much that was, and whether it was
/// all.
pub async fn copy_image(bench: &Bench<'_>, image: &Path, deadline: Instant) -> Result<(u64, bool), OverheadError> {
    let (size_bytes, rate, began) = (bench.options.size_bytes, bench.reader, Instant::now());
    let file = Arc::new(File::open(image).map_err(path("cannot open", image))?);
    let mut read_bytes = 0;
    while read_bytes < size_bytes && Instant::now() < deadline {
        let (file, at) = (file.clone(), read_bytes);
        let len = size_bytes.min(at + 16 * MIB) - at;
        let read = tokio::task::spawn_blocking(move || -> std::io::Result<()> {
            let mut bytes = vec![0; MAX_READ_BYTES as usize];
            for piece in Extent::new(at, len).split_at_multiples(MAX_READ_BYTES) {
                file.read_exact_at(&mut bytes[..piece.len_bytes as usize], piece.offset_bytes)?;
            }
            Ok(())
        });
        read.await.map_err(|_| OverheadError::Panicked)?.map_err(path("cannot read", image))?;
        read_bytes += len;
        if timeout_at(deadline.into(), keep_pace(began, read_bytes, rate)).await.is_err() {
            break;
        }
    }
    Ok((read_bytes, read_bytes == size_bytes))
}
