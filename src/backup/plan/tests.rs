use super::*;
use crate::machine::{Disk, DiskKind, Machine, Taken};
use crate::repo::point::{Grade, PointTotals};
use crate::units::PointId;

const CHUNK: u32 = 1 << 17;

fn found(name: &str, size_bytes: u64) -> FoundDisk {
    let disk = Disk {
        name: name.to_owned(),
        kind: DiskKind::Disk,
        device: "virtio-blk-device".to_owned(),
        qom_path: String::new(),
        node: String::new(),
        size_bytes,
        read_only: false,
        iothread: false,
        discard_unmap: true,
        chain: Vec::new(),
        shared: None,
    };
    FoundDisk { disk, verdict: Verdict::Protectable }
}

/// A point of these disks (name, size), with checkpoints or without.
fn point(level: Level, disks: &[(&str, u64)]) -> Manifest {
    let disk = |(name, size): &(&str, u64)| PointDisk {
        disk: found(name, *size).disk,
        image: Image::zero(*size, CHUNK).unwrap(),
        checkpoint: (level != Level::Copy).then(CheckpointId::random),
        epoch: None,
        taken: Taken::Full { reason: String::new() },
        read_bytes: 0,
        same_bytes: 0,
        stored_bytes: 0,
        audit: None,
        impact: None,
        areas: Areas::default(),
    };
    let now = jiff::Timestamp::now();
    Manifest {
        id: PointId::random(),
        vm: "vm".to_owned(),
        started: now,
        instant: now,
        finished: now,
        level,
        parent: None,
        grade: Grade::Crash,
        evidence: Default::default(),
        machine: Machine::default(),
        disks: disks.iter().map(disk).collect(),
        files: Vec::new(),
        left_out: Vec::new(),
        totals: PointTotals::default(),
        livebackup: String::new(),
    }
}

fn parents(plan: &Plan) -> Vec<(&str, PointId)> {
    plan.bases.iter().map(|(name, base)| (name.as_str(), base.point)).collect()
}

#[test]
fn the_newest_point_with_a_checkpoint_is_gone_on_from() {
    let now = [found("a", 10), found("b", 20)];
    let both = [("a", 10), ("b", 20)];
    let points = [
        point(Level::Full, &both),
        point(Level::Incremental, &both),
        point(Level::Incremental, &both),
        point(Level::Copy, &both),
    ];
    for level in [LevelChoice::Auto, LevelChoice::Incremental] {
        let plan = choose(level, &points, &now, CHUNK).unwrap();
        assert_eq!(parents(&plan), [("a", points[2].id), ("b", points[2].id)]);
        assert_eq!((plan.parent, plan.full_reason.as_deref()), (Some(points[2].id), None));
        assert_eq!(plan.since()["b"], points[2].disks[1].checkpoint.unwrap());
    }
    let plan = choose(LevelChoice::Differential, &points, &now, CHUNK).unwrap();
    assert_eq!((parents(&plan), plan.parent), (vec![("a", points[0].id), ("b", points[0].id)], Some(points[0].id)));
    for level in [LevelChoice::Full, LevelChoice::Copy] {
        let plan = choose(level, &points, &now, CHUNK).unwrap();
        assert!(plan.bases.is_empty() && plan.parent.is_none() && plan.full_reason.is_some());
    }
}

#[test]
fn a_disk_that_was_left_out_once_goes_on_from_where_it_was() {
    let points = [point(Level::Full, &[("a", 10), ("b", 20)]), point(Level::Incremental, &[("a", 10)])];
    let plan = choose(LevelChoice::Auto, &points, &[found("a", 10), found("b", 20)], CHUNK).unwrap();
    assert_eq!(parents(&plan), [("a", points[1].id), ("b", points[0].id)]);
    assert_eq!(plan.parent, Some(points[1].id));
}

#[test]
fn a_changed_disk_is_read_whole_and_it_is_said_why() {
    let points = [point(Level::Full, &[("a", 10), ("b", 20)])];
    let grown = choose(LevelChoice::Auto, &points, &[found("a", 10), found("b", 30)], CHUNK).unwrap();
    assert_eq!(parents(&grown), [("a", points[0].id)]);
    assert!(grown.full_reason.unwrap().contains("size"));
    let other = choose(LevelChoice::Auto, &points, &[found("a", 10)], 2 * CHUNK).unwrap();
    assert!(other.bases.is_empty() && other.full_reason.unwrap().contains("chunk size"));
    let new = choose(LevelChoice::Auto, &points, &[found("c", 10)], CHUNK).unwrap();
    assert!(new.bases.is_empty() && new.full_reason.is_some());
}

#[test]
fn a_level_that_needs_a_point_says_what_is_missing() {
    let (now, copy) = ([found("a", 10)], [point(Level::Copy, &[("a", 10)])]);
    let later = [point(Level::Incremental, &[("a", 10)])];
    let refusal = |level, points: &[Manifest]| choose(level, points, &now, CHUNK).unwrap_err();
    assert_eq!(refusal(LevelChoice::Incremental, &[]), NotPossible::NoPoint);
    assert_eq!(refusal(LevelChoice::Differential, &[]), NotPossible::NoPoint);
    assert_eq!(refusal(LevelChoice::Incremental, &copy), NotPossible::NoCheckpoint);
    assert_eq!(refusal(LevelChoice::Differential, &later), NotPossible::NoFull);
    assert!(choose(LevelChoice::Auto, &[], &now, CHUNK).unwrap().full_reason.is_some());
}

#[test]
fn the_recorded_level_is_what_happened() {
    let level = |asked, whole: &[bool]| happened(asked, whole.iter().copied());
    assert_eq!(level(LevelChoice::Auto, &[true, true]), Level::Full);
    assert_eq!(level(LevelChoice::Auto, &[true, false]), Level::Incremental);
    assert_eq!(level(LevelChoice::Differential, &[false]), Level::Differential);
    assert_eq!(level(LevelChoice::Differential, &[true]), Level::Full);
    assert_eq!(level(LevelChoice::Copy, &[true]), Level::Copy);
}

#[test]
fn levels_have_names() {
    for (name, level) in LevelChoice::ALL {
        assert_eq!((level.to_string().as_str(), name.parse()), (name, Ok(level)));
    }
    assert!("partial".parse::<LevelChoice>().unwrap_err().contains("differential"));
}
