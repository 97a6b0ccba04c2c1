//! What QEMU's command line says of a node's `discard`: no query shows it.
//!
//! Our filter must pass discards on where the node does (else the guest's TRIM is swallowed while a fleece is open). A
//! filter with `discard=unmap` is transparent above any node, tried on 7.2 and 10.0: a node that ignores discards goes on
//! ignoring them, and its bitmap stays clean. It only costs that the old data of what is discarded is copied to the
//! scratch first. So `unmap` is the right answer in doubt, and to find `ignore` saves scratch; to be wrong (a node
//! reopened since) means that discards, which are only hints, are dropped while the fleece is open.

use serde_json::{Map, Value};

/// Longest command line that is looked at.
pub(super) const MAX_ARGUMENTS: usize = 64 << 10;

/// What identifies a node on the command line.
pub(super) struct Wanted<'a> {
    pub node: &'a str,
    /// Backend name, or empty.
    pub backend: &'a str,
    /// File of its topmost data layer.
    pub filename: &'a str,
}

/// Whether the node was given `discard=unmap`; `None` if the command line does not tell.
pub(super) fn discard(command_line: &[String], wanted: &Wanted) -> Option<bool> {
    let mut said = None;
    for pair in command_line.windows(2).take(MAX_ARGUMENTS) {
        let value = pair[1].as_str();
        let here = match pair[0].trim_start_matches('-') {
            _ if !pair[0].starts_with('-') => None,
            "blockdev" => {
                let options = match value.starts_with('{') {
                    true => serde_json::from_str(value).ok(),
                    false => Some(Value::Object(key_values(value, "driver"))),
                };
                options.and_then(|o| in_blockdev(&o, wanted.node, false, 0))
            }
            "drive" => in_drive(&key_values(value, "file"), wanted),
            "hda" | "hdb" | "hdc" | "hdd" | "pflash" => {
                (wanted.node.starts_with('#') && value == wanted.filename).then_some(false)
            }
            _ => None,
        };
        match (here, said) {
            (Some(new), Some(old)) if new != old => return None,
            (Some(new), _) => said = Some(new),
            (None, _) => {}
        }
    }
    said
}

/// In the options of a node or of one defined inside it, which inherits `discard`.
fn in_blockdev(options: &Value, node: &str, inherited: bool, depth: usize) -> Option<bool> {
    let options = options.as_object().filter(|_| depth < 32)?;
    let unmap = options.get("discard").and_then(Value::as_str).map_or(inherited, is_unmap);
    if options.get("node-name").and_then(Value::as_str) == Some(node) {
        return Some(unmap);
    }
    options.values().find_map(|inner| in_blockdev(inner, node, unmap, depth + 1))
}

fn in_drive(options: &Map<String, Value>, wanted: &Wanted) -> Option<bool> {
    let text = |name: &str| options.get(name).and_then(Value::as_str);
    let nested = || options.get("file").and_then(|f| f.get("filename")).and_then(Value::as_str);
    let same = match (text("node-name"), text("id")) {
        (Some(name), _) => name == wanted.node,
        (None, Some(id)) => id == wanted.backend,
        (None, None) => {
            wanted.node.starts_with('#') && text("file").or_else(nested).is_some_and(|f| f == wanted.filename)
        }
    };
    same.then(|| text("discard").is_some_and(is_unmap))
}

fn is_unmap(value: &str) -> bool {
    matches!(value, "unmap" | "on")
}

/// QEMU's `key=value,…` with `,,` for a comma and `a.b=` for a member of a member; a first value without a key gets
/// `implied`.
fn key_values(text: &str, implied: &str) -> Map<String, Value> {
    let mut pieces = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            pieces.push(String::new());
        } else if let Some(last) = pieces.last_mut() {
            last.push(c);
        }
    }
    let mut map = Map::new();
    for (i, piece) in pieces.iter().enumerate() {
        let (key, value) = match piece.split_once('=') {
            Some((key, value)) => (key, value),
            None if i == 0 => (implied, piece.as_str()),
            None => (piece.as_str(), "on"),
        };
        insert(&mut map, key, value, 0);
    }
    map
}

fn insert(map: &mut Map<String, Value>, key: &str, value: &str, depth: usize) {
    match key.split_once('.').filter(|_| depth < 32) {
        None => {
            map.insert(key.to_owned(), value.into());
        }
        Some((first, rest)) => {
            let inner = map.entry(first).or_insert_with(|| Value::Object(Map::new()));
            if !inner.is_object() {
                *inner = Value::Object(Map::new());
            }
            if let Some(inner) = inner.as_object_mut() {
                insert(inner, rest, value, depth + 1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn discard_of(line: &[&str], node: &str, backend: &str, filename: &str) -> Option<bool> {
        let line: Vec<_> = line.iter().map(|a| (*a).to_owned()).collect();
        discard(&line, &Wanted { node, backend, filename })
    }

    #[test]
    fn what_the_command_line_says_of_discard() {
        let line = [
            "qemu",
            "-blockdev",
            "raw,node-name=a,discard=unmap,file.driver=file,file.node-name=a-file,file.filename=/a,,b",
            "--blockdev",
            r#"{"driver":"qcow2","node-name":"b","file":{"driver":"file","node-name":"b-file","discard":"unmap"}}"#,
            "-drive",
            "file=/c,if=none,id=c,discard=on",
            "-drive",
            "file.driver=file,file.filename=/d,if=virtio",
            "-drive",
            "/e,discard=unmap",
            "-hda",
            "/f",
            "-drive",
            "if=none,file=/g,id=g",
            "-drive",
            "if=none,file=/g,id=g,discard=unmap",
            "-blockdev",
        ];
        assert_eq!(discard_of(&line, "a", "", ""), Some(true));
        assert_eq!(discard_of(&line, "a-file", "", ""), Some(true), "inherited");
        assert_eq!(discard_of(&line, "b", "", ""), Some(false));
        assert_eq!(discard_of(&line, "b-file", "", ""), Some(true));
        assert_eq!(discard_of(&line, "#block1", "c", "/c"), Some(true));
        assert_eq!(discard_of(&line, "#block1", "virtio0", "/d"), Some(false));
        assert_eq!(discard_of(&line, "#block1", "ide0-hd0", "/e"), Some(true));
        assert_eq!(discard_of(&line, "#block1", "ide0-hd1", "/f"), Some(false));
        assert_eq!(discard_of(&line, "#block1", "g", "/g"), None, "two answers are none");
        assert_eq!(discard_of(&line, "hot", "", "/c"), None);
    }

    #[test]
    fn commas_and_dots() {
        let map = key_values("raw,file.filename=/a,,b,file.x.y=1,flag", "driver");
        assert_eq!(
            Value::Object(map),
            serde_json::json!({"driver": "raw", "file": {"filename": "/a,b", "x": {"y": "1"}}, "flag": "on"})
        );
    }
}
