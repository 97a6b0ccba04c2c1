#!/usr/bin/env python3
"""The picture of a run of throughput.py: one SVG, without scripts and without anything from elsewhere, on a background of its own.

  bench/picture.py target/bench/throughput.json PICTURE.svg

A row is a way to do something, with two bars: its seconds (the median; the whisker goes from least to most) and its processor
seconds (tool, server and QEMU, one after the other: the median of each, and their sum). Rows are in groups (full, incremental,
unchanged, restore, map), in the order of the table; livebackup's have a colour of their own. Each group has scales of its own,
from 0. A bar of more than 3 times the group's median ends in a gap at the scale's end, so that the others can be seen; its
number is the whole one. A row that failed in each run says so in place of the bars, one that failed in some says in how many."""
import json, statistics, sys, textwrap, time
from xml.sax.saxutils import escape

TITLE = "Backups and restores by livebackup and by others: seconds and processor seconds"
GROUPS = {"full": "all data", "incremental": "the scattered writes", "unchanged": "all disks again, nothing written",
          "restore": "all data", "map": "all data, read over NBD"}
PARTS = {"cpu": "tool", "server": "server", "qemu": "QEMU"}

WIDTH, ROW, BAR, GAP = 900, 22, 12, 14
LABEL, LABEL_LETTERS = 316, 48  # where labels end, and what there is room for; longer ones are set smaller
BARS = {"seconds": (326, 150), "cpu": (610, 140)}  # where bars begin, and the longest
PAPER, INK, PALE, GRID, ALARM = "#ffffff", "#1f2328", "#59636e", "#d8dee4", "#b42318"
BOLD = ' font-weight="600"'
# The dark, the middle and the light of the stacked parts; the bar of seconds is the dark.
OURS, OTHERS = ("#0b6e4f", "#3fae86", "#a6dcc6"), ("#6b7580", "#9ea7b1", "#ccd2d8")

def safe(words):
    """XML takes no control characters, not even escaped."""
    return escape("".join(c if c.isprintable() else " " for c in words))

def text(x, y, words, size=11, fill=INK, anchor="start", more="", pale=""):
    """`pale` follows the words, smaller and paler."""
    after = f'<tspan dx="6" font-size="{min(size - 1, 11)}" font-weight="400" fill="{PALE}">{safe(pale)}</tspan>' if pale else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{more}>{safe(words)}{after}</text>'

def number(value):
    return "-" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"

def box(x, y, width, height, fill):
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" fill="{fill}"/>'

def line(x1, y1, x2, y2, stroke, width=1):
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" stroke="{stroke}" stroke-width="{width}"/>'

class Row:
    def __init__(self, what, costs, failed):
        self.label, self.ours, self.failed, self.ran = what.split(", ", 1)[-1], "livebackup" in what, failed, bool(costs)
        seconds = [c["seconds"] for c in costs]
        parts = {key: [c[key] for c in costs if key in c] for key in PARTS}
        if costs:
            self.median, self.least, self.most = statistics.median(seconds), min(seconds), max(seconds)
            self.parts = [statistics.median(values) if values else None for values in parts.values()]
            self.cpu = sum(part or 0 for part in self.parts)

class Scale:
    """From 0 to what most of these reach, with a few round numbers on the way."""
    def __init__(self, column, medians, reaches):
        self.x, self.room = BARS[column]
        self.end = min(max(reaches), 3 * statistics.median(medians)) or max(reaches) or 1.0
        # The smallest step of which the scale has four at most.
        self.step = next(step for power in range(-4, 9) for step in (10.0 ** power, 2 * 10.0 ** power, 5 * 10.0 ** power) if step * 4 >= self.end)
    def at(self, value):
        return self.x + min(value / self.end, 1) * self.room
    def grid(self, top, bottom):
        for i in range(int(self.end / self.step * 1.0001) + 1):
            yield line(self.at(i * self.step), top, self.at(i * self.step), bottom, GRID)
            yield text(self.at(i * self.step), top - 4, f"{i * self.step:g}", 10, PALE, "middle")
    def gap(self, value, y):
        """The gap near the end of a bar that is longer than the scale."""
        if value > self.end * 1.0001:
            x = self.x + self.room - 12
            yield f'<path d="M{x:.1f} {y + BAR + 1:.1f}l4 {-BAR - 2}h4l-4 {BAR + 2}z" fill="{PAPER}"/>'

def bars(row, y, seconds, cpu):
    colours, top, base = OURS if row.ours else OTHERS, y + (ROW - BAR) / 2, y + ROW / 2 + 4
    label = f"{row.label} ({row.failed} failed)" if row.failed and row.ran else row.label
    size = 11.5 * min(1, LABEL_LETTERS / len(label))
    yield text(LABEL, base, label, f"{size:.3g}", OURS[0] if row.ours else INK, "end", BOLD if row.ours else "")
    if not row.ran:
        yield text(seconds.x, base, "failed", 11, ALARM)
        return
    yield box(seconds.x, top, seconds.at(row.median) - seconds.x, BAR, colours[0])
    yield from seconds.gap(row.median, top)
    least, most, middle = seconds.at(row.least), seconds.at(row.most), y + ROW / 2
    if row.most > row.least and row.least < seconds.end:
        yield line(least, middle, most, middle, PAPER, 3) + line(least, middle, most, middle, INK)
        yield from (line(x, middle - 4, x, middle + 4, INK) for x in (least, most))
    spread = f"{number(row.least)}-{number(row.most)}" if row.most > row.least else ""
    yield text(max(seconds.at(row.median), most) + 6, base, number(row.median), pale=spread)
    at = 0.0
    for part, colour in zip(row.parts, colours):
        if part and cpu.at(at) < cpu.x + cpu.room:
            yield box(cpu.at(at), top, cpu.at(at + part) - cpu.at(at), BAR, colour)
            at += part
    yield from cpu.gap(row.cpu, top)
    yield text(cpu.at(row.cpu) + 6, base, number(row.cpu), pale=" / ".join(map(number, row.parts)))

def legend(y):
    yield text(BARS["seconds"][0], y, "seconds: median, least-most", more=BOLD)
    yield text(BARS["cpu"][0], y, "processor seconds: tool / server / QEMU", more=BOLD)
    x = 24
    for colours, words in ((OURS, "livebackup"), (OTHERS, "others")):
        for colour in colours:
            yield box(x, y - 9, 14, 10, colour)
            x += 14
        yield text(x + 6, y, words, 11)
        x += 90
    x = BARS["cpu"][0]
    for i, words in enumerate(PARTS.values()):
        yield box(x, y + 8, 10, 10, OURS[i])
        yield box(x + 10, y + 8, 10, 10, OTHERS[i])
        yield text(x + 25, y + 17, words, 10, PALE)
        x += 76

def svg(report):
    """The picture of what throughput.json has."""
    results, failed = report["results"], report.get("failed", {})
    groups = {name: [] for name in GROUPS}
    for what in [*results, *(w for w in failed if w not in results)]:
        if what.split(", ")[0] in groups:
            groups[what.split(", ")[0]].append(Row(what, results.get(what, []), failed.get(what, 0)))
    runs = max(map(len, results.values()), default=0)
    about = [f"{time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(report['began']))}; {runs} run{'' if runs == 1 else 's'}; {report['data_mib']} MiB of data.",
             f"Machine: {report['machine']}.", *([f"Storage: {report['storage']}."] if "storage" in report else [])]
    out, y = [text(24, 32, TITLE, 16, more=BOLD)], 52
    for words in (line for paragraph in about for line in textwrap.wrap(paragraph, 135)):
        out.append(text(24, y, words, 11, PALE))
        y += 15
    y += 12
    out += legend(y)
    y += 20
    for name, rows in groups.items():
        if not rows:
            continue
        ran = [row for row in rows if row.ran]
        seconds, cpu = (Scale(column, medians or [0], reaches or [0]) for column, medians, reaches in (
            ("seconds", [r.median for r in ran], [r.most for r in ran]), ("cpu", [r.cpu for r in ran], [r.cpu for r in ran])))
        y += GAP + 18
        out.append(text(24, y - 4, name, 13, more=BOLD, pale=GROUPS[name]))
        out += [*seconds.grid(y, y + ROW * len(rows)), *cpu.grid(y, y + ROW * len(rows))] if ran else []
        for row in rows:
            out += bars(row, y, seconds, cpu)
            y += ROW
    if not any(groups.values()):
        y += GAP + 18
        out.append(text(24, y, "Nothing of what is shown here was measured.", 12))
    height = y + 24
    head = (f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
            'font-family="system-ui, -apple-system, \'Segoe UI\', Helvetica, Arial, sans-serif">\n'
            f"<title>{safe(TITLE)}</title>\n"
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="6" fill="{PAPER}" stroke="{GRID}"/>\n')
    return head + "\n".join(out) + "\n</svg>\n"

def write(report, path):
    with open(path, "w", encoding="utf-8") as f:
        f.write(svg(report))

if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    with open(sys.argv[1]) as made:
        write(json.load(made), sys.argv[2])
