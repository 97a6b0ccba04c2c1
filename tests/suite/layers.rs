//! The layers of `src/`, as the doc of `src/lib.rs` lists them, hold, and files stay small.
//!
//! A room (`src/NAME.rs` or `src/NAME/`) may name, by `crate::…` or by `super::…`, only itself and rooms of lines below
//! its own; in code of `#[cfg(test)]` too, since a test that needs a higher room belongs to the higher room. The last
//! line is the base, whose rooms may import one another as long as there is no cycle. Comments and docs may link
//! anywhere.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const MAX_LINES: usize = 600;

/// The lines of the layer list, the highest first.
fn layers(lib: &str) -> Vec<Vec<String>> {
    let doc: Vec<_> = lib.lines().filter_map(|l| l.strip_prefix("//!")).map(str::trim).collect();
    let title = doc.iter().position(|l| *l == "# Layers").expect("src/lib.rs has a part `# Layers`");
    let words = |line: &&str| line.split_whitespace().map(str::to_owned).collect();
    let list: Vec<_> = doc[title..].iter().skip_while(|l| !l.starts_with("```")).skip(1).collect();
    list.into_iter().take_while(|l| !l.starts_with("```")).map(words).collect()
}

/// Words, `::`, and single characters; without comments, strings, characters and lifetimes.
fn tokens(source: &str) -> Vec<(usize, String)> {
    let text: Vec<char> = source.chars().collect();
    let at = |i: usize| text.get(i).copied().unwrap_or('\0');
    let word = |c: char| c.is_alphanumeric() || c == '_';
    let (mut found, mut i, mut line) = (vec![], 0, 1);
    while i < text.len() {
        let start = i;
        match at(i) {
            '/' if at(i + 1) == '/' => i = (i..text.len()).find(|i| at(*i) == '\n').unwrap_or(text.len()),
            '/' if at(i + 1) == '*' => {
                let mut depth = 0;
                loop {
                    match (at(i), at(i + 1)) {
                        ('/', '*') => (depth, i) = (depth + 1, i + 2),
                        ('*', '/') => (depth, i) = (depth - 1, i + 2),
                        _ => i += 1,
                    }
                    if depth == 0 || i >= text.len() {
                        break;
                    }
                }
            }
            '"' => {
                i += 1;
                while i < text.len() && at(i) != '"' {
                    i += if at(i) == '\\' { 2 } else { 1 };
                }
                i += 1;
            }
            // A character, else a lifetime.
            '\'' if at(i + 1) == '\\' => i = (i + 3..text.len()).find(|i| at(*i) == '\'').unwrap_or(text.len()) + 1,
            '\'' if at(i + 2) == '\'' => i += 3,
            '\'' => i += 1,
            c if word(c) => {
                while i < text.len() && word(at(i)) {
                    i += 1;
                }
                let name: String = text[start..i].iter().collect();
                let hashes = (i..text.len()).take_while(|i| at(*i) == '#').count();
                if matches!(name.as_str(), "r" | "br" | "cr") && at(i + hashes) == '"' {
                    i += hashes + 1;
                    while i < text.len() && !(at(i) == '"' && (1..=hashes).all(|k| at(i + k) == '#')) {
                        i += 1;
                    }
                    i += 1 + hashes;
                } else {
                    found.push((line, name));
                }
            }
            ':' if at(i + 1) == ':' => {
                found.push((line, "::".into()));
                i += 2;
            }
            c => {
                if !c.is_whitespace() {
                    found.push((line, c.into()));
                }
                i += 1;
            }
        }
        line += text[start..i.min(text.len())].iter().filter(|c| **c == '\n').count();
    }
    found
}

/// The rooms that a source names, with the lines. `module` is the file's own path: `["vm", "fleece"]`.
fn imports(source: &str, module: &[String]) -> BTreeSet<(usize, String)> {
    let tokens = tokens(source);
    let is = |i: usize, what: &str| tokens.get(i).is_some_and(|(_, t)| t == what);
    let mut found = BTreeSet::new();
    // Inline modules: the names, each with the depth of braces at which it began.
    let (mut inside, mut depth) = (vec![], 0);
    let mut i = 0;
    while i < tokens.len() {
        match tokens[i].1.as_str() {
            "mod" if is(i + 2, "{") => inside.push((tokens[i + 1].1.clone(), depth)),
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                inside.pop_if(|(_, began)| *began == depth);
            }
            "crate" if is(i + 1, "::") => path(&tokens, i + 2, vec![], &mut found),
            "super" if is(i + 1, "::") && !(i > 1 && is(i - 1, "::") && is(i - 2, "super")) => {
                let mut here: Vec<String> = module.to_vec();
                here.extend(inside.iter().map(|(name, _)| name.clone()));
                path(&tokens, i, here, &mut found);
            }
            _ => {}
        }
        i += 1;
    }
    found
}

/// Follows a path or a group of paths from token `i` on; `here` is the module that it starts from.
fn path(tokens: &[(usize, String)], mut i: usize, mut here: Vec<String>, found: &mut BTreeSet<(usize, String)>) {
    while tokens.get(i).is_some_and(|(_, t)| t == "super" || t == "self") {
        if tokens[i].1 == "super" {
            here.pop();
        }
        i += 1;
        if tokens.get(i).is_none_or(|(_, t)| t != "::") {
            break;
        }
        i += 1;
    }
    let Some((line, token)) = tokens.get(i) else { return };
    if let Some(room) = here.first() {
        found.insert((*line, room.clone()));
    } else if token == "{" {
        let mut depth = 0;
        for k in i..tokens.len() {
            match tokens[k].1.as_str() {
                "{" => depth += 1,
                "}" => depth -= 1,
                _ => {}
            }
            if depth == 0 {
                break;
            }
            if depth == 1 && matches!(tokens[k].1.as_str(), "{" | ",") {
                path(tokens, k + 1, vec![], found);
            }
        }
    } else if token.chars().all(|c| c.is_alphanumeric() || c == '_') {
        found.insert((*line, token.clone()));
    }
}

/// What is wrong with these sources (path below `src/`, text), given the layers.
fn violations(layers: &[Vec<String>], sources: &[(PathBuf, String)]) -> Vec<String> {
    let level = |room: &str| layers.iter().position(|line| line.iter().any(|r| r == room));
    let mut wrong = vec![];
    let mut base: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (file, source) in sources {
        let mut module: Vec<String> =
            file.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect();
        module.pop_if(|last| last == "mod");
        let room = module[0].clone();
        if matches!(room.as_str(), "lib" | "main" | "bin") {
            continue;
        }
        let Some(own) = level(&room) else {
            wrong.push(format!("src/{}: `{room}` is not in the layer list of src/lib.rs", file.display()));
            continue;
        };
        for (line, named) in imports(source, &module) {
            let at = format!("src/{}:{line}: `{room}`", file.display());
            match level(&named) {
                _ if named == room => {}
                None => wrong.push(format!("{at} imports `{named}`, which is not in the layer list of src/lib.rs")),
                Some(other) if other == own && own == layers.len() - 1 => {
                    base.entry(room.clone()).or_default().insert(named);
                }
                Some(other) if other == own => wrong.push(format!("{at} imports `{named}` of its own line")),
                Some(other) if other < own => wrong.push(format!("{at} imports `{named}` of a line above")),
                Some(_) => {}
            }
        }
    }
    // The base: take away rooms that import none of those left, until none is left or a cycle.
    while let Some(free) = base.keys().find(|room| base[*room].iter().all(|r| !base.contains_key(r))).cloned() {
        base.remove(&free);
    }
    if !base.is_empty() {
        wrong.push(format!("rooms of the last line import one another in a circle, among these: {base:?}"));
    }
    wrong
}

/// All Rust files below a directory, with their texts; paths relative to it.
fn sources(dir: &Path) -> Vec<(PathBuf, String)> {
    let (mut found, mut open) = (vec![], vec![dir.to_owned()]);
    while let Some(next) = open.pop() {
        let Ok(entries) = std::fs::read_dir(&next) else { continue };
        for entry in entries.map(|e| e.unwrap().path()) {
            if entry.is_dir() {
                open.push(entry);
            } else if entry.extension().is_some_and(|e| e == "rs") {
                let text = std::fs::read_to_string(&entry).unwrap();
                found.push((entry.strip_prefix(dir).unwrap().to_owned(), text));
            }
        }
    }
    found.sort();
    found
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn a_room_imports_only_rooms_below() {
    let layers = layers(&std::fs::read_to_string(root().join("src/lib.rs")).unwrap());
    let wrong = violations(&layers, &sources(&root().join("src")));
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for room in layers.concat() {
        let exists = ["src/{}.rs", "src/{}/mod.rs"].iter().any(|p| root().join(p.replace("{}", &room)).exists());
        assert!(exists, "src/lib.rs lists `{room}`, which is not there");
    }
}

#[test]
fn files_stay_small() {
    let mut long = vec![];
    for dir in ["src", "tests", "benches"] {
        for (file, text) in sources(&root().join(dir)) {
            if text.lines().count() > MAX_LINES {
                long.push(format!("{dir}/{}: {} lines", file.display(), text.lines().count()));
            }
        }
    }
    assert!(long.is_empty(), "past {MAX_LINES} lines a file is two things; which?\n{}", long.join("\n"));
}

#[test]
fn the_check_finds_what_is_wrong() {
    let layers =
        layers("//! # Layers\n//!\n//! Words.\n//!\n//! ```text\n//! top\n//! left right\n//! ground soil\n//! ```\n");
    assert_eq!(layers, [vec!["top"], vec!["left", "right"], vec!["ground", "soil"]]);
    let check = |file: &str, source: &str| violations(&layers, &[(file.into(), source.into())]);
    for good in [
        "use crate::ground::Stone; use crate::{soil, left::x};",
        "//! [`crate::top`]\n/* crate::top /* */ crate::right */ const A: &str = \"crate::top\"; fn f<'a>(c: char) {}",
        "const A: &str = r#\"a\" crate::top\"#; const B: char = '\"'; const C: char = '\\''; // crate::top",
        "mod tests { use super::*; mod deep { use super::super::thing; } }",
    ] {
        assert_eq!(check("left.rs", good), Vec::<String>::new(), "{good}");
    }
    for (file, bad, said) in [
        ("left.rs", "\nuse crate::top::x;", "src/left.rs:2: `left` imports `top` of a line above"),
        ("left.rs", "use crate::right;", "src/left.rs:1: `left` imports `right` of its own line"),
        ("left/deep.rs", "fn f() { crate::right::f() }", "src/left/deep.rs:1: `left` imports `right` of its own line"),
        ("left/mod.rs", "use crate::{ground::{a, b},\n top::{c, d}};", "src/left/mod.rs:2: `left` imports `top` of a"),
        ("left/deep.rs", "use super::super::top::x;", "imports `top` of a line above"),
        ("left.rs", "use super::{ground, top};", "imports `top` of a line above"),
        ("left.rs", "mod tests { fn f() { super::super::top::x(); } }", "imports `top` of a line above"),
        ("left.rs", "const A: char = '\"'; use crate::top; const B: char = '\"';", "imports `top`"),
        ("left.rs", "use crate::unheard;", "imports `unheard`, which is not in the layer list"),
        ("unheard.rs", "", "`unheard` is not in the layer list"),
    ] {
        let wrong = check(file, bad);
        assert!(wrong.len() == 1 && wrong[0].contains(said), "{bad}: {wrong:?}");
    }
    let twins = |a: &str, b: &str| violations(&layers, &[("ground.rs".into(), a.into()), ("soil.rs".into(), b.into())]);
    assert_eq!(twins("use crate::soil;", ""), Vec::<String>::new());
    assert!(twins("use crate::soil;", "use crate::ground;")[0].contains("circle"));
}
