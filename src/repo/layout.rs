//! Layout: where things lie in a repository's directory.
//!
//! ```text
//! repo/config                      version, id, default chunk size
//!      packs/ab/<PackId>           blobs
//!      index/<PackId>              digest → place; named by an id of its own
//!      points/VM/<PointId>.point   manifests: the only thing that makes a restore point exist
//!      points/VM/<PointId>.suspect marks of points that rest on what an audit found wrong
//!      locks/                      `repository`, `index`, `vm-VM`
//!      damaged/<PackId>            what a verification found damaged in a pack; made when there is something
//!      journal/<PackId>/           one per writer: its list of durable packs, and the pack that it is writing
//! ```

use std::path::{Path, PathBuf};

use crate::limits::MAX_NAME_BYTES;
use crate::repo::error::RepoError;
use crate::repo::suspect::SUSPECT_ENDING;
use crate::units::{PackId, PointId};

/// Longest directory name made of a VM's name, endings not counted. File systems take 255 bytes.
const MAX_DIRECTORY_BYTES: usize = 200;
/// Ending of manifests.
pub(crate) const POINT_ENDING: &str = "point";

/// The paths of a repository.
#[derive(Clone, Debug)]
pub struct Layout {
    root: PathBuf,
}

impl Layout {
    /// The paths below this directory.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_owned() }
    }

    /// The repository's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The config file.
    pub fn config(&self) -> PathBuf {
        self.root.join("config")
    }

    /// Where packs are.
    pub fn packs(&self) -> PathBuf {
        self.root.join("packs")
    }

    /// One pack.
    pub fn pack(&self, id: PackId) -> PathBuf {
        let name = id.to_string();
        self.packs().join(&name[..2]).join(name)
    }

    /// Where index files are.
    pub fn index(&self) -> PathBuf {
        self.root.join("index")
    }

    /// Where manifests are.
    pub fn points(&self) -> PathBuf {
        self.root.join("points")
    }

    /// Where the manifests of one VM are.
    pub fn vm(&self, vm: &str) -> Result<PathBuf, RepoError> {
        Ok(self.points().join(directory_of_vm(vm)?))
    }

    /// One manifest.
    pub fn point(&self, vm: &str, id: PointId) -> Result<PathBuf, RepoError> {
        Ok(self.vm(vm)?.join(format!("{id}.{POINT_ENDING}")))
    }

    /// The mark of a suspect point.
    pub fn suspect(&self, vm: &str, id: PointId) -> Result<PathBuf, RepoError> {
        Ok(self.vm(vm)?.join(format!("{id}.{SUSPECT_ENDING}")))
    }

    /// Where lock files are.
    pub fn locks(&self) -> PathBuf {
        self.root.join("locks")
    }

    /// Where marks of damage are. May not exist.
    pub fn damaged(&self) -> PathBuf {
        self.root.join("damaged")
    }

    /// Where writers keep their journals.
    pub fn journal(&self) -> PathBuf {
        self.root.join("journal")
    }

    /// Where a running backup of a VM keeps what a killed one's successor goes on with.
    pub fn session(&self, vm: &str) -> Result<PathBuf, RepoError> {
        Ok(self.journal().join(format!("{}.session", directory_of_vm(vm)?)))
    }
}

/// The directory name of a VM: its name, with every byte outside `[A-Za-z0-9._-]` and a leading dot as `%XX`. A name
/// that gets too long is cut and ends in `%~` and half of its digest, which no other name can give.
pub fn directory_of_vm(vm: &str) -> Result<String, RepoError> {
    if vm.is_empty() || vm.len() > MAX_NAME_BYTES {
        return Err(RepoError::Refused(format!("a VM's name has 1 to {MAX_NAME_BYTES} bytes, not {}", vm.len())));
    }
    let mut out = String::new();
    for (at, byte) in vm.bytes().enumerate() {
        match byte {
            b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-' => out.push(char::from(byte)),
            b'.' if at > 0 => out.push('.'),
            other => out.push_str(&format!("%{other:02X}")),
        }
    }
    if out.len() > MAX_DIRECTORY_BYTES {
        let digest = blake3::hash(vm.as_bytes()).to_hex();
        out.truncate(MAX_DIRECTORY_BYTES - 34);
        out.push_str("%~");
        out.push_str(&digest[..32]);
    }
    Ok(out)
}

/// The VM's name that gives this directory name, unless it was cut or is none of ours.
pub fn vm_of_directory(directory: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut rest = directory.bytes();
    while let Some(byte) = rest.next() {
        out.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            other => other,
        });
    }
    let vm = String::from_utf8(out).ok()?;
    (directory_of_vm(&vm).ok()? == directory).then_some(vm)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_become_safe_directories_and_come_back() {
        for vm in
            ["web-1", ".", "..", "...", "a/b", "../../etc", "%41", "ü nicode", "a\0b", "A.b_c-d", "-rf", ".hidden"]
        {
            let directory = directory_of_vm(vm).unwrap();
            assert!(directory.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-%".contains(&b)), "{directory}");
            assert!(!directory.starts_with('.'));
            assert_eq!(vm_of_directory(&directory).as_deref(), Some(vm));
        }
        assert!(directory_of_vm("").is_err());
        assert!(directory_of_vm(&"x".repeat(256)).is_err());
    }

    #[test]
    fn long_names_stay_apart() {
        let (a, b) = ("ü".repeat(127), format!("{}x", "ü".repeat(126)));
        let (a, b) = (directory_of_vm(&a).unwrap(), directory_of_vm(&b).unwrap());
        assert_ne!(a, b);
        assert_eq!(a.len(), MAX_DIRECTORY_BYTES);
        assert_eq!(vm_of_directory(&a), None);
        assert_eq!(vm_of_directory("%zz"), None);
        assert_eq!(vm_of_directory("a b"), None);
    }
}
