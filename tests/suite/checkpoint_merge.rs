//! Merging in the log: what it still answers, that it keeps within its limits, and what a kill leaves.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::common::Rng;
use jiff::Timestamp;
use livebackup::checkpoint::format::{self, Content, MAX_COVERS, Payload};
use livebackup::checkpoint::{Bitmap, EpochStart, Header, Limits, Log, LogError, NotInLog, QemuInstance, Sealed};
use livebackup::extent::Extent;
use livebackup::units::{CheckpointId, EpochId, GRANULE_BYTES};

const GRANULES: u64 = 3000;
const SIZE: u64 = GRANULES * GRANULE_BYTES + 512;

fn id(n: u8) -> CheckpointId {
    CheckpointId::from_bytes([n; 16])
}

fn granules(list: &[u64]) -> Bitmap {
    let mut bitmap = Bitmap::new(SIZE);
    list.iter().for_each(|g| bitmap.set(Extent::new(g * GRANULE_BYTES, 1)));
    bitmap
}

fn start() -> EpochStart {
    EpochStart {
        id: EpochId::from_bytes([1; 16]),
        first: id(1),
        time: Timestamp::now(),
        size_bytes: SIZE,
        qemu: QemuInstance { pid: 1, start_time: 2, boot_id: "boot".into() },
        node: "disk0".into(),
        medium: None,
    }
}

fn seal(log: &mut Log, id: CheckpointId, bitmap: &Bitmap) -> Result<(), LogError> {
    let (number, prev) = (log.next_number(), log.last());
    log.seal(Sealed { id, prev, number, time: Timestamp::now(), bitmap })
}

fn file(dir: &Path, n: u8) -> PathBuf {
    dir.join(format!("{}.ckpt", id(n)))
}

/// Checkpoint n wrote granule n and granule 50 + n.
fn written(n: u8) -> Vec<u64> {
    vec![n.into(), 50 + u64::from(n)]
}

/// Epoch 1 with checkpoints 1..=6.
fn log_of_six(dir: &Path) -> Log {
    let mut log = Log::open(dir).unwrap();
    log.begin_epoch(start(), "first").unwrap();
    (2..=6).for_each(|n| seal(&mut log, id(n), &granules(&written(n))).unwrap());
    log
}

/// All that checkpoints after `n` wrote, up to `last`.
fn after(n: u8, last: u8) -> Bitmap {
    granules(&(n + 1..=last).flat_map(written).collect::<Vec<_>>())
}

fn contains(all: &Bitmap, some: &Bitmap) -> bool {
    let mut union = all.clone();
    union.union_with(some).unwrap();
    union == *all
}

/// Against a model that knows each checkpoint's granules: every id is answered with all that it must, and with no more than
/// the group of merged checkpoints that it is in explains.
#[test]
fn a_merged_log_answers_every_client_with_a_superset_that_is_explained() {
    let mut rng = Rng::new();
    for _ in 0..8 {
        let dir = tempfile::tempdir().unwrap();
        let mut log = Log::open(dir.path()).unwrap();
        log.begin_epoch(start(), "first").unwrap();
        let mut model = vec![(id(1), granules(&[]))];
        let limits = Limits { files: 3 + rng.below(8) as usize, bytes: u64::MAX };
        for _ in 0..10 + rng.below(40) {
            let next = CheckpointId::random();
            let count = if rng.below(8) == 0 { 1500 } else { rng.below(30) };
            let bitmap = granules(&(0..count).map(|_| rng.below(GRANULES + 1)).collect::<Vec<_>>());
            seal(&mut log, next, &bitmap).unwrap();
            model.push((next, bitmap));
            log.merge_old(limits).unwrap();
            if rng.below(4) == 0 {
                log = Log::open(dir.path()).unwrap();
            }
            assert!(log.damaged().is_empty());
            assert!(log.checkpoints().len() <= limits.files);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), log.checkpoints().len() + 1);
            let known: Vec<_> =
                log.checkpoints().iter().flat_map(|h| h.covers.iter().chain([&h.id])).copied().collect();
            assert_eq!(known, model.iter().map(|(id, _)| *id).collect::<Vec<_>>(), "all are known, in their order");
        }
        let union = |from: usize| {
            let mut all = granules(&[]);
            model[from..].iter().for_each(|(_, bitmap)| all.union_with(bitmap).unwrap());
            all
        };
        let mut begins = BTreeMap::new();
        let mut at = 0;
        for header in log.checkpoints() {
            let group = header.covers.len() + 1;
            for n in at..at + group {
                begins.insert(n, if n + 1 == at + group { n + 1 } else { at });
            }
            at += group;
        }
        for (n, (id, _)) in model.iter().enumerate() {
            assert_eq!(log.since(*id).unwrap(), union(begins[&n]), "checkpoint {n}");
            assert!(contains(&log.since(*id).unwrap(), &union(n + 1)));
        }
        assert_eq!(log.since(model[model.len() - 1].0).unwrap(), granules(&[]), "the last is exact");
    }
}

/// What is recent stays fine, what is old gets coarse.
#[test]
fn the_old_is_merged_before_the_young() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    log.begin_epoch(start(), "first").unwrap();
    for n in 0..200u64 {
        seal(&mut log, CheckpointId::random(), &granules(&[n])).unwrap();
        log.merge_old(Limits { files: 20, bytes: u64::MAX }).unwrap();
    }
    let spans: Vec<_> = log.checkpoints().iter().map(|h| h.covers.len() + 1).collect();
    assert_eq!((spans.len(), spans.iter().sum::<usize>()), (20, 201));
    assert_eq!(spans[17..], [1, 1, 1], "{spans:?}");
    assert!(spans[..5].iter().all(|span| *span > 8), "{spans:?}");
}

#[test]
fn a_limit_on_bytes_is_kept() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    log.begin_epoch(start(), "first").unwrap();
    let mut rng = Rng::new();
    let limits = Limits { files: usize::MAX, bytes: 6000 };
    for _ in 0..60 {
        let bitmap = granules(&(0..60).map(|_| rng.below(GRANULES)).collect::<Vec<_>>());
        seal(&mut log, CheckpointId::random(), &bitmap).unwrap();
        log.merge_old(limits).unwrap();
        let on_disk = log.checkpoints().iter().map(|h| {
            let len = std::fs::metadata(dir.path().join(format!("{}.ckpt", h.id))).unwrap().len();
            assert_eq!(len, h.file_bytes());
            len
        });
        assert!(on_disk.sum::<u64>() <= limits.bytes);
    }
    assert!(log.since(id(1)).is_ok());
}

/// One file answers for so many ids; when there are more, those of the oldest are forgotten, and told so.
#[test]
fn ids_that_nobody_can_keep_are_unknown() {
    let dir = tempfile::tempdir().unwrap();
    drop(log_of_six(dir.path()));
    let old: Vec<_> = (0..MAX_COVERS).map(|_| CheckpointId::random()).collect();
    let header = Header::read_file(&file(dir.path(), 2)).unwrap();
    let Header { id: own, epoch, number, time, .. } = header;
    let content = Content { id: own, prev: None, epoch, number, time, covers: &old, bitmap: &granules(&[2, 52]) };
    std::fs::write(file(dir.path(), 2), content.encode().unwrap().1).unwrap();
    std::fs::remove_file(file(dir.path(), 1)).unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    assert_eq!(log.since(old[0]).unwrap(), after(1, 6));
    // Merging 3 and 4 is what is left to do below the oldest pair, and then that one too.
    log.merge_old(Limits { files: 2, bytes: u64::MAX }).unwrap();
    for log in [log, Log::open(dir.path()).unwrap()] {
        assert_eq!(log.checkpoints().len(), 2);
        assert_eq!(log.checkpoints()[0].covers.len(), MAX_COVERS);
        assert_eq!(log.since(old[0]).unwrap_err(), NotInLog::Unknown(old[0]));
        assert_eq!(log.since(old[MAX_COVERS - 1]).unwrap(), after(1, 6));
        assert_eq!(log.since(id(4)).unwrap(), after(1, 6));
        assert_eq!(log.since(id(5)).unwrap(), after(5, 6));
    }
}

#[test]
fn an_ended_epoch_names_merged_checkpoints_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_of_six(dir.path());
    log.merge_old(Limits { files: 3, bytes: u64::MAX }).unwrap();
    log.end_epoch("the disk was resized").unwrap();
    assert_eq!(log.last_end().unwrap().checkpoints, (1..=6).map(id).collect::<Vec<_>>());
    assert!(matches!(log.since(id(2)), Err(NotInLog::OtherEpoch { .. })));
}

#[test]
fn a_damaged_file_that_a_merge_meets_is_taken_out() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_of_six(dir.path());
    let mut bytes = std::fs::read(file(dir.path(), 3)).unwrap();
    let at = bytes.len() - 6;
    bytes[at] ^= 1;
    std::fs::write(file(dir.path(), 3), bytes).unwrap();
    log.merge_old(Limits { files: 2, bytes: u64::MAX }).unwrap();
    assert_eq!(log.damaged().len(), 1);
    for log in [log, Log::open(dir.path()).unwrap()] {
        for lost in [1, 2] {
            assert!(matches!(log.since(id(lost)), Err(NotInLog::Damaged { .. } | NotInLog::Unknown(_))), "{lost}");
        }
        assert_eq!(log.since(id(3)).unwrap(), after(3, 6), "its own bitmap is not needed");
        assert_eq!(log.since(id(5)).unwrap(), after(5, 6));
        assert_eq!(log.checkpoints().len(), 2);
    }
}

const CHILD: &str = "LIVEBACKUP_TEST_MERGE_DIR";

/// Run by the kill test in a process of its own.
#[test]
fn child_of_the_kill_test() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let mut log = Log::open(Path::new(&dir)).unwrap();
    log.merge_old(Limits { files: 3, bytes: u64::MAX }).unwrap();
}

#[test]
fn a_kill_at_any_point_of_a_merge_loses_nothing() {
    let each = |n: u32| {
        let points = ["durable.written", "durable.flushed", "durable.renamed", "merge.written", "merge.done"];
        points.map(|point| format!("{point}:{n}"))
    };
    for point in (1..=3).flat_map(each) {
        let dir = tempfile::tempdir().unwrap();
        drop(log_of_six(dir.path()));
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint_merge::child_of_the_kill_test", "--test-threads=1"])
            .env(CHILD, dir.path())
            .env("LIVEBACKUP_KILL_AT", &point)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(!status.success(), "{point}: the child was not killed");
        let mut log = Log::open(dir.path()).unwrap();
        let check = |log: &Log| {
            assert!(log.damaged().is_empty(), "{point}: {:?}", log.damaged());
            for n in 1..=6 {
                let answer = log.since(id(n)).unwrap();
                assert!(contains(&answer, &after(n, 6)) && contains(&after(0, 6), &answer), "{point}: checkpoint {n}");
            }
            assert_eq!(log.since(id(6)).unwrap(), granules(&[]), "{point}");
            let files = std::fs::read_dir(dir.path()).unwrap().count();
            assert_eq!(files, log.checkpoints().len() + 1, "{point}: something was left behind");
        };
        check(&log);
        log.merge_old(Limits { files: 3, bytes: u64::MAX }).unwrap();
        assert_eq!(log.checkpoints().len(), 3);
        check(&log);
        seal(&mut log, id(7), &granules(&[99])).unwrap();
        assert_eq!(Log::open(dir.path()).unwrap().since(id(6)).unwrap(), granules(&[99]), "{point}");
    }
}

fn fixture() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoint-log-v2")
}

fn copy_of_fixture() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(fixture()).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).unwrap();
    }
    dir
}

/// A stored log of [`log_of_six`] merged to three files.
#[test]
fn the_stored_log_keeps_answering() {
    let dir = copy_of_fixture();
    let log = Log::open(dir.path()).unwrap();
    assert!(log.damaged().is_empty());
    let shape: Vec<_> = log.checkpoints().iter().map(|h| (h.id, h.covers.clone())).collect();
    assert_eq!(shape, [(id(4), vec![id(1), id(2), id(3)]), (id(5), vec![]), (id(6), vec![])]);
    assert!(log.checkpoints().iter().all(|h| matches!(h.payload, Payload::Runs { .. })));
    for n in [1, 2, 3] {
        assert_eq!(log.since(id(n)).unwrap(), after(1, 6));
    }
    assert_eq!(log.since(id(4)).unwrap(), after(4, 6));
    assert_eq!(log.since(id(5)).unwrap(), after(5, 6));
}

#[test]
fn a_corrupted_twin_of_the_stored_log_is_noticed() {
    let good = std::fs::read(fixture().join(format!("{}.ckpt", id(4)))).unwrap();
    for at in 0..good.len() {
        let mut twin = good.clone();
        twin[at] ^= 0x10;
        assert!(format::decode(&twin).is_err(), "byte {at}");
        if at % 7 != 0 {
            continue;
        }
        let dir = copy_of_fixture();
        std::fs::write(file(dir.path(), 4), &twin).unwrap();
        let log = Log::open(dir.path()).unwrap();
        for lost in [1, 2, 3] {
            assert!(log.since(id(lost)).is_err(), "byte {at}, checkpoint {lost}");
        }
        assert_eq!(log.since(id(4)).unwrap(), after(4, 6), "byte {at}");
        assert_eq!(log.since(id(5)).unwrap(), after(5, 6), "byte {at}");
    }
}
