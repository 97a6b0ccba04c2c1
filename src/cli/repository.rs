//! The arguments REPO and VM[@POINT].

use std::path::Path;

use super::exit;
use super::output;
use super::source;
use crate::repo::{Manifest, Repository};

/// The directory that REPO names.
pub fn directory(text: &str) -> anyhow::Result<&Path> {
    if text.starts_with("s3:") {
        return Err(exit::usage("repositories in S3 are not built yet; name a directory"));
    }
    if source::looks_like_source(text) {
        return Err(exit::usage(format!("{text:?} is a VM, not a repository: REPO is a directory")));
    }
    Ok(Path::new(text))
}

/// Opens REPO.
pub fn open(text: &str) -> anyhow::Result<Repository> {
    Ok(Repository::open(directory(text)?)?)
}

/// For commands with SOURCE and REPO: says so when they are swapped.
pub fn check_order(source: &str, repo: &str) -> anyhow::Result<()> {
    match source::looks_like_source(repo) && !source::looks_like_source(source) {
        true => Err(exit::usage(format!("the arguments are swapped: first the SOURCE {repo}, then the REPO {source}"))),
        false => Ok(()),
    }
}

/// A VM that has points in the repository.
pub fn vm<'a>(repo: &Repository, vm: &'a str) -> anyhow::Result<&'a str> {
    let vms = repo.vms()?;
    if vms.iter().any(|known| known == vm) {
        return Ok(vm);
    }
    let place = repo.layout().root().display();
    Err(exit::not_found(match vms.is_empty() {
        true => format!("no restore points of VM {vm:?}: {place} has none at all yet; `livebackup backup` makes one"),
        false => format!("no restore points of VM {vm:?} in {place}; it has those of {}", output::names(&vms)),
    }))
}

/// A VM of the repository and, if it was named, a point: `VM` or `VM@POINT`. A VM's name may contain `@`.
pub fn vm_and_point<'a>(repo: &Repository, text: &'a str) -> anyhow::Result<(&'a str, Option<&'a str>)> {
    match text.rsplit_once('@') {
        Some((name, point)) if !repo.vms()?.iter().any(|known| known == text) => Ok((vm(repo, name)?, Some(point))),
        _ => Ok((vm(repo, text)?, None)),
    }
}

/// The point that VM[@POINT] names; the latest when it names only the VM.
pub fn point(repo: &Repository, text: &str) -> anyhow::Result<Manifest> {
    let (vm, point) = vm_and_point(repo, text)?;
    Ok(repo.find_point(vm, point.unwrap_or("latest"))?)
}

/// What of these disks of a point (all when none is named) is suspect, in words; said at once, since what follows may take long, and even when quiet.
/// That it cannot be told keeps nobody from his data.
pub fn suspect(repo: &Repository, manifest: &Manifest, disks: &[String]) -> Option<String> {
    let (vm, point) = (&manifest.vm, manifest.id.short());
    match repo.suspect_of(vm, manifest.id, disks) {
        Ok(suspect) => suspect.inspect(|words| {
            tracing::error!("{vm}@{point} is suspect, some of its bytes may be older than it is: {words}");
        }),
        Err(error) => {
            tracing::warn!("whether {vm}@{point} is suspect cannot be told: {error}");
            None
        }
    }
}
