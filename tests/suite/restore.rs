//! What is restored is what was backed up. The oracle is the bytes that the test itself stored; qcow2 images are judged by
//! `qemu-img`.

#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::AtomicBool;

use crate::repo_common::{pattern, store};
use crate::restore_common::*;
use livebackup::machine::{Disk, FoundDisk, MediumFile, Verdict};
use livebackup::repo::point::{ChoiceError, PointFile};
use livebackup::restore::{DiskTarget, Format, Progress, RestoreError, RestoreOptions, restore};
use livebackup::units::MIB;

fn odd_disks() -> Vec<(&'static str, Vec<u8>)> {
    let (chunk, mib) = (CHUNK as usize, MIB as usize);
    vec![
        ("odd", mixed(1, mib + 512)),
        ("three", mixed(2, 3 * chunk + 512)),
        ("nothing", vec![]),
        ("zero", vec![0; 5 * mib]),
        ("small", pattern(3, 1024)),
        ("long", mixed(4, 40 * mib + 1536)),
    ]
}

#[test]
fn every_byte_comes_back() {
    let stored = stored(odd_disks());
    for compare in [false, true] {
        let options = RestoreOptions { compare, force: compare, ..stored.options() };
        let said = RefCell::new(Vec::<Progress>::new());
        let mut progress = |p| said.borrow_mut().push(p);
        let report = restore(&stored.repo, &stored.point, &options, &AtomicBool::new(false), &mut progress).unwrap();
        for ((name, bytes), disk) in stored.disks.iter().zip(&report.disks) {
            assert_eq!(disk.path, stored.out().join(format!("{name}.raw")));
            assert!(fs::read(&disk.path).unwrap() == *bytes, "{name}");
            assert_eq!((&disk.disk, disk.size_bytes, disk.compared), (name, bytes.len() as u64, compare));
            assert_eq!(disk.data_bytes + disk.zero_bytes, disk.size_bytes);
        }
        let zero = &report.disks[3];
        assert_eq!((zero.data_bytes, fs::metadata(&zero.path).unwrap().blocks()), (0, 0), "zeroes are holes");
        let long = fs::metadata(&report.disks[5].path).unwrap();
        assert!(long.blocks() * 512 < 33 * MIB, "so are zeroes within chunks: {} KiB", long.blocks() / 2);
        let last = said.borrow().last().unwrap().clone();
        assert_eq!(last.done_bytes, last.total_bytes);
        assert!(last.total_bytes > 20 * MIB);
        let mut names: Vec<_> = fs::read_dir(stored.out()).unwrap().map(|e| e.unwrap().file_name()).collect();
        names.sort();
        let expected = ["long.raw", "machine.json", "nothing.raw", "odd.raw", "small.raw", "three.raw", "zero.raw"];
        assert_eq!(names, expected, "and nothing else");
    }
}

#[test]
fn qcow2_is_what_qemu_calls_whole_and_equal() {
    let mut disks = odd_disks();
    // Past one L2 table, with a table in between that is not needed.
    let mut wide = vec![0; 1600 * MIB as usize + 512];
    wide[511 * MIB as usize..513 * MIB as usize].copy_from_slice(&pattern(5, 2 * MIB as usize));
    let len = wide.len();
    wide[len - 700_000..].copy_from_slice(&pattern(6, 700_000));
    disks.push(("wide", wide));
    let stored = stored(disks);
    let options = RestoreOptions { format: Format::Qcow2, compare: true, ..stored.options() };
    let report = stored.restore(&options).unwrap();
    for ((name, bytes), disk) in stored.disks.iter().zip(&report.disks) {
        assert_eq!(disk.path, stored.out().join(format!("{name}.qcow2")));
        assert_eq!(disk.format, Format::Qcow2);
        let image = disk.path.to_str().unwrap();
        let checked = run("qemu-img", &["check", "-f", "qcow2", image]);
        assert!(checked.contains("No errors"), "{name}: {checked}");
        let info = run("qemu-img", &["info", "-f", "qcow2", "--output=json", image]);
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!(info["virtual-size"], bytes.len(), "{name}");
        let raw = stored.dir.path().join("expected.raw");
        fs::write(&raw, bytes).unwrap();
        if !bytes.is_empty() {
            run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", raw.to_str().unwrap(), image]);
        }
    }
}

#[test]
fn a_qcow2_goes_on_to_be_used() {
    let stored = stored(vec![("d", mixed(1, 9 * MIB as usize))]);
    let options = RestoreOptions { format: Format::Qcow2, ..stored.options() };
    let image = stored.restore(&options).unwrap().disks[0].path.clone();
    let image = image.to_str().unwrap();
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 9 0 9M", "-c", "discard 1M 2M", image]);
    run("qemu-img", &["resize", "-q", "-f", "qcow2", image, "3G"]);
    run("qemu-img", &["snapshot", "-c", "one", image]);
    assert!(run("qemu-img", &["check", "-f", "qcow2", image]).contains("No errors"));
}

#[test]
fn some_disks_and_targets() {
    let stored = stored(vec![
        ("a", mixed(1, 700_000)),
        ("b", mixed(2, 300_000)),
        ("c", mixed(3, 5000)),
        ("../evil", pattern(4, 512)),
    ]);
    let elsewhere = stored.dir.path().join("elsewhere.img");
    let disks =
        vec![target("c", Some(elsewhere.clone())), target("a", None), target("../evil", Some(stored.out().join("e")))];
    let options = RestoreOptions { disks, ..stored.options() };
    let report = stored.restore(&options).unwrap();
    let paths: Vec<_> = report.disks.iter().map(|d| (d.disk.as_str(), d.path.clone())).collect();
    let expected = [("c", elsewhere.clone()), ("a", stored.out().join("a.raw")), ("../evil", stored.out().join("e"))];
    assert_eq!(paths, expected);
    for (name, path) in paths {
        assert!(fs::read(path).unwrap() == stored.bytes(name), "{name}");
    }
    assert!(!stored.out().join("b.raw").exists());
    // Another disk of the same point beside them: the definition is the same.
    let options = RestoreOptions { disks: vec![target("b", None)], ..stored.options() };
    stored.restore(&options).unwrap();
    assert!(fs::read(stored.out().join("b.raw")).unwrap() == stored.bytes("b"));
    // Another point's definition is not replaced unasked.
    let mut other = stored.point.clone();
    other.id = livebackup::units::PointId::random();
    let options = RestoreOptions { disks: vec![target("b", Some(stored.out().join("b2")))], ..stored.options() };
    let error = restore(&stored.repo, &other, &options, &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert!(matches!(&error, RestoreError::Exists { path } if path.ends_with("machine.json")), "{error}");
}

#[test]
fn what_cannot_be_is_refused_before_anything_is_written() {
    let stored = stored(vec![("a", mixed(1, 700_000)), ("b", pattern(2, 300_001))]);
    let with = |disks: Vec<DiskTarget>| RestoreOptions { disks, ..stored.options() };

    let error = stored.refused(&with(vec![target("A", None)])).to_string();
    assert!(error.contains("\"A\"") && error.contains("\"a\", \"b\""), "{error}");
    let error = stored.refused(&with(vec![target("a", None), target("a", Some("/nowhere/x".into()))]));
    assert!(matches!(error, RestoreError::Choice(ChoiceError::Twice { .. })), "{error}");
    let here = stored.dir.path().join("x");
    let error = stored.refused(&with(vec![target("a", Some(here.clone())), target("b", Some(here.clone()))]));
    assert!(matches!(error, RestoreError::SameTarget { .. }), "{error}");
    let roundabout = stored.dir.path().join("repo/../x");
    let error = stored.refused(&with(vec![target("a", Some(here.clone())), target("b", Some(roundabout))]));
    assert!(matches!(error, RestoreError::SameTarget { .. }), "{error}");
    let error = stored.refused(&with(vec![target("a", None), target("b", Some(stored.out().join("a.raw")))]));
    assert!(matches!(error, RestoreError::SameTarget { .. }), "{error}");
    let error = stored.refused(&with(vec![target("a", Some(stored.out().join("machine.json")))]));
    assert!(matches!(error, RestoreError::SameTarget { .. }), "{error}");
    let error = stored.refused(&with(vec![target("a", Some(stored.dir.path().join("missing/x")))]));
    assert!(matches!(error, RestoreError::Io { .. }), "{error}");
    let error = stored.refused(&with(vec![target("a", Some(stored.dir.path().to_owned()))]));
    assert!(error.to_string().contains("directory"), "{error}");
    let error = stored.refused(&with(vec![target("a", Some("/dev/null".into()))]));
    assert!(matches!(error, RestoreError::NotATarget { .. }), "{error}");
    let error = stored.refused(&with(vec![target("a", Some(stored.dir.path().join("repo/packs/x")))]));
    assert!(matches!(error, RestoreError::InRepository { .. }), "{error}");
    let error = stored.refused(&RestoreOptions { dir: stored.dir.path().join("repo/out"), ..stored.options() });
    assert!(matches!(error, RestoreError::InRepository { .. }), "{error}");
    let error = stored.refused(&RestoreOptions { format: Format::Qcow2, ..stored.options() });
    assert!(error.to_string().contains("512"), "{error}");
    fs::write(&here, "here").unwrap();
    let error = stored.refused(&with(vec![target("b", Some(here.join("x")))]));
    assert!(matches!(error, RestoreError::Io { .. }), "{error}");
    let error = stored.refused(&RestoreOptions { dir: here, ..stored.options() });
    assert!(error.to_string().contains("create the directory"), "{error}");
}

#[test]
fn existing_files_are_replaced_only_by_force_and_only_when_all_is_written() {
    let stored = stored(vec![("a", mixed(1, 700_000)), ("b", mixed(2, 300_000))]);
    fs::create_dir_all(stored.out()).unwrap();
    let (a, b) = (stored.out().join("a.raw"), stored.out().join("b.raw"));
    fs::write(&b, "precious").unwrap();
    assert!(matches!(stored.refused(&stored.options()), RestoreError::Exists { path } if path == b));
    let force = RestoreOptions { force: true, ..stored.options() };

    // The second disk cannot be read: neither is there, the old file is.
    let mut broken = stored.point.clone();
    broken.disks[1].image.root = livebackup::repo::Digest::of(b"not there");
    let before = tree(stored.dir.path());
    restore(&stored.repo, &broken, &force, &AtomicBool::new(false), &mut |_| {}).unwrap_err();
    assert_eq!(tree(stored.dir.path()), before);

    // A file that is in use, as QEMU's images are.
    let qemu = fs::OpenOptions::new().read(true).write(true).open(&b).unwrap();
    // SAFETY: all-zero bytes are a valid flock.
    let mut lock: nix::libc::flock = unsafe { std::mem::zeroed() };
    (lock.l_type, lock.l_start, lock.l_len) = (nix::libc::F_RDLCK as _, 100, 1);
    nix::fcntl::fcntl(&qemu, nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    assert!(matches!(stored.refused(&force), RestoreError::InUse { .. }));
    drop(qemu);

    stored.restore(&force).unwrap();
    assert!(fs::read(&a).unwrap() == stored.bytes("a") && fs::read(&b).unwrap() == stored.bytes("b"));

    // Links are not followed to files.
    fs::remove_file(&a).unwrap();
    symlink(&b, &a).unwrap();
    assert!(matches!(stored.refused(&force), RestoreError::NotATarget { .. }));
}

#[test]
fn hostile_names_stay_inside_or_are_refused() {
    for name in ["../x", "/tmp/absolute-livebackup", "a/b", "a\0b", "", ".", "..", ".hidden", "a\nb", &"x".repeat(250)]
    {
        let stored = stored(vec![(name, pattern(1, 512))]);
        let error = stored.refused(&stored.options());
        assert!(matches!(error, RestoreError::UnsafeName { .. }), "{name:?}: {error}");
        let message = error.to_string();
        assert!(!message.contains(['\0', '\n']), "{message:?}");
    }
    let mut stored = stored(vec![("d", pattern(1, 512))]);
    let image = store(&stored.repo, b"kernel", CHUNK, None);
    let names = ["/boot/vmlinuz", "../../vmlinuz", "/x/.profile", "rel/ü b*", "vmlinuz"];
    stored.point.files = names.iter().map(|name| PointFile { name: (*name).to_owned(), image }).collect();
    let report = stored.restore(&stored.options()).unwrap();
    let made: Vec<_> =
        report.files.iter().map(|f| f.strip_prefix(stored.out().canonicalize().unwrap()).unwrap()).collect();
    let expected = ["vmlinuz", "vmlinuz~2", "_.profile", "__b_", "vmlinuz~3"].map(|name| Path::new("files").join(name));
    assert_eq!(made, expected);
    assert!(report.files.iter().all(|file| fs::read(file).unwrap() == b"kernel"));
    for name in ["..", "/boot/", "", "a\0b", "/boot/..", "a\nb"] {
        stored.point.files = vec![PointFile { name: name.to_owned(), image }];
        let error = stored.refused(&RestoreOptions { force: true, ..stored.options() });
        assert!(matches!(error, RestoreError::UnsafeName { what: "file", .. }), "{name:?}: {error}");
    }
    // The directory of files is not one somewhere else.
    stored.point.files = vec![PointFile { name: "k".to_owned(), image }];
    fs::remove_dir_all(stored.out().join("files")).unwrap();
    symlink(stored.dir.path(), stored.out().join("files")).unwrap();
    stored.refused(&RestoreOptions { force: true, ..stored.options() });
}

#[test]
fn the_definition_says_what_the_machine_was() {
    let mut stored = stored(vec![("root", mixed(1, 700_000)), ("data", mixed(2, 1024))]);
    let medium = |format: &str, filename: &str| MediumFile {
        format: format.to_owned(),
        protocol: "file".to_owned(),
        filename: filename.to_owned(),
        read_only: false,
    };
    stored.point.disks[0].disk.chain = vec![medium("qcow2", "/old/root.qcow2"), medium("raw", "/old/base.raw")];
    stored.point.disks[1].disk.chain = vec![medium("raw", "/old/data,1")];
    let kernel = store(&stored.repo, b"kernel", CHUNK, None);
    stored.point.files = vec![PointFile { name: "/boot/vmlinuz".to_owned(), image: kernel }];
    stored.point.machine.command_line = [
        "qemu-system-x86_64",
        "-name",
        "it's me",
        "-kernel",
        "/boot/vmlinuz",
        "-drive",
        "file=/old/root.qcow2,format=qcow2,id=root",
        "-blockdev",
        r#"{"driver":"raw","node-name":"n","file":{"driver":"file","filename":"/old/data,1"}}"#,
        "-drive",
        "file=/old/root.qcow2.other,id=x",
    ]
    .map(str::to_owned)
    .to_vec();
    let left_out = Disk {
        name: "x".to_owned(),
        chain: vec![medium("raw", "/old/root.qcow2.other")],
        ..stored.point.disks[0].disk.clone()
    };
    stored.point.left_out = vec![FoundDisk { disk: left_out, verdict: Verdict::LeftOut("it was excluded".to_owned()) }];
    let report = stored.restore(&stored.options()).unwrap();
    let definition: serde_json::Value = serde_json::from_slice(&fs::read(&report.definition).unwrap()).unwrap();
    assert_eq!(definition["machine"]["command_line"][2], "it's me");
    assert_eq!(definition["disks"][0]["chain"][1]["filename"], "/old/base.raw");
    assert_eq!(definition["point"], stored.point.id.to_string());

    let command = report.command.unwrap();
    let text = fs::read_to_string(&command).unwrap();
    assert!(text.lines().next().unwrap().contains("NOT RUN"), "{text}");
    assert!(text.contains("its format was \"qcow2\" and is \"raw\" now"), "{text}");
    let note = "argument 10 is unchanged; it names device \"x\", which was left out of the backup";
    assert!(text.contains(note), "{text}");
    // The rest is what a shell reads as arguments.
    let script = text.replacen("\nqemu-system-x86_64", "\nprintf '%s\\0' qemu-system-x86_64", 1);
    let said = run("sh", &["-c", &script]);
    let arguments: Vec<_> = said.strip_suffix('\0').unwrap().split('\0').collect();
    let out = stored.out().canonicalize().unwrap();
    let expected = [
        "qemu-system-x86_64".to_owned(),
        "-name".to_owned(),
        "it's me".to_owned(),
        "-kernel".to_owned(),
        out.join("files/vmlinuz").to_str().unwrap().to_owned(),
        "-drive".to_owned(),
        format!("file={},format=qcow2,id=root", out.join("root.raw").display()),
        "-blockdev".to_owned(),
        format!(
            r#"{{"driver":"raw","node-name":"n","file":{{"driver":"file","filename":"{}"}}}}"#,
            out.join("data.raw").display()
        ),
        "-drive".to_owned(),
        "file=/old/root.qcow2.other,id=x".to_owned(),
    ];
    assert_eq!(arguments, expected);
}
