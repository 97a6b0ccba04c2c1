//! `qmp-schemas/used.json` is the single list of what the code uses of QMP. Held against it here: the code, the recorded
//! schemas of both QEMU versions, and the running QEMUs.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::common::*;
use serde_json::{Value, json};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn read_json(path: &Path) -> Value {
    let text = std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn used() -> Value {
    read_json(&root().join("qmp-schemas/used.json"))
}

fn object(value: &Value) -> impl Iterator<Item = (&String, &Value)> {
    value.as_object().into_iter().flatten()
}

/// `10.0` as a pair of numbers.
fn numbers(version: &str) -> (u32, u32) {
    let (major, minor) = version.split_once('.').unwrap();
    (major.parse().unwrap(), minor.parse().unwrap())
}

/// What `used` mentions and `found`, a type of a reduced schema, lacks.
fn missing(used: &Value, found: &Value, version: (u32, u32), path: &str) -> Vec<String> {
    if let Some(element) = found.get("list") {
        return missing(used, element, version, path);
    }
    if let Some(types) = found.get("either") {
        let lacks = types.as_array().unwrap().iter().map(|t| missing(used, t, version, path));
        return lacks.min_by_key(Vec::len).unwrap();
    }
    let mut lacks = vec![];
    for value in used["values"].as_array().into_iter().flatten() {
        if !found["enum"].as_array().is_some_and(|all| all.contains(value)) {
            lacks.push(format!("{path} = {value}"));
        }
    }
    for (kind, sign) in [("members", "."), ("variants", ":")] {
        for (name, below) in object(&used[kind]) {
            let path = format!("{path}{sign}{name}");
            match found[kind].get(name) {
                Some(it) if kind == "members" => lacks.extend(missing(below, &it["type"], version, &path)),
                Some(it) => lacks.extend(missing(below, it, version, &path)),
                None if below["since"].as_str().is_some_and(|since| numbers(since) > version) => {}
                None => lacks.push(path),
            }
        }
    }
    lacks
}

/// What used.json lists and a reduced schema lacks.
fn all_missing(used: &Value, schema: &Value) -> Vec<String> {
    let version = numbers(schema["qemu"].as_str().unwrap());
    let mut lacks = vec![];
    for kind in ["commands", "events"] {
        for (name, wanted) in object(&used[kind]) {
            match schema[kind].get(name) {
                None if wanted["since"].as_str().is_some_and(|since| numbers(since) > version) => {}
                None => lacks.push(name.clone()),
                Some(found) => {
                    for side in ["arguments", "returns", "data"].into_iter().filter(|s| wanted.get(s).is_some()) {
                        lacks.extend(missing(&wanted[side], &found[side], version, &format!("{name} {side}")));
                    }
                }
            }
        }
    }
    lacks
}

#[test]
fn everything_listed_is_in_the_recorded_schemas() {
    let used = used();
    for version in ["7.2", "10.0"] {
        let schema = read_json(&root().join(format!("qmp-schemas/qemu-{version}.json")));
        assert_eq!(schema["qemu"], version);
        let lacks = all_missing(&used, &schema);
        assert!(
            lacks.is_empty(),
            "QEMU {version} does not have what qmp-schemas/used.json lists: {lacks:#?}\nIf the list is newer than the \
             recorded schemas, run qmp-schemas/record.sh. If only later versions have it and the code does without it \
             there, mark it \"since\": \"MAJOR.MINOR\" in used.json. Else it is misspelt."
        );
    }
}

#[test]
fn the_comparison_notices_what_is_missing() {
    let schema = read_json(&root().join("qmp-schemas/qemu-7.2.json"));
    let wanted = |node: Value| json!({"commands": {"blockdev-add": {"arguments": node}}, "events": {}});
    for (node, lack) in [
        (json!({"members": {"nonsense": {}}}), "blockdev-add arguments.nonsense"),
        (json!({"variants": {"nonsense": {}}}), "blockdev-add arguments:nonsense"),
        (json!({"members": {"discard": {"values": ["shred"]}}}), "blockdev-add arguments.discard = \"shred\""),
        (
            json!({"variants": {"copy-before-write": {"members": {"bitmap": {"members": {"nonsense": {}}}}}}}),
            "blockdev-add arguments:copy-before-write.bitmap.nonsense",
        ),
    ] {
        assert_eq!(all_missing(&wanted(node), &schema), [lack]);
    }
    let newer = json!({"members": {"nonsense": {"since": "7.3"}}});
    assert_eq!(all_missing(&wanted(newer), &schema), Vec::<String>::new());
    let older = json!({"members": {"nonsense": {"since": "7.2"}}});
    assert_eq!(all_missing(&wanted(older), &schema).len(), 1);
    assert_eq!(all_missing(&json!({"commands": {"nonsense": {}}, "events": {"NONSENSE": {}}}), &schema).len(), 2);
}

#[test]
fn the_recorded_schemas_are_what_qemu_says_now() {
    for version in VERSIONS {
        let mut qemu = Qemu::start_with(version, &["-machine", "none"], |_| ());
        let said = qemu.qmp("query-version", json!({}));
        let name = format!("{}.{}", said["qemu"]["major"], said["qemu"]["minor"]);
        let mut reduce = Command::new("python3")
            .arg(root().join("qmp-schemas/reduce.py"))
            .arg(&name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 runs: install python3");
        let answer = qemu.qmp("query-qmp-schema", json!({})).to_string();
        reduce.stdin.take().unwrap().write_all(answer.as_bytes()).unwrap();
        let out = reduce.wait_with_output().unwrap();
        assert!(out.status.success(), "reduce.py: {}", out.status);
        let now: Value = serde_json::from_slice(&out.stdout).unwrap();
        let lacks = all_missing(&used(), &now);
        assert!(lacks.is_empty(), "the running QEMU {name} lacks what qmp-schemas/used.json lists: {lacks:#?}");
        let path = root().join(format!("qmp-schemas/qemu-{name}.json"));
        if !path.exists() {
            println!("QEMU {name} has all that is listed; it was never recorded (qmp-schemas/record.sh does it)");
            continue;
        }
        assert!(
            read_json(&path) == now,
            "QEMU {name} and {} differ: run qmp-schemas/record.sh and look at the difference",
            path.display()
        );
    }
}

/// A string literal of a source file, with the code on both its sides.
struct Literal<'a> {
    text: &'a str,
    line: usize,
    before: &'a str,
    after: &'a str,
}

/// A source file up to its unit tests.
fn without_tests(source: &str) -> &str {
    source.split("\n#[cfg(test)]\nmod ").next().unwrap_or(source)
}

/// The string literals of Rust code, comments left out.
fn literals(source: &str) -> Vec<Literal<'_>> {
    let (bytes, end) = (source.as_bytes(), source.len());
    let mut found = vec![];
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        if rest.starts_with(b"//") {
            at += rest.iter().position(|b| *b == b'\n').unwrap_or(rest.len());
        } else if rest.starts_with(b"'\"'") || rest.starts_with(b"'\\\"'") {
            at += if rest[1] == b'\\' { 4 } else { 3 };
        } else if rest[0] == b'"' {
            let hashes = bytes[..at].iter().rev().take_while(|b| **b == b'#').count();
            let raw = at > hashes && bytes[at - hashes - 1] == b'r';
            let start = at + 1;
            at = start;
            let close = format!("\"{}", "#".repeat(hashes));
            while at < bytes.len() {
                match bytes[at] {
                    b'\\' if !raw => at += 1,
                    b'"' if !raw || bytes[at..].starts_with(close.as_bytes()) => break,
                    _ => {}
                }
                at += 1;
            }
            let (before, after) = (&source[..start - 1], source.get(at + 1..end).unwrap_or(""));
            let line = before.matches('\n').count() + 1;
            found.push(Literal { text: &source[start..at.min(end)], line, before, after });
            at += 1;
        } else {
            at += 1;
        }
    }
    found
}

/// Whether a literal stands where a command's name belongs.
fn is_called(literal: &Literal<'_>) -> bool {
    let before = literal.before.trim_end();
    let opens = [".raw(", ".send_fd(", "\"execute\":"].iter().any(|c| before.ends_with(c));
    let within = before.ends_with(',')
        && before[..before.len() - 1].rsplit(['(', ';']).next().is_some_and(|arguments| {
            let upto = &before[..before.len() - 1 - arguments.len()];
            upto.ends_with(".raw_within(")
        });
    opens || within
}

/// Whether a literal stands before a command's arguments: `("stop", json!({}))`.
fn has_arguments(literal: &Literal<'_>) -> bool {
    let after = literal.after.trim_start();
    let Some(after) = after.strip_prefix(',') else { return false };
    ["json!(", "Value::Null"].iter().any(|a| after.trim_start().starts_with(a))
}

/// Names of QMP in a source file, each with its line. `commands` and `events` are all that QEMU has.
fn names_in(source: &str, commands: &BTreeSet<String>, events: &BTreeSet<String>) -> Vec<(String, usize)> {
    let source = without_tests(source);
    let mut found = vec![];
    for literal in literals(source) {
        let one_word = !literal.text.contains(['-', '_']);
        let known = commands.contains(literal.text) && (!one_word || has_arguments(&literal));
        if known || is_called(&literal) || events.contains(literal.text) {
            found.push((literal.text.to_owned(), literal.line));
        }
    }
    // Typed commands, of which the crate writes `-` as `_`: `qmp::query_block {`.
    for (number, line) in source.lines().enumerate() {
        for piece in line.split("//").next().unwrap_or("").split("qmp::").skip(1) {
            let name: String = piece.chars().take_while(|c| c.is_ascii_alphanumeric() || *c == '_').collect();
            let plain = name.replace('_', "-");
            let command = commands.iter().find(|c| c.replace('_', "-") == plain);
            found.extend(command.map(|c| (c.clone(), number + 1)));
        }
    }
    found
}

fn rust_files(dir: &Path, into: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            rust_files(&path, into);
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
}

/// All names of commands, or of events, that both QEMU versions have.
fn all_names(kind: &str) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for version in VERSIONS {
        let mut qemu = Qemu::start_with(version, &["-machine", "none"], |_| ());
        let schema = qemu.qmp("query-qmp-schema", json!({}));
        let entries = schema.as_array().unwrap().iter().filter(|e| e["meta-type"] == kind);
        names.extend(entries.map(|e| e["name"].as_str().unwrap().to_owned()));
    }
    names
}

#[test]
fn the_code_and_the_list_agree() {
    let (commands, events) = (all_names("command"), all_names("event"));
    let mut files = vec![];
    rust_files(&root().join("src"), &mut files);
    let mut places: BTreeMap<String, String> = BTreeMap::new();
    for file in files {
        let source = std::fs::read_to_string(&file).unwrap();
        for (name, line) in names_in(&source, &commands, &events) {
            let short = file.strip_prefix(root()).unwrap().display().to_string();
            places.entry(name).or_insert_with(|| format!("{short}:{line}"));
        }
    }
    assert!(places.contains_key("qmp_capabilities"), "the scan finds what is surely there");

    let used = used();
    let mut complaints = vec![];
    for (name, place) in &places {
        let kind = if events.contains(name) { "events" } else { "commands" };
        if kind == "commands" && !commands.contains(name) {
            complaints.push(format!("{place} calls {name:?}: neither QEMU has such a command"));
        } else if used[kind].get(name).is_none() {
            complaints.push(format!(
                "{place} uses {name}: add the line\n    \"{name}\": {{}},\nto \"{kind}\" in qmp-schemas/used.json, with \
                 the members that the code uses, and run qmp-schemas/record.sh"
            ));
        }
    }
    for kind in ["commands", "events"] {
        for (name, wanted) in object(&used[kind]) {
            match (places.get(name), wanted["planned"] == true) {
                (None, false) => complaints.push(format!(
                    "no code uses {name}: take its line out of \"{kind}\" in qmp-schemas/used.json, or mark it \
                     \"planned\": true"
                )),
                (None, true) => println!("{name}: listed, and no code uses it yet"),
                (Some(place), true) => println!("{name}: {place} uses it; take out its \"planned\": true"),
                (Some(_), false) => {}
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[test]
fn the_scan_finds_what_it_should() {
    let commands = ["query-block", "stop", "quit", "transaction", "block-dirty-bitmap-add", "qmp_capabilities"];
    let commands = commands.map(str::to_owned).into_iter().collect();
    let events = ["STOP".to_owned()].into_iter().collect();
    let names = |source: &str| names_in(source, &commands, &events).into_iter().map(|(n, _)| n).collect::<Vec<_>>();
    for (source, found) in [
        (r#"m.raw("query-block", x)"#, vec!["query-block"]),
        ("m.raw(\n    \"stop\", x)", vec!["stop"]),
        (r#"m.raw_within(limit, "stop", x)"#, vec!["stop"]),
        (r#"m.raw_within(LIMIT, "unheard-of", x)"#, vec!["unheard-of"]),
        (r#"m.raw("unheard-of", x)"#, vec!["unheard-of"]),
        (r#"undo.push(("quit", json!({})))"#, vec!["quit"]),
        (r#"undo.push(("stop", Value::Null))"#, vec!["stop"]),
        (r#"json!({"execute": "stop"})"#, vec!["stop"]),
        (r#"json!({"type": "block-dirty-bitmap-add", "data": {}})"#, vec!["block-dirty-bitmap-add"]),
        (r#"if event.name == "STOP" {}"#, vec!["STOP"]),
        ("m.execute(qmp::query_block {})", vec!["query-block"]),
        ("m.execute(qmp::qmp_capabilities {})", vec!["qmp_capabilities"]),
        (r#"println!("stop"); f("quit", 1)"#, vec![]),
        (r#"// m.raw("stop", x)"#, vec![]),
        (r#"let c = '"'; m.raw("stop", x)"#, vec!["stop"]),
        (r##"let c = r#"a"b"#; m.raw("stop", x)"##, vec!["stop"]),
        (r#"let c = "a\"b"; m.raw("stop", x)"#, vec!["stop"]),
        ("\n#[cfg(test)]\nmod tests { m.raw(\"stop\", x) }", vec![]),
        ("\n#[cfg(test)]\nuse x;\nm.raw(\"stop\", x)", vec!["stop"]),
    ] {
        assert_eq!(names(source), found, "{source}");
    }
    let source = "\n\nm.raw(\"stop\", x)";
    assert_eq!(names_in(source, &commands, &events), [("stop".to_owned(), 3)]);
}
