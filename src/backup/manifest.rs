//! The manifest of what was stored, and its commit: what makes the point exist.

use jiff::Timestamp;

use crate::backup::plan::happened;
use crate::backup::report::{DiskReport, Durations, Report};
use crate::backup::transfer::Stored;
use crate::backup::{BackupError, audit, blocking};
use crate::fault;
use crate::machine::{FoundDisk, Taken, Verdict};
use crate::repo::Repository;
use crate::repo::point::{AuditRecord, Evidence, Manifest, PointDisk, PointFile, PointTotals};
use crate::units::PointId;
use crate::wire::message::BegunDisk;

/// Makes the point exist. Everything that it refers to is durable.
pub async fn commit(repo: &Repository, stored: Stored) -> Result<Report, BackupError> {
    let manifest = manifest(&stored)?;
    let report = report(&stored, &manifest);
    let repo = repo.clone();
    blocking(move || repo.commit(&manifest)).await??;
    fault::point("backup.committed");
    let mut report = report;
    report.durations.total_s = stored.head.clock.elapsed().as_secs_f64();
    Ok(report)
}

fn is_whole(disk: &BegunDisk) -> bool {
    matches!(disk.taken, Taken::Full { .. })
}

/// How far the disk's audit has come.
fn audited(stored: &Stored, index: usize, disk: &BegunDisk) -> Option<AuditRecord> {
    // Without a checkpoint nothing goes on from here.
    disk.checkpoint?;
    let (name, instant) = (&disk.disk.name, stored.begun.instant);
    let base = match &disk.taken {
        Taken::Incremental { .. } => stored.plan.bases.get(name)?,
        Taken::Full { .. } | Taken::Scan { .. } => return Some(audit::begin(instant)),
    };
    let chunk_bytes = u64::from(base.image.chunk_bytes);
    let confirmed_chunks = stored.same[index].div_ceil(chunk_bytes);
    let picked = stored.picked.get(name).cloned().unwrap_or_default();
    Some(audit::go_on(base, &picked, disk.audited_chunks, confirmed_chunks, instant))
}

fn manifest(stored: &Stored) -> Result<Manifest, BackupError> {
    let (head, begun) = (&stored.head, &stored.begun);
    let of = |index: usize| {
        let missing = || BackupError::Contradiction(format!("the writer does not know disk {index}"));
        stored.finished.disks.get(index).copied().ok_or_else(missing)
    };
    let mut totals = PointTotals { stored_bytes: stored.finished.tree_bytes, ..PointTotals::default() };
    let mut disks = Vec::with_capacity(begun.disks.len());
    for (index, disk) in begun.disks.iter().enumerate() {
        let finished = of(index)?;
        let read_bytes = stored.received[index];
        totals.size_bytes = totals.size_bytes.saturating_add(disk.disk.size_bytes);
        totals.read_bytes = totals.read_bytes.saturating_add(read_bytes);
        disks.push(PointDisk {
            disk: disk.disk.clone(),
            image: finished.image,
            checkpoint: disk.checkpoint,
            epoch: disk.epoch,
            taken: disk.taken.clone(),
            read_bytes,
            same_bytes: stored.same[index],
            stored_bytes: finished.stats.stored_bytes,
            audit: audited(stored, index, disk),
            areas: disk.areas.clone().unwrap_or_default(),
            impact: stored.totals.impact.iter().find(|i| i.disk == disk.disk.name).map(|i| i.impact),
        });
    }
    let mut files = Vec::with_capacity(stored.files.len());
    for file in &stored.files {
        files.push(PointFile { name: file.name.clone(), image: of(file.handle.0.into())?.image });
    }
    totals.stored_bytes += stored.finished.disks.iter().map(|d| d.stats.stored_bytes).sum::<u64>();
    let level = happened(head.level, begun.disks.iter().map(is_whole));
    // A sidecar that knows nothing of evidence says how long it stopped the guest, at least.
    let evidence = Evidence { stopped_us: begun.stopped_us, ..(*begun.evidence).clone() };
    let goes_on = !begun.disks.iter().all(is_whole);
    Ok(Manifest {
        id: PointId::random(),
        vm: head.vm.clone(),
        started: head.started,
        instant: begun.instant,
        finished: Timestamp::now(),
        level,
        grade: evidence.grade(),
        evidence,
        parent: stored.plan.parent.filter(|_| goes_on),
        machine: begun.machine.clone(),
        disks,
        files,
        left_out: begun.left_out.clone(),
        totals,
        livebackup: env!("CARGO_PKG_VERSION").to_owned(),
    })
}

fn left_out(found: &FoundDisk) -> String {
    let why = match &found.verdict {
        Verdict::Protectable => "it was excluded",
        Verdict::LeftOut(reason) | Verdict::NotProtectable(reason) => reason,
    };
    format!("{}: {why}", found.disk.name)
}

fn report(stored: &Stored, manifest: &Manifest) -> Report {
    let of = |(disk, finished): (&PointDisk, &crate::repo::writer::FinishedDisk)| DiskReport {
        disk: disk.disk.name.clone(),
        size_bytes: disk.disk.size_bytes,
        taken: disk.taken.clone(),
        read_bytes: disk.read_bytes,
        same_bytes: disk.same_bytes,
        new_bytes: finished.stats.new_bytes,
        stored_bytes: disk.stored_bytes,
        impact: disk.impact,
        areas: disk.areas.clone(),
    };
    let mut warnings = stored.totals.warnings.clone();
    warnings.extend(stored.warnings.iter().cloned());
    Report {
        point: manifest.id,
        vm: manifest.vm.clone(),
        level: manifest.level,
        parent: manifest.parent,
        instant: manifest.instant,
        grade: manifest.grade,
        evidence: manifest.evidence.clone(),
        disks: manifest.disks.iter().zip(&stored.finished.disks).map(of).collect(),
        left_out: manifest.left_out.iter().map(left_out).collect(),
        size_bytes: manifest.totals.size_bytes,
        read_bytes: manifest.totals.read_bytes,
        wire_bytes: stored.head.over_a_connection.then_some(stored.wire_bytes),
        new_bytes: stored.finished.disks.iter().map(|d| d.stats.new_bytes).sum(),
        stored_bytes: manifest.totals.stored_bytes,
        scratch_peak_bytes: stored.totals.scratch_peak_bytes,
        durations: Durations {
            prepare_s: stored.head.prepared.as_secs_f64(),
            stopped_s: stored.begun.stopped_us as f64 / 1e6,
            transfer_s: stored.transfer.as_secs_f64(),
            store_s: stored.store.as_secs_f64(),
            total_s: 0.0,
        },
        warnings,
    }
}
