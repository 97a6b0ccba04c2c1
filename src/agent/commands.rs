//! The commands that we use, each with a time limit of its own kind.
//!
//! The types are ours, not generated from the schema: a guest may run any version of the agent, and a bus or an operating
//! system that a later one names must not make an answer unreadable.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::lines::excerpt;
use super::{AgentError, Channel};

/// For what the agent answers at once.
const AT_ONCE: Duration = Duration::from_secs(5);
/// For what asks the guest's kernel and its file systems.
const SOON: Duration = Duration::from_secs(15);

/// Most file systems, and disks of one, that we take from a guest.
const MAX_ENTRIES: usize = 1024;
/// Longest text that we take from a guest.
const MAX_TEXT_BYTES: usize = 512;

/// What the agent is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AgentInfo {
    /// Its version.
    pub version: String,
    /// The commands that it executes.
    pub enabled: Vec<String>,
}

impl AgentInfo {
    /// Whether it executes a command.
    pub fn can(&self, command: &str) -> bool {
        self.enabled.iter().any(|name| name == command)
    }
}

/// Whether the agent has frozen file systems.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FreezeStatus {
    /// It has.
    Frozen,
    /// It has not.
    Thawed,
}

/// The guest's operating system; what it does not say is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct GuestOs {
    /// `debian`, `mswindows`, …
    pub id: String,
    /// Its name and version for people.
    pub pretty_name: String,
    /// Its kernel.
    pub kernel_release: String,
}

/// A mounted file system.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FileSystem {
    /// The guest's name of what it lies on: `vda1`.
    pub name: String,
    /// Where it is mounted.
    pub mountpoint: String,
    /// `ext4`, `NTFS`, …
    #[serde(rename = "type")]
    pub kind: String,
    /// The disks that it lies on.
    pub disk: Vec<FileSystemDisk>,
}

/// A disk below a file system, as the guest sees it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", default)]
pub struct FileSystemDisk {
    /// Its device in the guest: `/dev/vda`.
    pub dev: String,
    /// Its serial number.
    pub serial: String,
    /// The PCI function of its controller.
    pub pci_controller: PciAddress,
}

/// A PCI function as the guest sees it; -1 where it does not know.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PciAddress {
    /// Bus.
    pub bus: i64,
    /// Slot.
    pub slot: i64,
    /// Function.
    pub function: i64,
}

/// A program that was started in the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// Its exit code; none when a signal ended it.
    pub exit_code: Option<i64>,
    /// Its standard output.
    pub output: Vec<u8>,
    /// Its standard error.
    pub errors: Vec<u8>,
}

impl Channel {
    /// What the agent is, and which commands it executes.
    pub async fn info(&mut self) -> Result<AgentInfo, AgentError> {
        #[derive(Deserialize)]
        struct Info {
            #[serde(default)]
            version: String,
            supported_commands: Vec<Command>,
        }
        #[derive(Deserialize)]
        struct Command {
            name: String,
            enabled: bool,
        }
        let info: Info = self.typed("guest-info", json!({}), AT_ONCE).await?;
        let enabled = info.supported_commands.into_iter().filter(|c| c.enabled).map(|c| c.name).collect();
        Ok(AgentInfo { version: text(info.version), enabled })
    }

    /// Whether it has frozen file systems.
    pub async fn freeze_status(&mut self) -> Result<FreezeStatus, AgentError> {
        const COMMAND: &str = "guest-fsfreeze-status";
        match self.call(COMMAND, json!({}), AT_ONCE).await?.as_str() {
            Some("frozen") => Ok(FreezeStatus::Frozen),
            Some("thawed") => Ok(FreezeStatus::Thawed),
            _ => Err(AgentError::Garbage { command: COMMAND.into(), found: "another status".into() }),
        }
    }

    /// Freezes all file systems, or those at these mount points; gives their number. One that was refused or not
    /// answered may have frozen some.
    pub async fn freeze(&mut self, mount_points: &[String], limit: Duration) -> Result<u64, AgentError> {
        if mount_points.is_empty() {
            return self.typed("guest-fsfreeze-freeze", json!({}), limit).await;
        }
        self.typed("guest-fsfreeze-freeze-list", json!({"mountpoints": mount_points}), limit).await
    }

    /// Thaws all file systems; gives the number of those that were frozen.
    pub async fn thaw(&mut self) -> Result<u64, AgentError> {
        self.typed("guest-fsfreeze-thaw", json!({}), SOON).await
    }

    /// The guest's operating system.
    pub async fn os(&mut self) -> Result<GuestOs, AgentError> {
        let os: GuestOs = self.typed("guest-get-osinfo", json!({}), SOON).await?;
        Ok(GuestOs { id: text(os.id), pretty_name: text(os.pretty_name), kernel_release: text(os.kernel_release) })
    }

    /// The guest's host name.
    pub async fn host_name(&mut self) -> Result<String, AgentError> {
        const COMMAND: &str = "guest-get-host-name";
        let reply = self.call(COMMAND, json!({}), SOON).await?;
        let name = reply["host-name"].as_str().map(str::to_owned);
        name.map(text).ok_or_else(|| AgentError::Garbage { command: COMMAND.into(), found: excerpt_of(&reply) })
    }

    /// The mounted file systems.
    pub async fn file_systems(&mut self) -> Result<Vec<FileSystem>, AgentError> {
        let found: Vec<FileSystem> = self.typed("guest-get-fsinfo", json!({}), SOON).await?;
        let disk = |d: FileSystemDisk| FileSystemDisk { dev: text(d.dev), serial: text(d.serial), ..d };
        let bounded = |f: FileSystem| FileSystem {
            name: text(f.name),
            mountpoint: text(f.mountpoint),
            kind: text(f.kind),
            disk: f.disk.into_iter().take(MAX_ENTRIES).map(disk).collect(),
        };
        Ok(found.into_iter().take(MAX_ENTRIES).map(bounded).collect())
    }

    /// Lets all file systems tell their disks what is free; gives for how many that worked. `limit` is for all of them.
    pub async fn trim(&mut self, limit: Duration) -> Result<usize, AgentError> {
        let reply = self.call("guest-fstrim", json!({}), limit).await?;
        let paths = reply["paths"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(paths.iter().filter(|path| path.get("error").is_none()).count())
    }

    /// Starts a program; gives its number. Its output is kept for [`Channel::executed`].
    pub async fn execute(&mut self, program: &str, arguments: &[&str], input: &[u8]) -> Result<i64, AgentError> {
        const COMMAND: &str = "guest-exec";
        let mut wanted = json!({"path": program, "arg": arguments, "capture-output": true});
        if !input.is_empty() {
            wanted["input-data"] = BASE64.encode(input).into();
        }
        let reply = self.call(COMMAND, wanted, AT_ONCE).await?;
        let garbage = || AgentError::Garbage { command: COMMAND.into(), found: excerpt_of(&reply) };
        reply["pid"].as_i64().ok_or_else(garbage)
    }

    /// What became of a program that was started, once it has ended. The agent forgets it then.
    pub async fn executed(&mut self, number: i64) -> Result<Option<Executed>, AgentError> {
        const COMMAND: &str = "guest-exec-status";
        let reply = self.call(COMMAND, json!({"pid": number}), AT_ONCE).await?;
        let garbage = || AgentError::Garbage { command: COMMAND.into(), found: excerpt_of(&reply) };
        if !reply["exited"].as_bool().ok_or_else(garbage)? {
            return Ok(None);
        }
        let stream = |name: &str| match reply[name].as_str() {
            None => Ok(vec![]),
            Some(text) => BASE64.decode(text).map_err(|_| garbage()),
        };
        Ok(Some(Executed {
            exit_code: reply["exitcode"].as_i64(),
            output: stream("out-data")?,
            errors: stream("err-data")?,
        }))
    }

    async fn typed<T: DeserializeOwned>(
        &mut self,
        command: &str,
        arguments: Value,
        limit: Duration,
    ) -> Result<T, AgentError> {
        let reply = self.call(command, arguments, limit).await?;
        let found = excerpt_of(&reply);
        serde_json::from_value(reply).map_err(|_| AgentError::Garbage { command: command.to_owned(), found })
    }
}

fn excerpt_of(reply: &Value) -> String {
    excerpt(reply.to_string().as_bytes())
}

/// A text of bounded length without control characters: it is shown to people.
fn text(from_guest: String) -> String {
    let mut bytes_left = MAX_TEXT_BYTES;
    let fits = |c: &char| {
        bytes_left = bytes_left.saturating_sub(c.len_utf8());
        bytes_left > 0
    };
    from_guest.chars().filter(|c| !c.is_control()).take_while(fits).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn texts_are_bounded(strange in "\\PC{0,32}\n") {
            let text = text(strange.repeat(64));
            prop_assert!(text.len() <= MAX_TEXT_BYTES && !text.contains('\n'));
        }
    }
}
