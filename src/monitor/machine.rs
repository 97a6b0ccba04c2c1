//! The virtual machine's definition, as QEMU and its process tell it.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{Monitor, MonitorError};
use crate::machine::Machine;

/// QEMU's answer for a machine without a UUID.
const NO_UUID: &str = "00000000-0000-0000-0000-000000000000";
/// Options whose file the machine cannot start without.
const BOOT_OPTIONS: [&str; 4] = ["kernel", "initrd", "bios", "dtb"];
/// The same as properties of `-machine`.
const BOOT_PROPERTIES: [&str; 4] = ["kernel", "initrd", "firmware", "dtb"];

/// Asks for the machine's definition: five commands, a few milliseconds. The command line and the boot files are empty
/// where QEMU's process cannot be seen.
///
/// # Errors
///
/// As [`Monitor::raw`].
pub async fn machine(monitor: &Monitor) -> Result<Machine, MonitorError> {
    let name = monitor.raw("query-name", Value::Null).await?;
    let uuid = monitor.raw("query-uuid", Value::Null).await?;
    let target = monitor.raw("query-target", Value::Null).await?;
    let version = monitor.raw("query-version", Value::Null).await?;
    let machine_type = match monitor.raw("qom-get", json!({"path": "/machine", "property": "type"})).await {
        Ok(value) => value.as_str().map(|t| t.strip_suffix("-machine").unwrap_or(t).to_owned()),
        Err(e) if e.refusal().is_some() => None,
        Err(e) => return Err(e),
    };
    let text = |value: &Value, member: &str| value.get(member).and_then(Value::as_str).map(str::to_owned);
    let number = |member: &str| version["qemu"][member].as_u64().unwrap_or(0);
    let pid = monitor.peer_process().filter(|p| p.is_alive()).map(|p| p.pid);
    let arguments = pid.map(command_line).unwrap_or_default();
    let cwd = pid.and_then(|pid| fs::read_link(format!("/proc/{pid}/cwd")).ok());
    Ok(Machine {
        name: text(&name, "name").filter(|n| !n.is_empty()),
        uuid: text(&uuid, "UUID").filter(|u| u != NO_UUID),
        qemu_version: format!("{}.{}.{}", number("major"), number("minor"), number("micro")),
        target: text(&target, "arch").unwrap_or_default(),
        machine_type,
        boot_files: boot_files(&arguments, cwd.as_deref()),
        command_line: arguments.iter().map(|a| without_secret(a)).collect(),
    })
}

/// QEMU's run state: `running`, `paused`, `prelaunch`, `io-error`, `shutdown`, … (`RunState` in `qapi/run-state.json`).
///
/// # Errors
///
/// As [`Monitor::raw`].
pub async fn run_state(monitor: &Monitor) -> Result<String, MonitorError> {
    let status = monitor.raw("query-status", Value::Null).await?;
    status
        .get("status")
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| MonitorError::Reply { command: "query-status".into(), reason: format!("no status in {status}") })
}

/// How the last migration from or to this QEMU ended, in its words and times; none where there was none, or one runs. Two
/// that ended alike may look the same.
pub async fn migration(monitor: &Monitor) -> Option<String> {
    match monitor.raw("query-migrate", Value::Null).await {
        Ok(info) => ended_migration(&info),
        // Nothing is known, so nothing may be believed.
        Err(error) => Some(error.to_string()),
    }
}

fn ended_migration(info: &Value) -> Option<String> {
    let status = info.get("status")?.as_str()?;
    if !["completed", "failed", "cancelled"].contains(&status) {
        return None;
    }
    let time = |name: &str| Some(format!(", {name} {} ms", info.get(name)?.as_u64()?));
    let times = ["total-time", "downtime"].into_iter().filter_map(time);
    Some(std::iter::once(status.to_owned()).chain(times).collect())
}

/// The arguments of a process. A byte that is not UTF-8 becomes U+FFFD.
fn command_line(pid: i32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let Some(bytes) = bytes.strip_suffix(b"\0") else { return vec![] };
    bytes.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect()
}

/// Files that the machine boots from. A relative path is taken from QEMU's working directory where it is there;
/// firmware that is not is a part of QEMU's installation, and left out.
fn boot_files(arguments: &[String], cwd: Option<&Path>) -> Vec<String> {
    let takes_value = ["machine", "M", "device"];
    let option = |text: &str| {
        let name = text.strip_prefix("--").or_else(|| text.strip_prefix('-'))?;
        BOOT_OPTIONS.into_iter().chain(takes_value).find(|o| *o == name)
    };
    let mut files: Vec<String> = vec![];
    let mut add = |name: &str, value: &str| {
        let path = cwd.map_or_else(|| PathBuf::from(value), |cwd| cwd.join(value));
        let file = if path.is_absolute() && path.exists() {
            path.to_string_lossy().into_owned()
        } else if !matches!(name, "bios" | "firmware") || value.contains('/') {
            value.to_owned()
        } else {
            return;
        };
        if !files.contains(&file) {
            files.push(file);
        }
    };
    let mut rest = arguments.iter().skip(1);
    while let Some(argument) = rest.next() {
        let Some(name) = option(argument) else { continue };
        let Some(value) = rest.next() else { break };
        match name {
            "machine" | "M" => properties(value)
                .iter()
                .filter(|(name, _)| BOOT_PROPERTIES.contains(&&**name))
                .for_each(|(name, value)| add(name, value)),
            "device" => {
                let properties = properties(value);
                let is_loader = properties.iter().any(|(name, value)| name == "driver" && value == "loader");
                let mut files = properties.iter().filter(|(name, _)| is_loader && name == "file");
                files.by_ref().for_each(|(name, value)| add(name, value));
            }
            _ => add(name, value),
        }
    }
    files
}

/// The properties of `-device` or `-machine` that have texts: of JSON, or of `driver,name=value`, where a doubled comma stands
/// for one. The first without a name is `driver`.
fn properties(argument: &str) -> Vec<(String, String)> {
    if let Ok(Value::Object(object)) = serde_json::from_str(argument) {
        return object.into_iter().filter_map(|(name, value)| Some((name, value.as_str()?.to_owned()))).collect();
    }
    let mut pieces = vec![String::new()];
    let mut rest = argument.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            ',' if rest.next_if_eq(&',').is_none() => pieces.push(String::new()),
            c => pieces.last_mut().into_iter().for_each(|piece| piece.push(c)),
        }
    }
    let first = pieces.first().filter(|piece| !piece.contains('=')).map(|piece| ("driver".to_owned(), piece.clone()));
    let named = pieces.iter().filter_map(|piece| piece.split_once('='));
    first.into_iter().chain(named.map(|(name, value)| (name.to_owned(), value.to_owned()))).collect()
}

/// An argument without the plain text of a secret (`-object secret,id=…,data=…`): restore points keep command lines.
fn without_secret(argument: &str) -> String {
    const REMOVED: &str = "REMOVED";
    if let Ok(Value::Object(mut object)) = serde_json::from_str(argument) {
        if object.get("qom-type").is_some_and(|t| t == "secret") && object.contains_key("data") {
            object.insert("data".into(), json!(REMOVED));
            return Value::Object(object).to_string();
        }
        return argument.to_owned();
    }
    let kind = argument.split(',').next().unwrap_or("");
    if !matches!(kind, "secret" | "qom-type=secret") {
        return argument.to_owned();
    }
    let mut kept = vec![];
    let mut in_data = false;
    // A doubled comma stands for one: what follows it still belongs to the value.
    let mut pieces = argument.split(',').peekable();
    while let Some(piece) = pieces.next() {
        if in_data && piece.is_empty() {
            pieces.next();
            continue;
        }
        in_data = piece.starts_with("data=");
        kept.push(if in_data { format!("data={REMOVED}") } else { piece.to_owned() });
    }
    kept.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_taken_out_and_nothing_else() {
        for (before, after) in [
            ("secret,id=s0,data=letmein", "secret,id=s0,data=REMOVED"),
            ("secret,data=let,,me,,in,id=s0", "secret,data=REMOVED,id=s0"),
            ("qom-type=secret,id=s0,data=x,format=raw", "qom-type=secret,id=s0,data=REMOVED,format=raw"),
            ("secret,id=s0,file=/etc/key", "secret,id=s0,file=/etc/key"),
            (r#"{"qom-type":"secret","id":"s0","data":"x"}"#, r#"{"data":"REMOVED","id":"s0","qom-type":"secret"}"#),
            (r#"{"driver":"raw","data":"x"}"#, r#"{"driver":"raw","data":"x"}"#),
            ("memory-backend-file,data=x", "memory-backend-file,data=x"),
            ("-S", "-S"),
            ("", ""),
        ] {
            assert_eq!(without_secret(before), after);
        }
    }

    #[test]
    fn a_migration_that_ended_is_told_of() {
        for (info, told) in [
            (json!({}), None),
            (json!({"status": "active", "total-time": 3}), None),
            (json!({"status": "cancelled"}), Some("cancelled")),
            (
                json!({"status": "completed", "total-time": 30, "downtime": 7}),
                Some("completed, total-time 30 ms, downtime 7 ms"),
            ),
        ] {
            assert_eq!(ended_migration(&info).as_deref(), told);
        }
    }

    #[test]
    fn boot_files_are_found_and_made_absolute() {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().to_str().unwrap();
        for name in ["vmlinuz", "-kernel"] {
            fs::write(dir.path().join(name), "").unwrap();
        }
        let line = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let found = |text: &str| boot_files(&line(text), Some(dir.path()));
        assert_eq!(found("qemu -kernel vmlinuz -append -bios"), [format!("{at}/vmlinuz")]);
        assert_eq!(found("qemu --kernel ./vmlinuz -initrd /gone"), [format!("{at}/./vmlinuz"), "/gone".into()]);
        assert_eq!(found("qemu -kernel -kernel"), [format!("{at}/-kernel")]);
        assert_eq!(found("qemu -bios bios-microvm.bin -kernel"), Vec::<String>::new());
        assert_eq!(boot_files(&line("qemu -kernel vmlinuz"), None), ["vmlinuz"]);
        let there = [format!("{at}/vmlinuz")];
        for options in [
            "-machine q35,firmware=vmlinuz",
            "-M firmware=vmlinuz,type=q35 -machine accel=tcg",
            "-machine virt -dtb vmlinuz",
            "-device loader,file=vmlinuz,addr=0x100 -device virtio-blk-pci,file=no",
            r#"-device {"driver":"loader","addr":256,"file":"vmlinuz"}"#,
            "-kernel vmlinuz -machine kernel=vmlinuz",
        ] {
            assert_eq!(found(&format!("qemu {options}")), there, "{options}");
        }
        assert_eq!(found("qemu -machine q35,firmware=edk2.fd"), Vec::<String>::new(), "a part of QEMU");
        fs::write(dir.path().join("a,b"), "").unwrap();
        assert_eq!(found("qemu -device loader,file=a,,b"), [format!("{at}/a,b")]);
    }
}
