//! Sharers: other processes of this host that have a disk's files open for writing. What they write passes our bitmaps by, so
//! a disk that has one counts as shared: it is not tracked, and every backup of it is a scan.
//!
//! QEMU's own locks keep a second QEMU away from an image, unless it was told not to ask (`locking=off`); other programs ask
//! nobody. Looked at at each begin of a backup, when tracking is carried over, and when last bitmaps are taken.
//!
//! **What is not seen**: who came and went between two looks; processes of another host, or that this one may not look into
//! (another user's, without privilege); the kernel itself, as for a loop device. For those there is the audit.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use super::graph::Graph;
use super::medium::{self, Subject};
use super::{Vm, carry};
use crate::checkpoint::FileNumbers;
use crate::wire::message::Failure;

/// Most processes, and most descriptors of one, that are looked at.
const MAX_PROCESSES: usize = 64 << 10;
const MAX_DESCRIPTORS: usize = 64 << 10;
/// `O_ACCMODE` of `flags` in /proc/PID/fdinfo: 0 is reading only.
const ACCESS_MODE: u32 = 0o3;

impl Vm {
    /// The graph, with the disks marked as shared that other processes may write to.
    pub(super) async fn graph_with_sharers(&self) -> Result<Graph, Failure> {
        let mut graph = self.graph().await?;
        let pid = self.inner.qemu.pid;
        let subjects: Vec<_> = graph.disks.iter().map(|d| Subject::of(&graph, &d.disk)).collect();
        let looked = carry::on_files(move || {
            let files: Vec<_> = subjects.iter().map(|subject| medium::numbers_of(pid, subject)).collect();
            let all: Vec<_> = files.iter().flatten().copied().collect();
            let writers = writers(&all, &[pid, std::process::id() as i32]);
            files
                .iter()
                .map(|files| files.iter().find_map(|file| writers.get(&key(*file)).cloned()))
                .collect::<Vec<_>>()
        });
        match looked.await {
            Ok(found) => {
                for (disk, writer) in graph.disks.iter_mut().map(|found| &mut found.disk).zip(found) {
                    disk.shared = disk.shared.take().or(writer);
                }
            }
            // The look at the medium itself says what follows from that.
            Err(why) => tracing::warn!(vm = self.inner.name, "who else has the disks open {why}"),
        }
        Ok(graph)
    }
}

fn key(file: FileNumbers) -> (u64, u64) {
    (file.dev, file.inode)
}

/// Who has one of these files open for writing, by file, in words. Blocks on files.
fn writers(files: &[FileNumbers], but: &[i32]) -> HashMap<(u64, u64), String> {
    let mut found = HashMap::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten().take(MAX_PROCESSES) {
        let pid = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let Some(pid) = pid.filter(|pid| !but.contains(pid)) else { continue };
        for file in written_by(&entry.path(), files) {
            found.entry(key(file)).or_insert_with(|| {
                let name = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                format!("process {pid} ({}) has it open for writing too", name.trim_end())
            });
        }
    }
    found
}

/// Which of these files a process has open for writing.
fn written_by(process: &Path, files: &[FileNumbers]) -> Vec<FileNumbers> {
    let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten().take(MAX_DESCRIPTORS);
    let written = descriptors.filter_map(|descriptor| {
        let target = fs::read_link(descriptor.path()).ok()?;
        if !target.is_absolute() {
            return None; // A socket, a pipe, …
        }
        let info = fs::read_to_string(process.join("fdinfo").join(descriptor.file_name())).ok()?;
        let field = |name: &str| info.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
        let flags = field("flags:").and_then(|flags| u32::from_str_radix(flags, 8).ok())?;
        // Files are told apart without a touch where the kernel says the inode: a dead network file system never answers.
        let inode: Option<u64> = field("ino:").and_then(|inode| inode.parse().ok());
        let may_be = |file: &FileNumbers| match (file.dev, inode) {
            // A block device: its inode is that of a name in /dev.
            (0, _) => target.starts_with("/dev"),
            (_, Some(inode)) => inode == file.inode,
            (_, None) => true,
        };
        if flags & ACCESS_MODE == 0 || !files.iter().any(may_be) {
            return None;
        }
        let numbers = medium::numbers(&fs::metadata(descriptor.path()).ok()?)?;
        files.contains(&numbers).then_some(numbers)
    });
    written.collect()
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn who_writes_is_seen_and_who_reads_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("a"), dir.path().join("b"));
        let numbers = |path: &Path| medium::numbers(&fs::metadata(path).unwrap()).unwrap();
        let _writing = File::create(&path).unwrap();
        fs::write(&other, "").unwrap();
        let _reading = File::open(&other).unwrap();
        let files = [numbers(&path), numbers(&other)];
        let found = writers(&files, &[]);
        assert_eq!(found.keys().copied().collect::<Vec<_>>(), [key(files[0])]);
        let me = std::process::id();
        assert!(found[&key(files[0])].starts_with(&format!("process {me} (")), "{found:?}");
        assert!(writers(&files, &[me as i32]).is_empty());
    }
}
