//! Output: the one place that prints. A report is anything that can be serialized and shown as text.

use std::borrow::Cow;
use std::fmt::Display;
use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use serde::Serialize;

use super::exit::{self, Code};

/// How to print.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON instead of text.
    pub json: bool,
    /// Only what was asked for.
    pub quiet: bool,
}

#[derive(Serialize)]
struct ErrorReport<'a> {
    error: ErrorBody<'a>,
}

#[derive(Serialize)]
struct ErrorBody<'a> {
    code: &'a str,
    message: String,
}

/// Set once nobody reads standard output any more, as behind `| head`.
static CLOSED: AtomicBool = AtomicBool::new(false);
/// Set once something could not be printed there.
static LOST: AtomicBool = AtomicBool::new(false);

/// A text without what a terminal would take for a command: names come from QEMU, guests, servers and repositories. Line ends
/// of ours stay.
pub fn plain(text: &str) -> Cow<'_, str> {
    escape(text, |c| c.is_control() && c != '\n')
}

/// A name within a text: it has no line ends either.
pub fn name(text: &str) -> Cow<'_, str> {
    escape(text, char::is_control)
}

/// [`name`]s, with commas between them.
pub fn names(texts: &[String]) -> String {
    texts.iter().map(|text| name(text)).collect::<Vec<_>>().join(", ")
}

fn escape(text: &str, is_escaped: impl Fn(char) -> bool) -> Cow<'_, str> {
    if !text.contains(&is_escaped) {
        return Cow::Borrowed(text);
    }
    let mut plain = String::with_capacity(text.len() + 8);
    for c in text.chars() {
        match is_escaped(c) {
            true => plain.extend(c.escape_default()),
            false => plain.push(c),
        }
    }
    Cow::Owned(plain)
}

fn line(mut to: impl Write, text: impl Display) -> io::Result<()> {
    writeln!(to, "{text}").and_then(|()| to.flush())
}

/// Prints a line on standard output. A script must not take a report that was cut off for a whole one.
fn say(text: impl Display) {
    match line(io::stdout().lock(), text) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => CLOSED.store(true, Ordering::Relaxed),
        Err(error) => {
            LOST.store(true, Ordering::Relaxed);
            let _ = line(io::stderr().lock(), format_args!("livebackup: the report cannot be written: {error}"));
        }
    }
}

impl Output {
    /// Prints what was asked for.
    pub fn print(&self, report: &(impl Serialize + Display)) {
        match self.json {
            true => self.json_line(report),
            false => say(plain(report.to_string().trim_end_matches('\n'))),
        }
    }

    /// Prints what was done: not with `--quiet`.
    pub fn done(&self, report: &(impl Serialize + Display)) {
        if self.json || !self.quiet {
            self.print(report);
        }
    }

    fn json_line(&self, report: &impl Serialize) {
        match serde_json::to_string(report) {
            Ok(text) => say(text),
            Err(error) => drop(line(io::stderr().lock(), format_args!("livebackup: the report is no JSON: {error}"))),
        }
    }

    /// Whether nobody reads any more.
    pub fn is_closed(&self) -> bool {
        CLOSED.load(Ordering::Relaxed)
    }

    /// The code to end with: what was printed may not have arrived.
    pub fn checked(&self, code: Code) -> Code {
        if code == Code::Good && LOST.load(Ordering::Relaxed) { Code::Failed } else { code }
    }

    /// Prints an error, and gives the code to end with.
    pub fn error(&self, error: &anyhow::Error) -> Code {
        let code = exit::code(error);
        let message = message(error);
        match self.json {
            true => self.json_line(&ErrorReport { error: ErrorBody { code: code.name(), message } }),
            false => drop(line(io::stderr().lock(), format_args!("livebackup: {}", plain(&message)))),
        }
        code
    }
}

/// The error with its causes, each said once: many errors have their cause's words in their own.
pub fn message(error: &anyhow::Error) -> String {
    let mut message = String::new();
    for cause in error.chain() {
        let words = cause.to_string();
        if message.is_empty() {
            message = words;
        } else if !message.contains(&words) {
            message = format!("{message}: {words}");
        }
    }
    message
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminal_gets_no_commands() {
        assert_eq!(plain("a\x1b[2Jb\r\nc\u{9b}31m\tä"), "a\\u{1b}[2Jb\\r\nc\\u{9b}31m\\tä");
        assert_eq!(name("vm\n1"), "vm\\n1");
        assert!(matches!(plain("höhe\n2"), Cow::Borrowed(_)));
    }

    #[test]
    fn causes_are_said_once() {
        let inner = anyhow::anyhow!("permission denied");
        let error = inner.context("cannot open /x: permission denied").context("cannot verify");
        assert_eq!(message(&error), "cannot verify: cannot open /x: permission denied");
    }
}
