//! What a machine needs beside its disks: its definition for programs, and its command line for people.

use std::fs;
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use serde::Serialize;

use crate::durable::{self, Replace};
use crate::machine::{Disk, FoundDisk, Machine};
use crate::repo::Manifest;
use crate::repo::point::Grade;
use crate::restore::error::RestoreError;
use crate::restore::plan::{Item, Plan};
use crate::restore::{Format, RestoreOptions};
use crate::units::PointId;

/// The definition, in the directory of a restore.
pub(super) const DEFINITION_FILE: &str = "machine.json";
/// The command line, in the directory of a restore.
pub(super) const COMMAND_FILE: &str = "qemu-command.txt";
const COMMAND_TITLE: &str = "# QEMU's command line, as livebackup recorded and adapted it. IT WAS NOT RUN.";

#[derive(Serialize)]
struct Definition<'a> {
    vm: &'a str,
    point: PointId,
    instant: Timestamp,
    grade: Grade,
    machine: &'a Machine,
    disks: Vec<&'a Disk>,
    left_out: &'a [FoundDisk],
    files: Vec<&'a str>,
}

fn definition(manifest: &Manifest) -> Result<Vec<u8>, RestoreError> {
    let definition = Definition {
        vm: &manifest.vm,
        point: manifest.id,
        instant: manifest.instant,
        grade: manifest.grade,
        machine: &manifest.machine,
        disks: manifest.disks.iter().map(|disk| &disk.disk).collect(),
        left_out: &manifest.left_out,
        files: manifest.files.iter().map(|file| file.name.as_str()).collect(),
    };
    let bytes = serde_json::to_vec_pretty(&definition);
    let mut bytes = bytes.map_err(|e| RestoreError::io("make", Path::new(DEFINITION_FILE))(e.into()))?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Whether the definition can be written: the same one may be there, from a restore of other disks of the point.
pub(super) fn may_write_definition(manifest: &Manifest, dir: &Path, force: bool) -> Result<(), RestoreError> {
    let path = dir.join(DEFINITION_FILE);
    let ours = definition(manifest)?;
    may_write(path, force, |found| found == ours)
}

/// Whether the command line can be written: another of ours is replaced.
pub(super) fn may_write_command(dir: &Path, force: bool) -> Result<(), RestoreError> {
    may_write(dir.join(COMMAND_FILE), force, |found| found.starts_with(COMMAND_TITLE.as_bytes()))
}

fn may_write(path: PathBuf, force: bool, is_ours: impl Fn(&[u8]) -> bool) -> Result<(), RestoreError> {
    match fs::symlink_metadata(&path) {
        Err(_) => Ok(()),
        Ok(found) if found.is_dir() => Err(RestoreError::NotATarget { path, kind: "a directory" }),
        Ok(_) if force => Ok(()),
        Ok(found) if found.is_file() && fs::read(&path).is_ok_and(|found| is_ours(&found)) => Ok(()),
        Ok(_) => Err(RestoreError::Exists { path }),
    }
}

/// Writes both, after the disks have their names. Says where they are.
pub(super) fn write(
    manifest: &Manifest,
    plan: &Plan,
    options: &RestoreOptions,
) -> Result<(PathBuf, Option<PathBuf>), RestoreError> {
    // What is there was looked at in the plan.
    let command_path = (!manifest.machine.command_line.is_empty()).then(|| options.dir.join(COMMAND_FILE));
    if let Some(path) = &command_path {
        durable::write_file(path, command(manifest, &plan.items, &plan.dir).as_bytes(), Replace::Yes)?;
    }
    let path = options.dir.join(DEFINITION_FILE);
    durable::write_file(&path, &definition(manifest)?, Replace::Yes)?;
    Ok((path, command_path))
}

/// A path of the old host that an argument may name.
struct Known<'a> {
    old: &'a str,
    new: Option<&'a Path>,
    what: String,
    /// What the file is now, where that is not what it was.
    changed: Option<String>,
}

/// The recorded command line as a shell script, with what has to be known of it in comments above.
fn command(manifest: &Manifest, items: &[Item], dir: &Path) -> String {
    let mut known = Vec::new();
    for disk in &manifest.disks {
        let name = &disk.disk.name;
        let item = items.iter().find(|item| item.is_disk && item.name == *name);
        for (depth, file) in disk.disk.chain.iter().enumerate() {
            let new = item.filter(|_| depth == 0).map(|item| item.place.path());
            let mut what = format!("disk {name:?}");
            if depth > 0 {
                what += ", a lower layer of its chain (the restored disk is whole and needs none)";
            } else if new.is_none() {
                what += ", which was not restored";
            }
            known.push(Known { old: &file.filename, new, what, changed: item.and_then(|i| changed(i, file)) });
        }
    }
    for left_out in &manifest.left_out {
        for file in &left_out.disk.chain {
            if known.iter().all(|known| known.old != file.filename) {
                let what = format!(
                    "device {:?}, which was left out of the backup: what lies there now, if anything, is no part of the \
                     restore point",
                    left_out.disk.name
                );
                known.push(Known { old: &file.filename, new: None, what, changed: None });
            }
        }
    }
    for item in items.iter().filter(|item| !item.is_disk) {
        let what = format!("file {:?}", item.name);
        known.push(Known { old: &item.name, new: Some(item.place.path()), what, changed: None });
    }
    known.retain(|known| known.old.len() > 1);

    let (mut lines, mut notes, mut found) = (Vec::new(), Vec::new(), vec![false; known.len()]);
    for (number, argument) in manifest.machine.command_line.iter().enumerate() {
        let mut new_argument = argument.clone();
        for (i, this) in known.iter().enumerate() {
            let others = known.iter().any(|other| other.old == this.old && other.new != this.new);
            let absolute = this.new.map(|new| std::path::absolute(new).unwrap_or_else(|_| dir.join(new)));
            let new = absolute.as_deref().and_then(Path::to_str).filter(|_| !others);
            let Some(replaced) = replace_path(&new_argument, this.old, new.unwrap_or(this.old)) else { continue };
            found[i] = true;
            match new {
                Some(_) => new_argument = replaced,
                None => notes.push(format!("argument {number} is unchanged; it names {}", this.what)),
            }
            if let (Some(changed), Some(_)) = (&this.changed, new) {
                notes.push(format!("argument {number} names {}: {changed}", this.what));
            }
        }
        lines.push(quote(&new_argument));
    }
    for (this, found) in known.iter().zip(found) {
        if let (false, Some(new)) = (found, this.new) {
            notes.push(format!("no argument names {} (it was {:?}); it is {new:?} now", this.what, this.old));
        }
    }
    for left_out in &manifest.left_out {
        notes.push(format!("the device {:?} was left out of the backup", left_out.disk.name));
    }
    let mut out = format!(
        "{COMMAND_TITLE}\n\
         # Read it before you do: paths of sockets, networks and devices are those of the old host, and two machines with\n\
         # the same addresses must not run at once. Arguments are counted from 0.\n"
    );
    for note in notes {
        // Debug formatting of names has taken care of line ends.
        out += &format!("# - {note}\n");
    }
    out += &lines.join(" \\\n  ");
    out.push('\n');
    out
}

fn changed(item: &Item, file: &crate::machine::MediumFile) -> Option<String> {
    let now = item.place.format();
    if item.place.is_device() != (file.protocol == "host_device") {
        let now = if item.place.is_device() { "host_device" } else { "file" };
        return Some(format!(
            "its protocol was {:?} and is {now:?} now, in format raw or as said: adapt drivers",
            file.protocol
        ));
    }
    (file.format != now.name()).then(|| {
        let advice =
            if now == Format::Raw { "adapt format= or driver=" } else { "adapt format= or driver= (no backing file)" };
        format!("its format was {:?} and is {:?} now: {advice}", file.format, now.name())
    })
}

/// The argument with all mentions of a path replaced, in the three spellings that QEMU has (plain, with `,,` for commas,
/// in JSON); `None` if it is not mentioned. A mention is no part of a longer path.
fn replace_path(argument: &str, old: &str, new: &str) -> Option<String> {
    let json = |text: &str| {
        let quoted = serde_json::to_string(text).unwrap_or_default();
        quoted.trim_start_matches('"').strip_suffix('"').unwrap_or_default().to_owned()
    };
    let is_json = argument.trim_start().starts_with('{') || argument.starts_with("json:");
    let (old, new) = match is_json {
        true => (json(old), json(new)),
        // A whole argument is a plain path; within options, commas are doubled.
        false if argument == old => (old.to_owned(), new.to_owned()),
        false => (old.replace(',', ",,"), new.replace(',', ",,")),
    };
    let (mut out, mut rest, mut any) = (String::new(), argument, false);
    while let Some(at) = rest.find(&old) {
        let (before, after) = (&rest[..at], &rest[at + old.len()..]);
        let starts = before.chars().next_back().or(out.chars().next_back()).is_none_or(|c| "=:\"".contains(c));
        let ends = after.is_empty() || after.starts_with('"') || (after.starts_with(',') && !after.starts_with(",,"));
        out += before;
        out += if starts && ends { &new } else { &old };
        any |= starts && ends;
        rest = after;
    }
    out += rest;
    any.then_some(out)
}

/// An argument as a shell takes it.
fn quote(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+@%".contains(c);
    match !argument.is_empty() && argument.chars().all(plain) {
        true => argument.to_owned(),
        false => format!("'{}'", argument.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_replaced_where_they_are_meant() {
        let to = |argument, old| replace_path(argument, old, "/new/d,1.raw");
        assert_eq!(to("/a/d", "/a/d").unwrap(), "/new/d,1.raw");
        assert_eq!(to("file=/a/d,if=none", "/a/d").unwrap(), "file=/new/d,,1.raw,if=none");
        assert_eq!(to("file=/a/,,d", "/a/,d").unwrap(), "file=/new/d,,1.raw");
        assert_eq!(to(r#"{"filename":"/a/\"d"}"#, "/a/\"d").unwrap(), r#"{"filename":"/new/d,1.raw"}"#);
        for other in ["file=/a/d2", "file=/a/d,,x", "file=/b/a/d", "/a/d/e", ""] {
            assert_eq!(to(other, "/a/d"), None, "{other}");
        }
    }

    #[test]
    fn a_shell_reads_arguments_back() {
        let arguments = ["plain", "", "it's", "a b", "$HOME `x` \"q\" \\", "line\nend", "é", "-drive", "~", "*"];
        let script = format!("printf '%s\\0' {}", arguments.map(quote).join(" \\\n  "));
        let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
        let found = String::from_utf8(output.stdout).unwrap();
        assert_eq!(found.strip_suffix('\0').unwrap().split('\0').collect::<Vec<_>>(), arguments);
    }
}
