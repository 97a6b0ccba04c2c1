//! Reading marked blobs in the order of packs, on all processors.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use crate::limits::MAX_CHUNK_BYTES;
use crate::repo::damage::Mark;
use crate::repo::digest::Digest;
use crate::repo::error::RepoError;
use crate::repo::index::set::Location;
use crate::repo::packfile::{decode_blob, read_directory};
use crate::repo::reader::image::processors;
use crate::repo::reader::{Reader, Scratch};
use crate::repo::verify::marks::Marks;
use crate::repo::verify::{Progress, Report};

/// Stored bytes that are read at once, about.
const RUN_BYTES: u64 = 2 << 20;
const PROGRESS_EVERY: Duration = Duration::from_millis(250);

/// Blobs that lie one after the other in one pack.
type Run = Vec<(Digest, Location)>;

struct Found {
    digest: Digest,
    location: Location,
    error: RepoError,
    intact_copy: bool,
}

#[derive(Default)]
struct Counts {
    blobs: AtomicU64,
    stored_bytes: AtomicU64,
    raw_bytes: AtomicU64,
}

pub(super) fn read_marked(
    reader: &Reader,
    marks: &mut Marks,
    report: &mut Report,
    damaged: &mut HashMap<Digest, Option<usize>>,
    progress: &mut impl FnMut(Progress),
) -> Result<(), RepoError> {
    let counts = Counts::default();
    let found = Mutex::new(Vec::new());
    let (sender, receiver) = sync_channel(16);
    let receiver = Mutex::new(receiver);
    let total_bytes = marks.stored_bytes;
    let planned = thread::scope(|scope| {
        let (receiver, counts, found) = (&receiver, &counts, &found);
        for _ in 0..processors() {
            scope.spawn(move || work(reader, receiver, counts, found));
        }
        let mut last = Instant::now();
        let mut told = || {
            if last.elapsed() >= PROGRESS_EVERY {
                last = Instant::now();
                progress(Progress { done_bytes: counts.stored_bytes.load(Ordering::Relaxed), total_bytes });
            }
        };
        let planned = plan(reader, marks, report, &sender, &mut told);
        drop(sender);
        planned
    });
    report.blobs = counts.blobs.into_inner();
    report.stored_bytes = counts.stored_bytes.into_inner();
    report.raw_bytes = counts.raw_bytes.into_inner();
    progress(Progress { done_bytes: report.stored_bytes, total_bytes });
    for Found { digest, location, error, intact_copy } in found.into_inner().unwrap_or_else(PoisonError::into_inner) {
        report.places.push((location.pack, Mark { offset_bytes: location.placed.offset_bytes, digest }));
        let number = report.add(error, intact_copy);
        // What has an intact copy can be read: nothing rests on the damaged one.
        if !intact_copy {
            damaged.insert(digest, number);
        }
    }
    planned
}

fn plan(
    reader: &Reader,
    marks: &mut Marks,
    report: &mut Report,
    sender: &SyncSender<Run>,
    told: &mut impl FnMut(),
) -> Result<(), RepoError> {
    let mut run = Run::new();
    let mut send = |run: &mut Run| {
        if !run.is_empty() {
            // The receiver lives as long as the scope.
            let _ = sender.send(std::mem::take(run));
            told();
        }
    };
    // A bad pack table was reported when the index was compared with its checksum; its entries are read one by one below.
    let packs = reader.index().packs().unwrap_or_default();
    for pack in packs {
        let blobs = match read_directory(&reader.layout().pack(pack.id)) {
            Ok((_, blobs)) => blobs,
            Err(error) => {
                report.add(error, false);
                continue;
            }
        };
        report.packs += 1;
        for blob in blobs {
            for location in reader.index().find_all(&blob.digest).flatten() {
                if location.pack != pack.id || location.placed != blob.placed || !marks.take(&location) {
                    continue;
                }
                let joins = run.last().is_some_and(|(_, last)| {
                    let begin = u64::from(run[0].1.placed.offset_bytes);
                    last.pack == pack.id
                        && last.placed.end() == u64::from(blob.placed.offset_bytes)
                        && blob.placed.end() - begin <= RUN_BYTES
                });
                if !joins {
                    send(&mut run);
                }
                run.push((blob.digest, location));
            }
        }
    }
    send(&mut run);
    // What the directories do not tell of, as of packs that are damaged: one by one.
    for (number, file) in reader.index().files().iter().enumerate() {
        for n in marks.left(number) {
            match file.view().entry(n) {
                Ok(entry) => {
                    let location = Location { pack: entry.pack_id, placed: entry.placed, entry: (number as u32, n) };
                    run.push((entry.digest, location));
                    send(&mut run);
                }
                Err(error) => {
                    report.add(file.error(error), false);
                }
            }
        }
    }
    Ok(())
}

fn work(reader: &Reader, receiver: &Mutex<Receiver<Run>>, counts: &Counts, found: &Mutex<Vec<Found>>) {
    let mut scratch = Scratch::new();
    let mut out = vec![0; MAX_CHUNK_BYTES as usize];
    loop {
        let run = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(run) = run else { return };
        let Ok(scratch) = &mut scratch else { continue };
        if check_run(reader, scratch, &run, &mut out).is_err() {
            for (digest, location) in &run {
                let out = &mut out[..location.placed.raw_len as usize];
                if let Err(error) = reader.read_at(scratch, digest, location, out) {
                    let intact_copy = reader.read_into(scratch, digest, out).is_ok();
                    let one = Found { digest: *digest, location: *location, error, intact_copy };
                    found.lock().unwrap_or_else(PoisonError::into_inner).push(one);
                }
            }
        }
        for (_, location) in &run {
            counts.blobs.fetch_add(1, Ordering::Relaxed);
            counts.stored_bytes.fetch_add(location.placed.stored_len.into(), Ordering::Relaxed);
            counts.raw_bytes.fetch_add(location.placed.raw_len.into(), Ordering::Relaxed);
        }
    }
}

fn check_run(reader: &Reader, scratch: &mut Scratch, run: &Run, out: &mut [u8]) -> Result<(), RepoError> {
    let [(_, first), .., (_, last)] = &run[..] else {
        let (digest, location) = &run[0];
        return reader.read_at(scratch, digest, location, &mut out[..location.placed.raw_len as usize]);
    };
    let begin = u64::from(first.placed.offset_bytes);
    let len = (last.placed.end() - begin) as usize;
    let (zstd, stored) = reader.load(scratch, first.pack, begin, len)?;
    for (digest, location) in run {
        let from = (u64::from(location.placed.offset_bytes) - begin) as usize;
        let stored = &stored[from..from + location.placed.stored_len as usize];
        decode_blob(zstd, stored, location.placed.codec, digest, &mut out[..location.placed.raw_len as usize])
            .map_err(|e| reader.damaged(digest, location, e))?;
    }
    Ok(())
}
