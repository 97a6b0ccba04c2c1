//! The report as one page for a browser: it needs no other file, no script and no network. Pictures are SVG made here.
//!
//! For each workload: bars of what was left of the rate, the table, and for each method two pictures over time, of the rate and of
//! how long writes took (p50 to the slowest), with every round in them. All pictures of a workload have the same scales, so that they can be
//! compared at a glance.

use std::fmt::Write;

use super::courses::Scales;
use super::figures::Point;
use super::load::Workload;
use super::report::{Measured, Report, Run, Summary};
use super::text::micros;

const WIDE: f64 = 560.0;
const HIGH: f64 = 150.0;
/// Room for the labels of the scales.
const LEFT: f64 = 62.0;
const BELOW: f64 = 22.0;
/// A bar's height, and where it begins.
const BAR: f64 = 20.0;
const BARS_LEFT: f64 = 190.0;
const BARS_WIDE: f64 = 900.0;
/// Labels of an axis that are nearer to one another than this would run into each other.
const LABEL: f64 = 44.0;
/// Two points further apart than so many bins are not of one stretch of time.
const GAP_BINS: f64 = 4.0;

const STYLE: &str = "
:root { color-scheme: light dark; --ink: #1d2433; --paper: #fff; --faint: #8891a5; --grid: #dfe3ea; --line: #2b6cb0;
  --slow: #c05621; --shade: #f3e9d7; --ours: #2f855a; --theirs: #718096; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e7ef; --paper: #14181f; --faint: #8a93a6; --grid: #2c333f;
  --line: #63b3ed; --slow: #f6ad55; --shade: #2a2a22; --ours: #68d391; --theirs: #a0aec0; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 1180px; margin: 2em auto;
  padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.2em; margin-top: 2em; } h3 { font-size: 1em; margin: 1.6em 0 .2em; }
p.faint, figcaption { color: var(--faint); margin: .2em 0; font-size: .9em; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .82em; }
th, td { text-align: right; padding: .2em .6em; border-bottom: 1px solid var(--grid); white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
th:nth-child(2), td:nth-child(2) { white-space: normal; min-width: 12em; }
.pair { display: flex; flex-wrap: wrap; gap: 16px; } figure { margin: 0; }
svg { display: block; max-width: 100%; height: auto; } .wide svg { max-width: none; } svg text { font-size: 11px; fill: var(--faint); } svg text.ink { fill: var(--ink); }
.grid { stroke: var(--grid); } .shade { fill: var(--shade); }
.line { fill: none; stroke: var(--line); stroke-opacity: .75; } .slow { fill: none; stroke: var(--slow); stroke-opacity: .75; }
.slower { fill: none; stroke: var(--slow); stroke-opacity: .6; stroke-dasharray: 2 2; } .band { fill: var(--slow); fill-opacity: .14; }
.ours { fill: var(--ours); } .theirs { fill: var(--theirs); } .spread { stroke: var(--ink); }
";

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The page.
pub fn page(report: &Report) -> String {
    let mut out = String::new();
    let title = "What backups cost a guest's writes";
    out += "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n";
    out += "<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n";
    put(&mut out, format_args!("<title>{title}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"));
    for line in report.head() {
        put(&mut out, format_args!("<p class=\"faint\">{}</p>\n", escaped(&line)));
    }
    for workload in report.workloads() {
        put(&mut out, format_args!("<h2>{workload}: {}</h2>\n", escaped(workload.words())));
        let own: Vec<_> = report.summaries.iter().filter(|s| s.workload == workload.name()).collect();
        let measured: Vec<_> = own.iter().filter_map(|s| Some((*s, s.measured.as_ref()?))).collect();
        bars(&mut out, &measured);
        table(&mut out, &measured);
        for summary in &own {
            if let Some(why) = &summary.not_measured {
                let text = format!("{}: not (always) measured: {why}", summary.case);
                put(&mut out, format_args!("<p class=\"faint\">{}</p>\n", escaped(&text)));
            }
        }
        courses(&mut out, report, workload, &measured);
    }
    let hoped: Vec<_> = report.targets.iter().filter_map(|t| Some((t, t.value?, t.met?))).collect();
    if !hoped.is_empty() {
        out += "<h2>What is hoped for</h2>\n<ul>\n";
    }
    for (target, value, met) in &hoped {
        let met = if *met { "" } else { "; missed" };
        put(&mut out, format_args!("<li>{}: {value:.2}{met}</li>\n", escaped(&target.words)));
    }
    out += if hoped.is_empty() { "</body>\n</html>\n" } else { "</ul>\n</body>\n</html>\n" };
    out
}

/// Writing to a text never fails.
fn put(out: &mut String, what: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(what);
}

/// What was left of the rate, by method.
fn bars(out: &mut String, measured: &[(&Summary, &Measured)]) {
    let most = measured.iter().map(|(_, m)| m.rate_share.most).fold(1.0, f64::max);
    let high = measured.len() as f64 * BAR + BELOW;
    let x = |share: f64| BARS_LEFT + share / most * (BARS_WIDE - BARS_LEFT - 50.0);
    let view = format!("viewBox=\"0 0 {BARS_WIDE} {high}\" width=\"{BARS_WIDE}\" role=\"img\"");
    put(out, format_args!("<figure class=\"wide\"><svg {view}>\n"));
    for share in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let (at, end) = (x(share), high - BELOW);
        put(out, format_args!("<line class=\"grid\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"0\" y2=\"{end:.1}\"/>\n"));
        let y = high - 6.0;
        put(out, format_args!("<text x=\"{at:.1}\" y=\"{y:.1}\" text-anchor=\"middle\">{share}</text>\n"));
    }
    for (i, (summary, m)) in measured.iter().enumerate() {
        let top = i as f64 * BAR;
        let (middle, text) = (top + BAR / 2.0, top + BAR / 2.0 + 4.0);
        let class = if is_ours(summary.method) { "ours" } else { "theirs" };
        put(out, format_args!("<text class=\"ink\" x=\"0\" y=\"{text:.1}\">{}</text>\n", escaped(&summary.case)));
        let (y, wide, high) = (top + 4.0, x(m.rate_share.median) - BARS_LEFT, BAR - 8.0);
        put(
            out,
            format_args!(
                "<rect class=\"{class}\" x=\"{BARS_LEFT}\" y=\"{y:.1}\" width=\"{wide:.1}\" height=\"{high}\"/>\n"
            ),
        );
        let (from, to) = (x(m.rate_share.least), x(m.rate_share.most));
        put(
            out,
            format_args!(
                "<line class=\"spread\" x1=\"{from:.1}\" x2=\"{to:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\"/>\n"
            ),
        );
        let (at, share) = (to + 6.0, m.rate_share.median);
        put(out, format_args!("<text class=\"ink\" x=\"{at:.1}\" y=\"{text:.1}\">{share:.2}</text>\n"));
    }
    out.push_str("</svg>\n<figcaption>Operations a second during the backup, as a share of the idle ones: the median before all backups of a round (of lvm: before it); ");
    out.push_str(
        "the thin line is from the least to the most of the rounds. Green is livebackup.</figcaption></figure>\n",
    );
}

fn is_ours(method: &str) -> bool {
    method.parse::<super::method::Method>().is_ok_and(super::method::Method::is_ours)
}

fn table(out: &mut String, measured: &[(&Summary, &Measured)]) {
    out.push_str("<div class=\"wide\"><table>\n<tr>");
    for head in [
        "method",
        "what",
        "before /s",
        "during /s",
        "after /s",
        "during / idle",
        "p50",
        "p99 before",
        "p99",
        "p99.9",
        "slowest",
        "took",
        "guest lost",
        "ended",
        "others' CPUs",
    ] {
        put(out, format_args!("<th>{head}</th>"));
    }
    out.push_str("</tr>\n");
    for (summary, m) in measured {
        out.push_str("<tr>");
        let (p50, p99, p999) = (m.during.p50_us.median, m.during.p99_us.median, m.during.p999_us.median);
        for cell in [
            escaped(&summary.case),
            escaped(summary.words),
            format!("{:.0}", m.before.per_second.median),
            format!("{:.0}", m.during.per_second.median),
            format!("{:.0}", m.after.per_second.median),
            format!("{:.2} ({:.2}-{:.2})", m.rate_share.median, m.rate_share.least, m.rate_share.most),
            micros(p50),
            micros(m.before.p99_us.median),
            micros(p99),
            micros(p999),
            micros(m.during.max_us.most),
            format!("{:.2} s", m.took_s.median),
            format!("{:.2} s", m.lost_s.median),
            format!("{} of {}", m.finished, summary.rounds),
            format!("{:.1}", m.others_cores.median),
        ] {
            put(out, format_args!("<td>{cell}</td>"));
        }
        out.push_str("</tr>\n");
    }
    out.push_str(
        "</table></div>\n<p class=\"faint\">Latencies are of writes, during the backup unless said otherwise; ",
    );
    out.push_str(
        "medians of the rounds, but the slowest of all. Others' CPUs: processors that other programs kept busy ",
    );
    out.push_str("meanwhile. Pictures over time have every round in them, with the same scales; the backup is shaded, for the median of its time.</p>\n");
}

fn courses(out: &mut String, report: &Report, workload: Workload, measured: &[(&Summary, &Measured)]) {
    let runs: Vec<_> = report.runs.iter().filter(|run| run.workload == workload.name()).collect();
    let scales = Scales::of(runs.iter().copied());
    for (summary, m) in measured {
        let own = summary.of(&report.runs);
        put(out, format_args!("<h3>{}: {}</h3>\n", escaped(&summary.case), escaped(summary.words)));
        out.push_str("<div class=\"pair\">\n");
        picture(out, &own, m.took_s.median, &scales, false);
        picture(out, &own, m.took_s.median, &scales, true);
        out.push_str("</div>\n");
    }
}

/// A round step that cuts a scale into at most five parts.
fn step(most: f64) -> f64 {
    let least = (most / 5.0).max(1e-9);
    let decade = 10f64.powf(least.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].map(|n| n * decade).into_iter().find(|step| *step >= least * 0.999).unwrap_or(least)
}

/// One picture over time: the rate, or how long writes took on a logarithmic scale.
fn picture(out: &mut String, runs: &[&Run], took_s: f64, scales: &Scales, slow: bool) {
    let times = || runs.iter().flat_map(|run| &run.course).map(|point| point.at_s);
    let (from, to) = (times().fold(0.0, f64::min), times().fold(took_s, f64::max).max(0.1));
    let x = |at: f64| LEFT + (at - from) / (to - from) * (WIDE - LEFT - 6.0);
    let decades = scales.decades();
    let y = |value: f64| {
        let share = if slow { scales.latency(value) } else { scales.rate(value) };
        (HIGH - BELOW) - share.clamp(0.0, 1.0) * (HIGH - BELOW - 8.0)
    };
    let view = format!("viewBox=\"0 0 {WIDE} {HIGH}\" width=\"{WIDE}\" height=\"{HIGH}\" role=\"img\"");
    put(out, format_args!("<figure><svg {view}>\n"));
    let (start, wide) = (x(0.0), x(took_s) - x(0.0));
    let floor = HIGH - BELOW;
    put(
        out,
        format_args!("<rect class=\"shade\" x=\"{start:.1}\" y=\"0\" width=\"{wide:.1}\" height=\"{floor:.1}\"/>\n"),
    );
    let ticks: Vec<(f64, String)> = match slow {
        true => (0..=decades as i32).map(|n| scales.least_us * 10f64.powi(n)).map(|us| (us, micros(us))).collect(),
        false => {
            let step = step(scales.most_per_second);
            let ticks = (0..=5).map(|n| f64::from(n) * step).take_while(|tick| *tick <= scales.most_per_second);
            ticks.map(|tick| (tick, format!("{tick}"))).collect()
        }
    };
    for (value, words) in ticks {
        let (at, text, right) = (y(value), y(value) + 4.0, LEFT - 6.0);
        put(out, format_args!("<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDE}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\n"));
        put(out, format_args!("<text x=\"{right}\" y=\"{text:.1}\" text-anchor=\"end\">{words}</text>\n"));
    }
    let near = |a: f64, b: f64| (x(a) - x(b)).abs() < LABEL;
    let ends = (!near(took_s, 0.0) && !near(took_s, to)).then_some(took_s);
    for at in [Some(from).filter(|from| !near(*from, 0.0)), Some(0.0), ends, Some(to)].into_iter().flatten() {
        let (place, bottom) = (x(at), HIGH - 6.0);
        let anchor = if at == to { "end" } else { "middle" };
        put(out, format_args!("<text x=\"{place:.1}\" y=\"{bottom}\" text-anchor=\"{anchor}\">{at:.1} s</text>\n"));
    }
    let corner = |p: &Point, value: f64| format!("{:.1},{:.1}", x(p.at_s), y(value));
    for piece in runs.iter().flat_map(|run| pieces(&run.course, slow)) {
        let mut line = |class: &str, value: fn(&Point) -> f64| {
            let places: Vec<_> = piece.iter().map(|p| corner(p, value(p))).collect();
            put(out, format_args!("<polyline class=\"{class}\" points=\"{}\"/>\n", places.join(" ")));
        };
        if !slow {
            line("line", |p| p.per_second);
            continue;
        }
        line("slow", |p| p.write.p99_us);
        line("slower", |p| p.write.p999_us);
        let lower = piece.iter().map(|p| corner(p, p.write.p50_us));
        let places: Vec<_> = lower.chain(piece.iter().rev().map(|p| corner(p, p.write.max_us))).collect();
        put(out, format_args!("<polygon class=\"band\" points=\"{}\"/>\n", places.join(" ")));
    }
    let words = match slow {
        true => "how long writes took: p99 the line, p99.9 dashed, the band from p50 to the slowest",
        false => "operations a second",
    };
    put(out, format_args!("</svg><figcaption>{words}</figcaption></figure>\n"));
}

/// A course, cut where time is missing, and where nothing is known.
fn pieces(course: &[Point], slow: bool) -> Vec<Vec<Point>> {
    let bin = course.windows(2).map(|w| w[1].at_s - w[0].at_s).fold(f64::MAX, f64::min);
    let mut all: Vec<Vec<Point>> = vec![];
    let mut last: Option<Point> = None;
    for point in course.iter().filter(|point| !slow || point.write.p99_us > 0.0) {
        match (all.last_mut(), last) {
            (Some(piece), Some(last)) if point.at_s - last.at_s <= bin * GAP_BINS => piece.push(*point),
            _ => all.push(vec![*point]),
        }
        last = Some(*point);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::super::method::{Case, Method};
    use super::super::report::{Settings, summaries, targets, tests::run};
    use super::*;

    /// Opening and closing tags fit; gives how often each was opened.
    fn tags(page: &str) -> std::collections::BTreeMap<String, usize> {
        let (mut open, mut seen) = (vec![], std::collections::BTreeMap::new());
        for piece in page.split('<').skip(1) {
            let (tag, text) = piece.split_once('>').expect("a tag ends");
            assert!(!text.contains('>'), "{text}");
            assert!(tag.matches('"').count() % 2 == 0, "{tag}");
            let name = tag.trim_start_matches('/').split([' ', '/']).next().unwrap().to_owned();
            if tag.starts_with('!') || tag.ends_with('/') {
                *seen.entry(name).or_default() += 1;
            } else if tag.starts_with('/') {
                assert_eq!(open.pop(), Some(name), "in {tag:?}");
            } else {
                *seen.entry(name.clone()).or_default() += 1;
                open.push(name);
            }
        }
        assert!(open.is_empty(), "{open:?}");
        seen
    }

    #[test]
    fn the_page_is_whole_and_needs_nothing_else() {
        let cases = Case::all(&[Method::Nothing, Method::Fleece, Method::Lvm], &[None]);
        let runs = vec![run("none", 1, 100.0), run("none", 2, 90.0), run("fleece", 1, 50.0), run("fleece", 2, 40.0)];
        let gaps = [(Workload::Random, cases[2], "no <device> & \"mapper\"".to_owned())];
        let summaries = summaries(&[Workload::Random], &cases, &runs, &gaps);
        let report = Report {
            began: jiff::Timestamp::UNIX_EPOCH,
            took_s: 1.0,
            about: Default::default(),
            settings: Settings {
                size_bytes: 1 << 30,
                seconds: 5,
                rounds: 2,
                depth: 8,
                cache: "none",
                readers_bytes_per_second: vec![None],
            },
            targets: targets(&summaries),
            summaries,
            runs,
        };
        let page = page(&report);
        let seen = tags(&page);
        // Bars, and two pictures of each measured method, with one line and then two and a band for each round.
        assert_eq!((seen["svg"], seen["polyline"], seen["polygon"]), (5, 12, 4), "{page}");
        assert_eq!(seen["tr"], 3);
        for foreign in ["http", "<script", "src=", "href=", "url(", "@import", "NaN", "inf"] {
            assert!(!page.contains(foreign), "{foreign}");
        }
        assert!(page.contains("no &lt;device&gt; &amp; &quot;mapper&quot;"));
        // The text has the same rows.
        let text = report.to_string();
        for words in ["none    ", "fleece  ", "lvm: not measured: no <device>", "at least 0.50: 0.45; MISSED"] {
            assert!(text.contains(words), "{words}: {text}");
        }
    }

    #[test]
    fn a_course_is_cut_where_time_is_missing() {
        let write = |p99_us| super::super::figures::Latency { p99_us, ..Default::default() };
        let at = |at_s: f64, p99_us: f64| Point { at_s, per_second: 1.0, write: write(p99_us) };
        let course = [at(-1.0, 1.0), at(-0.9, 0.0), at(-0.8, 1.0), at(0.0, 1.0), at(0.1, 1.0)];
        let lengths = |slow| pieces(&course, slow).iter().map(Vec::len).collect::<Vec<_>>();
        assert_eq!((lengths(false), lengths(true)), (vec![3, 2], vec![2, 2]));
        assert!(pieces(&[], true).is_empty());
    }

    #[test]
    fn a_scale_has_round_steps() {
        for (most, found) in [(15_580.0, 5000.0), (100.0, 20.0), (1.0, 0.2), (36.0, 10.0), (12_000.0, 2500.0)] {
            assert!((step(most) - found).abs() < 1e-9, "{most}: {}", step(most));
        }
    }
}
