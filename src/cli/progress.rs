//! Progress: a bar on a terminal, a line every few seconds elsewhere, JSON lines with `--json`; always on standard error.

use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::output::{self, Output};
use crate::units::human_bytes;

const LINE_EVERY: Duration = Duration::from_secs(5);
const JSON_EVERY: Duration = Duration::from_secs(1);
const BAR_EVERY: Duration = Duration::from_millis(100);

/// The bar on the screen: a log line must not be written into it.
static BAR: Mutex<Option<ProgressBar>> = Mutex::new(None);

/// A writer for lines above the bar.
pub fn above_the_bar() -> impl Write {
    AboveTheBar
}

struct AboveTheBar;

impl Write for AboveTheBar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &*BAR.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(bar) => bar.suspend(|| io::stderr().write(bytes)),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

enum How {
    Silent,
    Bar(ProgressBar),
    Lines,
    Json,
}

/// Shows how far something is.
pub struct Meter {
    how: How,
    started: Instant,
    shown: Instant,
    every: Duration,
}

#[derive(Serialize)]
struct ProgressLine<'a> {
    progress: &'a str,
    done_bytes: u64,
    total_bytes: u64,
    bytes_per_second: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    seconds_left: Option<u64>,
}

impl Meter {
    /// A meter that shows nothing yet.
    pub fn new(output: Output) -> Self {
        let (how, every) = match (output.json, output.quiet, io::stderr().is_terminal()) {
            (_, true, _) => (How::Silent, LINE_EVERY),
            (true, ..) => (How::Json, JSON_EVERY),
            (.., true) => (How::Bar(bar()), BAR_EVERY),
            _ => (How::Lines, LINE_EVERY),
        };
        Self { how, started: Instant::now(), shown: Instant::now(), every }
    }

    /// It is so far. Cheap: shown only now and then.
    pub fn at(&mut self, doing: &str, done_bytes: u64, total_bytes: u64) {
        if self.shown.elapsed() < self.every {
            return;
        }
        self.shown = Instant::now();
        let seconds = self.started.elapsed().as_secs_f64().max(0.001);
        let rate = done_bytes as f64 / seconds;
        let left = total_bytes.saturating_sub(done_bytes) as f64;
        let seconds_left = (rate >= 1.0).then(|| (left / rate).ceil() as u64);
        match &self.how {
            How::Silent => {}
            How::Bar(bar) => {
                bar.set_length(total_bytes);
                bar.set_position(done_bytes);
                bar.set_message(output::name(doing).into_owned());
            }
            How::Lines => {
                let eta = seconds_left.map_or(String::new(), |s| format!(", {} left", human_seconds(s)));
                let (done, total) = (human_bytes(done_bytes), human_bytes(total_bytes));
                let _ = writeln!(
                    io::stderr(),
                    "{}: {done} of {total}, {}/s{eta}",
                    output::name(doing),
                    human_bytes(rate as u64)
                );
            }
            How::Json => {
                let bytes_per_second = rate as u64;
                let line = ProgressLine { progress: doing, done_bytes, total_bytes, bytes_per_second, seconds_left };
                if let Ok(text) = serde_json::to_string(&line) {
                    let _ = writeln!(io::stderr(), "{text}");
                }
            }
        }
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        if let How::Bar(bar) = &self.how {
            bar.finish_and_clear();
            BAR.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }
}

fn bar() -> ProgressBar {
    let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
    let looks = "{msg} [{bar:30}] {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(looks) {
        bar.set_style(style.progress_chars("=> "));
    }
    *BAR.lock().unwrap_or_else(PoisonError::into_inner) = Some(bar.clone());
    bar
}

/// `59 s`, `2 min 5 s`, `3 h 20 min`.
pub fn human_seconds(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
    }
}
