//! The sealed log: what it answers, what damage does to the answers, and what a kill leaves.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::Command;

use jiff::Timestamp;
use livebackup::checkpoint::format::Content;
use livebackup::checkpoint::{Bitmap, EpochStart, Log, LogError, NotInLog, QemuInstance, Sealed};
use livebackup::extent::Extent;
use livebackup::units::{CheckpointId, EpochId, GRANULE_BYTES};

const SIZE: u64 = 100 * GRANULE_BYTES + 512;

/// A checkpoint or epoch id that the tests can tell by its number.
fn id(n: u8) -> CheckpointId {
    CheckpointId::from_bytes([n; 16])
}

fn epoch(n: u8) -> EpochId {
    EpochId::from_bytes([n; 16])
}

fn granules(list: &[u64]) -> Bitmap {
    let mut bitmap = Bitmap::new(SIZE);
    list.iter().for_each(|g| bitmap.set(Extent::new(g * GRANULE_BYTES, 1)));
    bitmap
}

fn start(epoch_n: u8, first: u8) -> EpochStart {
    EpochStart {
        id: epoch(epoch_n),
        first: id(first),
        time: Timestamp::now(),
        size_bytes: SIZE,
        qemu: QemuInstance { pid: 1, start_time: 2, boot_id: "boot".into() },
        node: "disk0".into(),
        medium: None,
    }
}

fn seal(log: &mut Log, n: u8, prev: u8, bitmap: &Bitmap) -> Result<(), LogError> {
    let number = log.next_number();
    log.seal(Sealed { id: id(n), prev: Some(id(prev)), number, time: Timestamp::now(), bitmap })
}

/// Epoch 1 with checkpoints 1..=5; checkpoint n wrote granule n and granule 50 + n.
fn log_of_five(dir: &Path) -> Log {
    let mut log = Log::open(dir).unwrap();
    log.begin_epoch(start(1, 1), "first").unwrap();
    for n in 2..=5 {
        seal(&mut log, n, n - 1, &granules(&[n.into(), 50 + u64::from(n)])).unwrap();
    }
    log
}

fn file(dir: &Path, n: u8) -> PathBuf {
    dir.join(format!("{}.ckpt", id(n)))
}

#[test]
fn since_is_the_union_of_what_came_after() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of_five(dir.path());
    for log in [log, Log::open(dir.path()).unwrap()] {
        assert_eq!(log.since(id(5)).unwrap(), granules(&[]));
        assert_eq!(log.since(id(4)).unwrap(), granules(&[5, 55]));
        assert_eq!(log.since(id(1)).unwrap(), granules(&[2, 3, 4, 5, 52, 53, 54, 55]));
        assert_eq!(log.since(id(9)).unwrap_err(), NotInLog::Unknown(id(9)));
        assert_eq!(log.last(), Some(id(5)));
        assert_eq!(log.next_number(), 6);
        assert_eq!(log.checkpoints().iter().map(|h| h.id).collect::<Vec<_>>(), [id(1), id(2), id(3), id(4), id(5)]);
        assert!(log.damaged().is_empty() && log.last_end().is_none());
    }
}

#[test]
fn the_end_of_an_epoch_is_told_to_who_asks() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_of_five(dir.path());
    log.end_epoch("the disk was resized").unwrap();
    assert!(matches!(seal(&mut log, 6, 5, &granules(&[])), Err(LogError::NoEpoch(_))));
    let told = |log: &Log| {
        let answer = log.since(id(3)).unwrap_err();
        assert!(matches!(&answer, NotInLog::OtherEpoch { reason, .. } if reason == "the disk was resized"), "{answer}");
        assert_eq!(log.last_end().unwrap().epoch, epoch(1));
        assert_eq!(log.next_number(), if log.epoch().is_some() { 7 } else { 6 });
    };
    told(&log);
    told(&Log::open(dir.path()).unwrap());
    log.begin_epoch(start(2, 10), "not this reason").unwrap();
    told(&log);
    let log = Log::open(dir.path()).unwrap();
    told(&log);
    assert_eq!(log.since(id(10)).unwrap(), granules(&[]));
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2, "old files are gone");
}

#[test]
fn a_new_epoch_ends_the_running_one() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_of_five(dir.path());
    log.begin_epoch(start(2, 10), "the bitmap was gone").unwrap();
    assert!(log.since(id(5)).unwrap_err().to_string().contains("the bitmap was gone"));
    seal(&mut log, 11, 10, &granules(&[7])).unwrap();
    let log = Log::open(dir.path()).unwrap();
    assert_eq!(log.since(id(10)).unwrap(), granules(&[7]));
    assert!(log.since(id(5)).unwrap_err().to_string().contains("the bitmap was gone"));
}

#[test]
fn only_what_follows_is_sealed() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_of_five(dir.path());
    assert!(matches!(seal(&mut log, 7, 4, &granules(&[])), Err(LogError::OutOfOrder { .. })));
    assert!(matches!(seal(&mut log, 6, 5, &Bitmap::new(SIZE + 1)), Err(LogError::WrongSize { .. })));
    assert_eq!(log.last(), Some(id(5)));
    seal(&mut log, 6, 5, &granules(&[])).unwrap();
}

#[test]
fn an_epoch_is_carried_to_another_qemu() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = log_of_five(dir.path());
    let next = QemuInstance { pid: 77, start_time: 3, boot_id: "other".into() };
    log.carry_epoch(next.clone(), "node7", None).unwrap();
    let log = Log::open(dir.path()).unwrap();
    assert_eq!((&log.epoch().unwrap().qemu, log.epoch().unwrap().node.as_str()), (&next, "node7"));
    assert_eq!(log.since(id(4)).unwrap(), granules(&[5, 55]));
}

#[test]
fn damage_breaks_the_chain_only_before_it() {
    let ways: [fn(&Path); 4] = [
        |path| std::fs::remove_file(path).unwrap(),
        |path| std::fs::write(path, b"").unwrap(),
        |path| std::fs::write(path, &std::fs::read(path).unwrap()[..130]).unwrap(),
        |path| {
            let mut bytes = std::fs::read(path).unwrap();
            bytes[20] ^= 1;
            std::fs::write(path, bytes).unwrap();
        },
    ];
    for damage in ways {
        let dir = tempfile::tempdir().unwrap();
        drop(log_of_five(dir.path()));
        damage(&file(dir.path(), 3));
        let mut log = Log::open(dir.path()).unwrap();
        assert_eq!(log.damaged().len(), 1);
        assert_eq!(log.damaged()[0].file, file(dir.path(), 3));
        assert_eq!(log.since(id(4)).unwrap(), granules(&[5, 55]));
        assert_eq!(log.since(id(3)).unwrap(), granules(&[4, 5, 54, 55]), "its own bitmap is not needed");
        for lost in [1, 2] {
            let answer = log.since(id(lost)).unwrap_err();
            assert!(matches!(&answer, NotInLog::Damaged { file: f, .. } if *f == file(dir.path(), 3)), "{answer}");
        }
        seal(&mut log, 6, 5, &granules(&[6])).unwrap();
        assert_eq!(Log::open(dir.path()).unwrap().since(id(4)).unwrap(), granules(&[5, 55, 6]));
    }
}

#[test]
fn a_damaged_bitmap_is_found_when_it_is_needed() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of_five(dir.path());
    let path = file(dir.path(), 4);
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 6;
    bytes[at] ^= 0x40;
    std::fs::write(&path, bytes).unwrap();
    for log in [log, Log::open(dir.path()).unwrap()] {
        assert!(log.damaged().is_empty());
        assert_eq!(log.since(id(4)).unwrap(), granules(&[5, 55]));
        assert!(matches!(log.since(id(3)), Err(NotInLog::Damaged { .. })));
    }
}

#[test]
fn another_checkpoints_file_is_not_taken_for_this_one() {
    let dir = tempfile::tempdir().unwrap();
    let log = log_of_five(dir.path());
    std::fs::copy(file(dir.path(), 2), file(dir.path(), 4)).unwrap();
    assert!(matches!(log.since(id(3)), Err(NotInLog::Damaged { .. })));
    let log = Log::open(dir.path()).unwrap();
    assert!(matches!(log.since(id(2)), Err(NotInLog::Damaged { .. })));
    assert_eq!(log.since(id(4)).unwrap(), granules(&[5, 55]));
}

#[test]
fn a_lost_head_file_answers_for_itself_only() {
    let dir = tempfile::tempdir().unwrap();
    drop(log_of_five(dir.path()));
    std::fs::remove_file(file(dir.path(), 5)).unwrap();
    let log = Log::open(dir.path()).unwrap();
    assert_eq!(log.since(id(5)).unwrap(), granules(&[]));
    let answer = log.since(id(4)).unwrap_err();
    assert!(matches!(&answer, NotInLog::Damaged { file: f, .. } if *f == file(dir.path(), 5)), "{answer}");
}

#[test]
fn a_damaged_epoch_file_means_no_epoch() {
    let dir = tempfile::tempdir().unwrap();
    drop(log_of_five(dir.path()));
    let path = dir.path().join("epoch.json");
    let good = std::fs::read(&path).unwrap();
    for at in 0..good.len() {
        let mut twin = good.clone();
        twin[at] ^= 1;
        for content in [&twin[..], &good[..at]] {
            std::fs::write(&path, content).unwrap();
            let log = Log::open(dir.path()).unwrap();
            assert!(log.epoch().is_none(), "byte {at}");
            assert!(matches!(log.since(id(4)), Err(NotInLog::Damaged { .. })));
        }
    }
    let mut log = Log::open(dir.path()).unwrap();
    log.begin_epoch(start(2, 20), "the log was damaged").unwrap();
    assert!(log.damaged().is_empty() && log.since(id(20)).is_ok());
    assert_eq!(Log::open(dir.path()).unwrap().since(id(4)).unwrap_err(), NotInLog::Unknown(id(4)));
}

/// Checkpoints 2 and 3 merged into 4: asked for 2 or 3, a superset is the answer.
#[test]
fn a_merged_file_answers_for_what_it_covers() {
    for interrupted in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        drop(log_of_five(dir.path()));
        let bitmap = granules(&[2, 3, 4, 52, 53, 54]);
        let (covers, time) = ([id(2), id(3)], Timestamp::now());
        let merged = Content {
            id: id(4),
            prev: Some(id(1)),
            epoch: epoch(1),
            number: 4,
            time,
            covers: &covers,
            bitmap: &bitmap,
        };
        std::fs::write(file(dir.path(), 4), merged.encode().unwrap().1).unwrap();
        if !interrupted {
            std::fs::remove_file(file(dir.path(), 2)).unwrap();
            std::fs::remove_file(file(dir.path(), 3)).unwrap();
        }
        let log = Log::open(dir.path()).unwrap();
        assert!(log.damaged().is_empty());
        let all = granules(&[2, 3, 4, 5, 52, 53, 54, 55]);
        for covered in [1, 2, 3] {
            assert_eq!(log.since(id(covered)).unwrap(), all);
        }
        assert_eq!(log.since(id(4)).unwrap(), granules(&[5, 55]));
    }
}

#[test]
fn a_long_log_opens_by_its_headers() {
    let dir = tempfile::tempdir().unwrap();
    let mut log = Log::open(dir.path()).unwrap();
    let tib = 1 << 40;
    let first = CheckpointId::random();
    log.begin_epoch(EpochStart { first, size_bytes: tib, ..start(1, 1) }, "first").unwrap();
    let mut prev = first;
    for n in 0..100u64 {
        let mut bitmap = Bitmap::new(tib);
        bitmap.set(Extent::new(n << 33, 1));
        let id = CheckpointId::random();
        log.seal(Sealed { id, prev: Some(prev), number: n + 2, time: Timestamp::now(), bitmap: &bitmap }).unwrap();
        prev = id;
    }
    let log = Log::open(dir.path()).unwrap();
    assert_eq!(log.checkpoints().len(), 101);
    assert_eq!(log.since(first).unwrap().count_granules(), 100);
}

const CHILD: &str = "LIVEBACKUP_TEST_LOG_DIR";

/// Run by the kill test in a process of its own: a new epoch, and a seal after the head of it.
#[test]
fn child_of_the_kill_test() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let mut log = Log::open(Path::new(&dir)).unwrap();
    if log.epoch().is_some_and(|e| e.id == epoch(1)) {
        log.begin_epoch(start(2, 10), "killed").unwrap();
    }
    seal(&mut log, 11, 10, &granules(&[11])).unwrap();
    seal(&mut log, 12, 11, &granules(&[12])).unwrap();
}

#[test]
fn a_kill_at_any_point_loses_nothing_that_was_promised() {
    let mut points = vec!["epoch.first".to_owned(), "epoch.begun".to_owned()];
    points.extend((1..=2).flat_map(|n| [format!("seal.written:{n}"), format!("seal.done:{n}")]));
    points.extend((1..=6).flat_map(|n| ["written", "flushed", "renamed"].map(|p| format!("durable.{p}:{n}"))));
    for point in points {
        let dir = tempfile::tempdir().unwrap();
        drop(log_of_five(dir.path()));
        let status = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "checkpoint_log::child_of_the_kill_test", "--test-threads=1"])
            .env(CHILD, dir.path())
            .env("LIVEBACKUP_KILL_AT", &point)
            .stdout(std::process::Stdio::null())
            .status()
            .unwrap();
        assert!(!status.success(), "{point}: the child was not killed");

        let mut log = Log::open(dir.path()).unwrap();
        assert!(log.damaged().is_empty(), "{point}: {:?}", log.damaged());
        if log.epoch().unwrap().id == epoch(1) {
            assert_eq!(log.since(id(3)).unwrap(), granules(&[4, 5, 54, 55]), "{point}");
            log.begin_epoch(start(2, 10), "killed").unwrap();
        }
        // Whatever the head is, everything before it is whole, and the log goes on from it.
        let expected = match log.last().unwrap() {
            last if last == id(10) => granules(&[]),
            last if last == id(11) => granules(&[11]),
            last if last == id(12) => granules(&[11, 12]),
            other => panic!("{point}: the head is {other}"),
        };
        assert_eq!(log.since(id(10)).unwrap(), expected, "{point}");
        let written = ["seal.written:2", "seal.done:2", "durable.renamed:6"].contains(&point.as_str());
        assert!(!written || log.last() == Some(id(12)), "{point}: a sealed checkpoint was lost");
        let files = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(files, log.checkpoints().len() + 1, "{point}: something was left behind");
        let last = log.last().unwrap();
        let bitmap = granules(&[99]);
        let number = log.next_number();
        log.seal(Sealed { id: id(13), prev: Some(last), number, time: Timestamp::now(), bitmap: &bitmap }).unwrap();
        assert_eq!(Log::open(dir.path()).unwrap().since(last).unwrap(), bitmap, "{point}");
    }
}
