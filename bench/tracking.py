#!/usr/bin/env python3
"""What tracking costs: an instant over 16 disks, the harvest of a 1 TiB disk's bitmap, a scan beside a full. bench/README.md
says what is measured and how; bench/TRACKING.md has the last run.

  bench/tracking.py [--runs N]

LIVEBACKUP names the program, QEMU the emulator, TMPDIR where everything is put. No bar fails the run."""
import argparse, json, os, shutil, signal, socket, statistics, subprocess, sys, tempfile, threading, time
from datetime import datetime
sys.dont_write_bytecode = True
from measure import GIB, KIB, MIB, Machine, make

HERE = os.path.dirname(os.path.abspath(__file__))
TARGET = os.environ.get("CARGO_TARGET_DIR") or os.path.join(os.path.dirname(HERE), "target")
PROGRAM = os.environ.get("LIVEBACKUP") or os.path.join(TARGET, "release", "livebackup")
CHUNK = 128 * KIB

class Work:
    def __init__(self, path):
        self.path, self.state = path, ["--state", f"{path}/state", "--scratch", f"{path}/scratch"]
        os.mkdir(f"{path}/scratch")
    def run(self, *argv, **more):
        done = subprocess.run([PROGRAM, "--json", *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True, **more)
        if done.returncode:
            raise SystemExit(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        return done
    def backup(self, source, repo, *options, **more):
        done = self.run("backup", source, repo, *self.state, *options, **more)
        return json.loads(done.stdout.strip().splitlines()[-1]), done.stderr
    def fresh(self, name):
        repo = f"{self.path}/{name}"
        shutil.rmtree(repo, ignore_errors=True)
        self.run("init", repo)
        return repo

def sixteen_disks(work, runs):
    """Milliseconds that the guest was stopped for the instant of 16 disks, by run. The machine runs: its firmware looks for
    something to boot, and `qemu-io` writes to every disk before each backup."""
    disks = []
    for i in range(16):
        path = f"{work.path}/disk{i}.raw"
        with open(path, "wb") as f:
            f.truncate(GIB)
        disks.append((f"vd{i}", "raw", path))
    machine = Machine(work.path, "sixteen", disks)
    try:
        machine("cont")
        repo, stopped = work.fresh("sixteen-repo"), []
        for run in range(runs + 1):
            machine.scatter(run, {d: [(0, 64)] for d, _, _ in disks}, 8)
            result, _ = work.backup(f"qmp:{machine.monitor}", repo)
            # The first is full, and none of its filters limited.
            stopped.append(result["durations"]["stopped_s"] * 1000)
        return stopped[1:]
    finally:
        machine.end()

def harvest(work, runs):
    """Milliseconds from the merge of a 1 TiB disk's bitmap until all of it was read, by run; 1,000 granules are set."""
    path = f"{work.path}/big.raw"
    with open(path, "wb") as f:
        f.truncate(1024 * GIB)
    machine = Machine(work.path, "big", [("vd0", "raw", path)])
    try:
        repo, took = work.fresh("big-repo"), []
        work.backup(f"qmp:{machine.monitor}", repo)
        for run in range(runs):
            machine.scatter(run, {"vd0": [(i * 16 * GIB, 16) for i in range(64)]}, 62)
            _, log = work.backup(f"qmp:{machine.monitor}", repo, env={**os.environ, "LIVEBACKUP_LOG": "livebackup::monitor=trace"})
            at = lambda line: datetime.fromisoformat(line.split()[0].rstrip("Z"))
            lines = [l for l in log.splitlines() if " TRACE command " in l]
            begin = next(i for i, l in enumerate(lines) if "block-dirty-bitmap-merge" in l and '"target":"old"' in l)
            end = next(i for i, l in enumerate(lines) if i > begin and "block-export-del" in l)
            took.append((at(lines[end]) - at(lines[begin])).total_seconds() * 1000)
        return took
    finally:
        machine.end()

class Counter:
    """Passes one connection after another on to a port of this host and counts what goes by."""
    def __init__(self, port):
        self.to, self.count, self.listener = port, 0, socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()
    def serve(self):
        while True:
            client, _ = self.listener.accept()
            server = socket.create_connection(("127.0.0.1", self.to))
            for a, b in ((client, server), (server, client)):
                threading.Thread(target=self.pump, args=(a, b), daemon=True).start()
    def pump(self, a, b):
        try:
            while piece := a.recv(MIB):
                self.count += len(piece)
                b.sendall(piece)
            b.shutdown(socket.SHUT_WR)
        except OSError:
            pass

def scan(work, runs):
    """By run: seconds of a full, seconds of a scan of the same disk, bytes that the scan sent over TCP, bytes of its
    changed chunks."""
    path, rows = f"{work.path}/scanned.raw", []
    extents = {"vd0": make(path, 4 * GIB, 2048, 3, lambda data: None)}
    for run in range(runs):
        machine = Machine(work.path, f"scan{run}", [("vd0", "raw", path)])
        vm = ["--vm", "scanned"]
        full, _ = work.backup(f"qmp:{machine.monitor}", work.fresh("full-repo"), *vm)
        repo = work.fresh("scan-repo")
        work.backup(f"qmp:{machine.monitor}", repo, *vm)
        tcp = work.fresh("tcp-repo")
        shutil.rmtree(tcp)
        shutil.copytree(repo, tcp)
        machine.scatter(100 + run, extents, 100)
        machine.end()
        # Another QEMU, and nobody took the last bitmap: the epoch is over.
        machine = Machine(work.path, f"scan{run}", [("vd0", "raw", path)])
        result, _ = work.backup(f"qmp:{machine.monitor}", repo, *vm)
        assert result["disks"][0]["taken"] == "scan", result
        changed = result["disks"][0]["new_bytes"]
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        with open(f"{work.path}/serve.toml", "w") as f:
            f.write(f'listen = "127.0.0.1:{port}"\nstate = "{work.path}/state-tcp"\n\n[[vm]]\nname = "scanned"\nmonitor = "qmp:{machine.monitor}"\n')
        log = open(f"{work.path}/serve.log", "a")
        server = subprocess.Popen([PROGRAM, "serve", "--config", f"{work.path}/serve.toml"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            for _ in range(400):
                try:
                    socket.create_connection(("127.0.0.1", port)).close()
                    break
                except OSError:
                    time.sleep(0.05)
            counter = Counter(port)
            over, _ = work.backup(f"livebackup://127.0.0.1:{counter.port}/scanned", tcp)
            assert over["disks"][0]["taken"] == "scan", over
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait()
            machine.end()
        rows.append((full["durations"]["total_s"], result["durations"]["total_s"], counter.count, changed))
    return rows

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=int(os.environ.get("RUNS", "3")))
    args = parser.parse_args()
    if not os.access(PROGRAM, os.X_OK):
        sys.exit(f"{PROGRAM} is missing: cargo build --release makes it")
    path, load = tempfile.mkdtemp(prefix="livebackup-bench-"), os.getloadavg()
    try:
        work = Work(path)
        stopped, harvested, scans = sixteen_disks(work, args.runs), harvest(work, args.runs), scan(work, args.runs)
    finally:
        shutil.rmtree(path)
    spread = lambda values, form: f"{form.format(statistics.median(values))} ({form.format(min(values))} to {form.format(max(values))})"
    rate, traffic = [full / scan for full, scan, _, _ in scans], [sent / changed for _, _, sent, changed in scans]
    changed = statistics.median([c for _, _, _, c in scans]) / MIB
    bars = [
        ("instant of 16 disks: guest stopped, ms", stopped, 50, True, "{:.1f}"),
        ("harvest of a 1 TiB disk's bitmap, 1,000 granules set, ms", harvested, 300, True, "{:.1f}"),
        ("scan: reading speed beside a full's", rate, 0.7, False, "{:.2f}"),
        (f"scan over TCP: bytes on the wire beside the {changed:.0f} MiB of changed chunks", traffic, 1.02, True, "{:.3f}"),
    ]
    lines = [f"Date: {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; {args.runs} runs, medians (least to most). Load average before: {load[0]:.2f}, after: {os.getloadavg()[0]:.2f}.", ""]
    for words, values, limit, at_most, form in bars:
        value = statistics.median(values)
        met = value <= limit if at_most else value >= limit
        lines.append(f"{'met    ' if met else 'NOT MET'}  {words}: {spread(values, form)} ({'at most' if at_most else 'at least'} {limit})")
    text = "\n".join(lines)
    print(text)
    with open(f"{HERE}/TRACKING.md", "w") as f:
        f.write("# What the last run of bench/tracking.py measured\n\nWhat the lines mean: [README.md](README.md).\n\n```\n" + text + "\n```\n")

main()
