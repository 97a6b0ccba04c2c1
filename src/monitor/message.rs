//! Messages of QMP: lines out of bytes, and what a line says. Pure: no input or output.
//!
//! `line = JSON object ‖ CR ‖ LF` (QEMU's `docs/interop/qmp-spec.rst`).

use std::fmt;
use std::time::{Duration, SystemTime};

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Longest line that we take from QEMU. The longest known reply, `query-qmp-schema`, has 0.25 MiB; a list of 1,000
/// nodes with their images about 2 MiB.
pub(super) const MAX_LINE_BYTES: usize = 64 << 20;

/// A version of QEMU. Compares by its numbers first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second number.
    pub minor: u32,
    /// The third number.
    pub micro: u32,
    /// The distribution's own mark, `Debian 1:10.0.2+ds-2~bpo12+1`; often empty.
    pub package: String,
}

impl Version {
    /// A version without a distribution's mark: to compare with.
    pub const fn new(major: u32, minor: u32, micro: u32) -> Self {
        Self { major, minor, micro, package: String::new() }
    }

    /// Whether it is this version or a later one.
    pub fn at_least(&self, major: u32, minor: u32) -> bool {
        (self.major, self.minor) >= (major, minor)
    }

    fn parse(version: &Value) -> Option<Self> {
        let number = |name: &str| u32::try_from(version.get("qemu")?.get(name)?.as_u64()?).ok();
        Some(Self {
            major: number("major")?,
            minor: number("minor")?,
            micro: number("micro")?,
            package: version.get("package").and_then(Value::as_str).unwrap_or("").to_owned(),
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.micro)
    }
}

/// An event of QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// `STOP`, `BLOCK_EXPORT_DELETED`, … Names that we do not know are normal.
    pub name: String,
    /// Its members; `{}` for an event without any.
    pub data: Value,
    /// When QEMU says that it happened, by its host's clock.
    pub timestamp: SystemTime,
}

/// What a line says.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Greeting(Version),
    Return { id: Option<u64>, value: Value },
    Error { id: Option<u64>, class: String, desc: String },
    Event(Event),
}

impl Message {
    /// The message of a line, or what is wrong with it.
    pub(super) fn parse(line: &[u8]) -> Result<Message, String> {
        let value: Value = serde_json::from_slice(line).map_err(|e| format!("it sent {} ({e})", excerpt(line)))?;
        let Value::Object(mut members) = value else { return Err(format!("it sent {}", excerpt(line))) };
        let id = members.get("id").and_then(Value::as_u64);
        if let Some(name) = members.get("event").and_then(Value::as_str) {
            let name = name.to_owned();
            let timestamp = members.get("timestamp").and_then(timestamp).unwrap_or_else(SystemTime::now);
            let data = members.remove("data").unwrap_or_else(|| Value::Object(Default::default()));
            return Ok(Message::Event(Event { name, data, timestamp }));
        }
        if let Some(value) = members.remove("return") {
            return Ok(Message::Return { id, value });
        }
        if let Some(error) = members.get("error").filter(|e| e.is_object()) {
            let text =
                |name: &str, default: &str| error.get(name).and_then(Value::as_str).unwrap_or(default).to_owned();
            return Ok(Message::Error {
                id,
                class: text("class", "GenericError"),
                desc: text("desc", "no description"),
            });
        }
        if let Some(version) = members.get("QMP").and_then(|g| Version::parse(g.get("version")?)) {
            return Ok(Message::Greeting(version));
        }
        Err(format!("it sent {}", excerpt(line)))
    }
}

/// QEMU writes -1 where its clock failed.
fn timestamp(value: &Value) -> Option<SystemTime> {
    let seconds = value.get("seconds")?.as_u64()?;
    let micros = value.get("microseconds")?.as_u64()?.min(999_999);
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds) + Duration::from_micros(micros))
}

/// The beginning of what a peer sent, fit for an error message.
pub(super) fn excerpt(bytes: &[u8]) -> String {
    const LONGEST: usize = 80;
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(LONGEST)]);
    format!("{text:?}{}", if bytes.len() > LONGEST { "…" } else { "" })
}

/// Cuts a stream into lines of bounded length.
#[derive(Debug)]
pub(super) struct Lines {
    buffer: Vec<u8>,
    /// Where the bytes begin that were not given out.
    start: usize,
    /// Up to where no line end was found.
    searched: usize,
    max_line_bytes: usize,
}

impl Lines {
    pub(super) fn new(max_line_bytes: usize) -> Self {
        Self { buffer: Vec::new(), start: 0, searched: 0, max_line_bytes }
    }

    /// Takes more bytes of the stream. Call [`Lines::next`] until it gives `None` in between.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.buffer.drain(..self.start);
        self.searched -= self.start;
        self.start = 0;
        // One long reply must not keep its memory for the connection's life.
        if self.buffer.is_empty() && self.buffer.capacity() > 1 << 20 {
            self.buffer = Vec::new();
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// The next line that is not empty, without its end; `None` when more bytes are needed; an error when the line is
    /// too long.
    pub(super) fn next(&mut self) -> Result<Option<&[u8]>, String> {
        loop {
            let Some(at) = self.buffer[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.buffer.len();
                let len = self.buffer.len() - self.start;
                if len > self.max_line_bytes {
                    return Err(format!("it sent a line of more than {} bytes", self.max_line_bytes));
                }
                return Ok(None);
            };
            let (from, to) = (self.start, self.searched + at);
            self.start = to + 1;
            self.searched = to + 1;
            if to - from > self.max_line_bytes {
                return Err(format!("it sent a line of more than {} bytes", self.max_line_bytes));
            }
            if !self.buffer[from..to].trim_ascii().is_empty() {
                return Ok(Some(self.buffer[from..to].trim_ascii()));
            }
        }
    }

    /// The bytes of a line that has not ended.
    pub(super) fn rest(&self) -> &[u8] {
        &self.buffer[self.start..]
    }
}

/// What fuzzing runs: any bytes as what a monitor sends. Must neither panic nor hang, whatever they are.
pub fn fuzz(bytes: &[u8]) {
    let mut lines = Lines::new(4096);
    for piece in bytes.chunks(1500) {
        lines.push(piece);
        while let Ok(Some(line)) = lines.next() {
            let _ = Message::parse(line);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const LINES: [&str; 6] = [
        r#"{"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": "Debian"}, "capabilities": ["oob"]}}"#,
        r#"{"return": {"status": "running", "x": [1, -2, 3.5, null, "\u00e9"]}, "id": 17}"#,
        r#"{"id": 18, "error": {"class": "GenericError", "desc": "no"}}"#,
        r#"{"timestamp": {"seconds": 1700000000, "microseconds": 5}, "event": "STOP"}"#,
        r#"{"timestamp": {"seconds": -1, "microseconds": -1}, "event": "RESET", "data": {"guest": true}}"#,
        r#"{"return": {}, "id": 18446744073709551615}"#,
    ];

    #[test]
    fn lines_say_what_they_say() {
        let parsed = LINES.map(|l| Message::parse(l.as_bytes()).unwrap());
        assert_eq!(parsed[0], Message::Greeting(Version { package: "Debian".into(), ..Version::new(10, 0, 2) }));
        assert!(matches!(&parsed[1], Message::Return { id: Some(17), value } if value["x"][4] == "é"));
        assert!(matches!(&parsed[2], Message::Error { id: Some(18), desc, .. } if desc == "no"));
        let Message::Event(stop) = &parsed[3] else { panic!("{:?}", parsed[3]) };
        assert_eq!((stop.name.as_str(), &stop.data), ("STOP", &json!({})));
        assert_eq!(stop.timestamp.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros(), 1_700_000_000_000_005);
        assert!(matches!(&parsed[4], Message::Event(e) if e.data["guest"] == true));
        assert!(matches!(&parsed[5], Message::Return { id: Some(u64::MAX), .. }));
    }

    #[test]
    fn versions_compare_by_their_numbers() {
        let debian = Version { package: "Debian".into(), ..Version::new(7, 2, 22) };
        assert!(debian > Version::new(7, 2, 0) && debian < Version::new(8, 0, 0));
        assert!(debian.at_least(7, 2) && !debian.at_least(7, 3) && !debian.at_least(8, 0));
    }

    #[test]
    fn long_lines_are_refused_at_any_cut() {
        for cut in [1, 3, 64] {
            let mut lines = Lines::new(10);
            let mut took = vec![];
            let mut refused = false;
            for piece in b"1234567890\n\r\nab\n12345678901\n".chunks(cut) {
                lines.push(piece);
                loop {
                    match lines.next() {
                        Ok(Some(line)) => took.push(line.to_vec()),
                        Ok(None) => break,
                        Err(_) => {
                            refused = true;
                            break;
                        }
                    }
                }
                if refused {
                    break;
                }
            }
            assert_eq!(took, [b"1234567890".to_vec(), b"ab".to_vec()]);
            assert!(refused, "cut {cut}");
        }
    }

    /// Feeds a stream in pieces of these sizes and gives all that came out.
    fn read(stream: &[u8], sizes: &[usize]) -> Vec<Result<Message, String>> {
        let mut lines = Lines::new(4096);
        let mut out = vec![];
        let mut rest = stream;
        let mut sizes = sizes.iter().cycle();
        while !rest.is_empty() {
            let (piece, after) = rest.split_at((*sizes.next().unwrap_or(&1)).clamp(1, rest.len()));
            rest = after;
            lines.push(piece);
            while let Some(line) = match lines.next() {
                Ok(line) => line,
                Err(e) => {
                    out.push(Err(e));
                    return out;
                }
            } {
                out.push(Message::parse(line));
            }
        }
        out
    }

    proptest! {
        #[test]
        fn pieces_make_no_difference(sizes in prop::collection::vec(1usize..200, 1..20)) {
            let stream = LINES.map(|l| format!("{l}\r\n")).concat();
            let whole = read(stream.as_bytes(), &[usize::MAX]);
            prop_assert_eq!(whole.len(), LINES.len());
            let cut = read(stream.as_bytes(), &sizes);
            // Events without a clock are stamped when they are read.
            let text = |all: &[Result<Message, String>]| {
                all.iter().map(|m| if let Ok(Message::Event(e)) = m { e.name.clone() } else { format!("{m:?}") }).collect::<Vec<_>>()
            };
            prop_assert_eq!(text(&cut), text(&whole));
        }

        #[test]
        fn mutated_lines_never_panic(
            which in 0usize..LINES.len(),
            edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 0..8),
            sizes in prop::collection::vec(1usize..64, 1..8),
        ) {
            let mut bytes = format!("{}\r\n", LINES[which]).into_bytes();
            for (at, byte, kind) in edits {
                let at = at.index(bytes.len());
                match kind {
                    0 => bytes[at] = byte,
                    1 => bytes.insert(at, byte),
                    2 if bytes.len() > 1 => drop(bytes.remove(at)),
                    _ => bytes.extend_from_within(at..),
                }
            }
            for message in read(&bytes, &sizes).into_iter().flatten() {
                let _ = format!("{message:?}");
            }
        }

        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2048)) {
            let _ = read(&bytes, &[7, 64]);
            let _ = Message::parse(&bytes);
        }
    }
}
