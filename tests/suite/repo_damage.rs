//! A repository of format version 1 keeps opening, and each of its corrupted twins gives the right error.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};

use crate::repo_common::*;
use livebackup::repo::verify::{Report, Scope, verify};
use livebackup::repo::{Manifest, RepoError, Repository, WriterOptions};

/// A copy of the stored example that a test may damage.
fn example() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let to = dir.path().join("repo");
    copy_tree(&fixture(), &to);
    (dir, to)
}

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/repo-v1")
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_tree(&entry.path(), &to);
        } else if entry.file_name() != ".keep" {
            fs::copy(entry.path(), &to).unwrap();
        }
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(files(&path));
        } else if !path.ends_with(".keep") {
            found.push(path);
        }
    }
    found.sort();
    found
}

fn flip(path: &Path, at: impl FnOnce(usize) -> usize) {
    let mut bytes = fs::read(path).unwrap();
    let at = at(bytes.len());
    bytes[at] ^= 0x10;
    fs::write(path, bytes).unwrap();
}

/// The two versions of the example's disk, as `make_example` writes them.
fn versions() -> [Vec<u8>; 2] {
    let first = pattern(1, EXAMPLE_BYTES);
    let mut second = first.clone();
    second[65536..131_072].copy_from_slice(&pattern(2, 65536));
    second[131_072..196_608].fill(0);
    [first, second]
}

/// The stored example was written by this once; a new version of the format adds a directory, and never touches an old
/// one.
#[test]
fn the_example_can_be_made_again() {
    let dir = tempfile::tempdir().unwrap();
    let example = dir.path().join("example");
    let repo = Repository::init(&example, 65536).unwrap();
    let mut base = None;
    for disk in versions() {
        let stored = store(&repo, &disk, 65536, base);
        base = Some(stored);
        repo.commit(&manifest("example/vm", &[("disk0", stored)])).unwrap();
    }
    assert!(check(&example).is_intact());
    let images = |repo: &Path| points(repo).iter().map(|p| p.disks[0].image).collect::<Vec<_>>();
    assert_eq!(images(&example), images(&fixture()), "the same bytes give the same trees as when the example was made");
}

fn check(repo: &Path) -> Report {
    let repo = Repository::open(repo).unwrap();
    verify(&repo, Scope::Everything, |_| {}).unwrap()
}

fn points(repo: &Path) -> Vec<Manifest> {
    Repository::open(repo).unwrap().points("example/vm").unwrap().points
}

/// Packs of the example: (data, tree), told apart by their headers.
fn packs(repo: &Path, kind: u8) -> Vec<PathBuf> {
    files(&repo.join("packs")).into_iter().filter(|p| fs::read(p).unwrap()[10] == kind).collect()
}

#[test]
fn version_1_keeps_opening() {
    let (_dir, path) = example();
    let repo = Repository::open(&path).unwrap();
    assert_eq!(repo.vms().unwrap(), ["example/vm"]);
    let points = points(&path);
    for (point, expected) in points.iter().zip(versions()) {
        assert!(read_back(&repo, point.disks[0].image) == expected);
    }
    assert_eq!(points.len(), 2);
    let report = check(&path);
    assert!(report.is_intact(), "{:?}", report.damage);
    assert_eq!((report.points, report.packs), (2, 4));
    let report = verify(&repo, Scope::Points(&points[..1]), |_| {}).unwrap();
    assert!(report.is_intact());
}

#[test]
fn a_flipped_bit_in_a_chunk_is_named_down_to_the_disk() {
    let (_dir, path) = example();
    let points = points(&path);
    for pack in packs(&path, 0) {
        flip(&pack, |_| 4096 + 100);
    }
    let report = check(&path);
    assert_eq!(report.damage.len(), 2);
    for damage in &report.damage {
        assert!(matches!(damage.error, RepoError::DamagedBlob { offset_bytes: 4096, .. }), "{}", damage.error);
        assert!(!damage.intact_copy);
        for affected in &damage.affected {
            assert_eq!((affected.vm.as_str(), affected.disk.as_str()), ("example/vm", "disk0"));
        }
    }
    let mut affected: Vec<_> = report.damage.iter().flat_map(|d| &d.affected).collect();
    affected.sort_by_key(|a| (a.extent, a.point != points[0].id));
    let found: Vec<_> = affected.iter().map(|a| (a.point, a.extent.offset_bytes, a.extent.len_bytes)).collect();
    let (one, two) = (points[0].id, points[1].id);
    assert_eq!(found, [(one, 0, 65536), (two, 0, 65536), (two, 65536, 65536)]);
    let repo = Repository::open(&path).unwrap();
    let error = repo.reader().unwrap().read_image(points[0].disks[0].image, &Default::default(), |_, _| Ok(()));
    assert!(matches!(error, Err(RepoError::DamagedBlob { .. })));
}

#[test]
fn a_flipped_bit_in_a_tree_names_the_bytes_that_are_lost() {
    let (_dir, path) = example();
    for pack in packs(&path, 1) {
        flip(&pack, |_| 4096 + 60);
    }
    let report = check(&path);
    assert_eq!(report.damage.len(), 2);
    for damage in &report.damage {
        assert_eq!(damage.affected.len(), 1);
        assert_eq!(damage.affected[0].extent.len_bytes, EXAMPLE_BYTES as u64, "{}", damage.error);
    }
}

#[test]
fn a_cut_pack_is_named_and_what_is_left_of_it_is_checked() {
    let (_dir, path) = example();
    for pack in packs(&path, 0) {
        let len = fs::metadata(&pack).unwrap().len();
        fs::File::options().write(true).open(&pack).unwrap().set_len(len - 200).unwrap();
    }
    let report = check(&path);
    let named = report.damage.iter().filter(|d| d.error.to_string().contains("cut short")).count();
    assert_eq!(named, 2, "{:?}", report.damage);
    assert_eq!(report.blobs, check(&fixture_copy().1).blobs, "blobs are found by the index");

    // A new backup does not build on a pack that is cut: it stores the chunks again, and so heals.
    let repo = Repository::open(&path).unwrap();
    for (disk, point) in versions().iter().zip(points(&path)) {
        assert_eq!(store(&repo, disk, 65536, None), point.disks[0].image);
    }
    let report = check(&path);
    assert!(report.damage.iter().all(|d| d.affected.is_empty()), "{:?}", report.damage);
}

fn fixture_copy() -> (tempfile::TempDir, PathBuf) {
    example()
}

#[test]
fn a_lost_pack_is_named_with_all_that_rests_on_it() {
    let (_dir, path) = example();
    for pack in packs(&path, 0) {
        fs::remove_file(&pack).unwrap();
    }
    let report = check(&path);
    let points: std::collections::HashSet<_> =
        report.damage.iter().flat_map(|d| &d.affected).map(|a| a.point).collect();
    assert_eq!(points.len(), 2);
    assert!(report.damage[0].error.to_string().contains("packs/"), "{}", report.damage[0].error);
}

#[test]
fn a_flipped_bit_in_an_index_is_found_wherever_it_is_and_the_index_made_again() {
    let (_dir, path) = example();
    let index = files(&path.join("index")).remove(0);
    let good = fs::read(&index).unwrap();
    for at in 0..good.len() {
        flip(&index, |_| at);
        let report = check(&path);
        let named = report.damage.iter().any(|d| d.error.to_string().contains(&*index.to_string_lossy()));
        assert!(named, "byte {at}: {:?}", report.damage);
        assert!(report.damage.iter().all(|d| d.affected.is_empty()), "byte {at}: {:?}", report.damage);
        assert!(!index.exists() && check(&path).is_intact(), "byte {at}");
        files(&path.join("index")).into_iter().for_each(|made| fs::remove_file(made).unwrap());
        fs::write(&index, &good).unwrap();
    }
}

#[test]
fn what_a_damaged_or_lost_index_listed_is_found_all_the_same() {
    let (_dir, path) = example();
    let repo = Repository::open(&path).unwrap();
    let known = |repo: &Repository| {
        let mut packs: Vec<_> = repo.reader().unwrap().index().packs().unwrap().into_iter().map(|p| p.id).collect();
        packs.sort_unstable();
        packs
    };
    let all = known(&repo);
    let index = files(&path.join("index")).remove(0);
    let good = fs::read(&index).unwrap();
    for bad in [vec![], good[..good.len() - 1].to_vec(), [&good[..], b"x"].concat(), vec![0; good.len()]] {
        fs::write(&index, &bad).unwrap();
        // A reader changes nothing.
        assert_eq!(known(&repo), all);
        assert_eq!(fs::read(&index).unwrap(), bad);
    }
    // A writer makes it again.
    drop(repo.writer(WriterOptions::default()).unwrap());
    assert!(!index.exists());
    assert_eq!(known(&repo), all);
    assert!(check(&path).is_intact());
    for index in files(&path.join("index")) {
        fs::remove_file(index).unwrap();
    }
    assert!(check(&path).is_intact());
    assert_eq!(known(&repo), all);
}

#[test]
fn a_flipped_bit_in_a_manifest_is_named() {
    let (_dir, path) = example();
    let manifest = files(&path.join("points")).remove(0);
    flip(&manifest, |len| len / 2);
    let report = check(&path);
    assert_eq!(report.damage.len(), 1);
    assert!(
        matches!(&report.damage[0].error, RepoError::Corrupt { what: "restore point", path, .. } if *path == manifest)
    );
}

/// Nobody gets an older point than he has asked for.
#[test]
fn the_latest_is_not_guessed_where_a_manifest_is_damaged() {
    let (_dir, path) = example();
    let repo = Repository::open(&path).unwrap();
    let vm = repo.vms().unwrap().remove(0);
    let points = repo.points(&vm).unwrap().points;
    let (first, last) = (points.first().unwrap().id, points.last().unwrap().id);
    let file = files(&path.join("points")).into_iter().find(|file| file.to_string_lossy().contains(&last.to_string()));
    flip(&file.unwrap(), |len| len / 2);
    for name in ["latest", "latest~1"] {
        let error = repo.find_point(&vm, name).unwrap_err();
        assert!(matches!(&error, RepoError::LatestUnknown { .. }), "{error}");
        assert!(error.to_string().contains("is damaged"), "{error}");
    }
    assert_eq!(repo.find_point(&vm, &first.to_string()).unwrap().id, first);
    assert_eq!(repo.find_point(&vm, &first.to_string()[..8]).unwrap().id, first);
}

#[test]
fn what_is_no_repository_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let say = |path: &Path| Repository::open(path).unwrap_err().to_string();
    assert!(say(&dir.path().join("nowhere")).contains("no such directory"));
    assert!(say(dir.path()).contains("no file `config`"));
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    assert!(say(&file).contains("not a directory"));
    assert!(matches!(Repository::init(dir.path(), 65536), Err(RepoError::CannotInit { .. })));
    assert!(matches!(Repository::init(&fixture(), 65536), Err(RepoError::CannotInit { .. })));

    let (_dir, path) = example();
    let config = fs::read_to_string(path.join("config")).unwrap();
    fs::write(path.join("config"), config.replace("\"version\":1", "\"version\":2")).unwrap();
    assert!(say(&path).contains("use a newer livebackup"), "{}", say(&path));
    fs::write(path.join("config"), "{}").unwrap();
    assert!(say(&path).contains("damaged"));
}

#[test]
fn a_lost_config_is_made_anew_and_points_stay() {
    let (_dir, path) = example();
    let open = || Repository::open(&path);
    let chunk_bytes = open().unwrap().config().chunk_bytes;
    for lose in
        [|config: &Path| fs::write(config, "rubbish").unwrap(), |config: &Path| fs::remove_file(config).unwrap()]
    {
        lose(&path.join("config"));
        let error = open().unwrap_err();
        assert!(matches!(error, RepoError::BadConfig { .. }), "{error}");
        for part in [path.join("config").to_str().unwrap(), "a copy", "livebackup init", "--chunk-size"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        // As it says.
        let _ = fs::remove_file(path.join("config"));
        let repo = Repository::init(&path, chunk_bytes).unwrap();
        let vm = repo.vms().unwrap().remove(0);
        assert_eq!(repo.points(&vm).unwrap().points.len(), 2);
        assert!(verify(&repo, Scope::Everything, |_| ()).unwrap().is_intact());
    }
}
