#!/usr/bin/env python3
"""Backup and restore speed of livebackup beside QEMU's own means and what works by libvirt. bench/README.md says what is
measured and how.

  bench/throughput.py [--runs N] [--only WORD]... [--out DIR] [--keep]

LIVEBACKUP names the program, QEMU the emulator, LIVEBACKUP_BENCH_MIB the data (default 3072; the bars are meant for that),
TMPDIR where everything is put. No bar fails the run."""
import argparse, json, mmap, os, platform, shutil, signal, socket, statistics, subprocess, sys, tempfile, time
sys.dont_write_bytecode = True  # nothing is left beside the sources
import domain, picture
from measure import MIB, GIB, KIB, QEMU, Busy, Machine, Squeezed, evict, flush, make, peak_mib, processor_seconds, stored_mib

HERE = os.path.dirname(os.path.abspath(__file__))
DATA = int(os.environ.get("LIVEBACKUP_BENCH_MIB", "3072"))
SCATTERED = max(1, DATA * 100 // 3072)
TARGET = os.environ.get("CARGO_TARGET_DIR") or os.path.join(os.path.dirname(HERE), "target")
PROGRAM = os.environ.get("LIVEBACKUP") or os.path.join(TARGET, "release", "livebackup")

# What QEMU's own jobs took where the bars in seconds were set: the same bars as ratios, for machines of another speed.
JOB_CPU_PER_GIB, DIRTY_JOB_SECONDS, DIRTY_JOB_CPU = 1.15, 0.26, 0.23

# ---- the measurements ------------------------------------------------------------------------------------------------
class Bench:
    def __init__(self, work, only):
        self.work, self.only, self.results, self.failed, self.notes = work, only, {}, {}, []
        self.state, self.server = ["--state", f"{work}/state", "--scratch", f"{work}/scratch"], None
        os.makedirs(f"{work}/scratch")
    def quiet(self, *argv):
        done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}")
        return done.stdout
    def wants(self, what):
        return not self.only or any(w in what for w in self.only)
    def record(self, what, payload, run):
        """Calls `run`, which returns what it cost and the paths that it wrote. A failure is a line, not the end."""
        if not self.wants(what):
            return None
        os.sync()
        others = Busy()
        try:
            cost, paths = run()
        except RuntimeError as e:
            print(f"  {what}: FAILED: {e}", flush=True)
            self.failed[what] = self.failed.get(what, 0) + 1
            self.notes.append(f"{what}: failed: {str(e).strip().splitlines()[-1]}")
            return None
        cost["others"] = others.others(cost["cpu"] + cost.get("qemu", 0) + cost.get("server", 0))
        cost["flush"] = cost.get("flush", 0) + (0 if "livebackup" in what or "parent" in what else flush(paths))
        cost.update(stored=stored_mib(paths), payload=payload, seconds=cost["wall"] + cost["flush"])
        self.results.setdefault(what, []).append(cost)
        print(f"  {what}: {cost['wall']:.2f} s + flush {cost['flush']:.2f} s, tool {cost['cpu']:.2f} CPU-s", flush=True)
        return cost
    def command(self, *commands, machine=None, server=None):
        """Costs of one or more commands in turn, with QEMU's and the server's beside them: livebackup's if it runs, or `server`."""
        server = self.server or server
        total = {"wall": 0.0, "flush": 0.0, "cpu": 0.0, "rss": 0.0, "qemu": 0.0}
        watched = {k: p.pid for k, p in (("qemu", machine), ("server", server)) if p}
        before = {k: processor_seconds(p) for k, p in watched.items()}
        if server:
            open(f"/proc/{server.pid}/clear_refs", "w").write("5")
        for argv in commands:
            self.quiet(sys.executable, os.path.join(HERE, "measure.py"), f"{self.work}/cost", *argv)
            cost = json.load(open(f"{self.work}/cost"))
            total = {k: max(total[k], v) if k == "rss" else total[k] + v for k, v in {**cost, "qemu": 0}.items()}
        total.update({k: processor_seconds(p) - before[k] for k, p in watched.items()})
        if server:
            total["server_rss"] = peak_mib(server.pid)
        return total
    def serve(self, machines):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        with open(f"{self.work}/serve.toml", "w") as f:
            f.write(f'listen = "127.0.0.1:{self.port}"\nstate = "{self.work}/state"\n')
            f.writelines(f'\n[[vm]]\nname = "{m.name}"\nmonitor = "qmp:{m.monitor}"\n' for m in machines)
        log = open(f"{self.work}/serve.log", "a")
        self.server = subprocess.Popen([PROGRAM, "serve", "--config", f"{self.work}/serve.toml"], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(400):
            try:
                socket.create_connection(("127.0.0.1", self.port)).close()
                return
            except OSError:
                time.sleep(0.05)
    def end_serve(self):
        if self.server:
            self.server.terminate()
            self.server.wait()
        self.server = None
    def backup(self, machine, repo, *options, tcp=False):
        source = [f"livebackup://127.0.0.1:{self.port}/{machine.name}", repo] if tcp else [f"qmp:{machine.monitor}", repo, *self.state]
        before = stored_mib([repo])
        cost = self.command([PROGRAM, "--json", "backup", *source, *options], machine=machine)
        return {**cost, "before": before}, [repo]

def livebackup_full(b, machine, what, payload, options, tcp, keep=None):
    repo = keep or f"{b.work}/repo"
    shutil.rmtree(repo, ignore_errors=True)
    b.quiet(PROGRAM, "init", repo)
    if tcp:
        b.serve([machine])
    b.record(what, payload, lambda: b.backup(machine, repo, "--level", "full", *options, tcp=tcp))
    b.end_serve()
    if not keep:
        shutil.rmtree(repo)

def unlink(files):
    for path in filter(os.path.exists, files):
        os.unlink(path)

def qemu_job(b, machine, what, payload, form, sync, options=(), **more):
    """QEMU's own backup job of all disks onto fresh images."""
    files = [f"{b.work}/job-{d}.{form}" for d, _, _ in machine.disks]
    for path, (_, _, image) in zip(files, machine.disks):
        size = json.loads(b.quiet("qemu-img", "info", "-U", "--output=json", image))["virtual-size"]
        b.quiet("qemu-img", "create", "-q", "-f", form, *options, path, str(size))
    b.record(what, payload, lambda: (machine.job(sync, [(form, f) for f in files], **more), files))
    unlink(files)

def copy_exports(b, machine, what, payload, argv):
    path, files = f"{b.work}/nbd", [f"{b.work}/copy-{d}" for d, _, _ in machine.disks]
    machine.nbd(path)
    exports = [f"nbd+unix:///{d}?socket={path}" for d, _, _ in machine.disks]
    b.record(what, payload, lambda: (b.command(*[[*argv, e, f] for e, f in zip(exports, files)], machine=machine), files))
    machine.nbd(None)
    unlink(files)

def map_disks(b, what, payload, commands, uris):
    """All of what these servers export, read by nbdcopy, one disk after the other, and thrown away."""
    if not b.wants(what):
        return
    servers = [subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for argv in commands]
    try:
        for uri in uris:
            for _ in range(400):
                if subprocess.run(["nbdinfo", "--size", uri], capture_output=True).returncode == 0:
                    break
                time.sleep(0.05)
        before = sum(processor_seconds(p.pid) for p in servers)
        def run():
            cost = b.command(*[["nbdcopy", uri, "null:"] for uri in uris])
            return {**cost, "server": sum(processor_seconds(p.pid) for p in servers) - before, "server_rss": max(peak_mib(p.pid) for p in servers)}, []
        b.record(what, payload, run)
    finally:
        for p in servers:
            p.terminate()
            p.wait()

def deduplicators(b, machine, payload):
    """restic and borg, fed with the disks by nbdcopy: all of them, and again with nothing changed. livebackup's scan of the
    unchanged disks beside them: it has the repository's last point and no bitmap. A few minutes, so once only."""
    path, repo = f"{b.work}/nbd", f"{b.work}/dedup"
    os.environ.update(RESTIC_PASSWORD="bench", XDG_CACHE_HOME=f"{b.work}/cache", BORG_BASE_DIR=f"{b.work}/borg", BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK="yes")
    tools = {
        "restic": (["restic", "init", "-q", "-r", repo], "restic -q -r {repo} backup --stdin --stdin-filename {disk}"),
        "borg": (["borg", "init", "-e", "none", repo], "borg create --compression zstd,1 {repo}::{disk}-{which} -"),
    }
    for tool, (init, command) in tools.items():
        if not shutil.which(tool):
            b.notes.append(f"{tool} was not run: it is not installed")
            continue
        b.quiet(*init)
        machine.nbd(path)
        for which in ("full", "unchanged"):
            pipes = [["bash", "-o", "pipefail", "-c", f"nbdcopy 'nbd+unix:///{d}?socket={path}' - | " + command.format(repo=repo, disk=d, which=which)] for d, _, _ in machine.disks]
            b.record(f"{which}, {tool}", payload, lambda: (b.command(*pipes, machine=machine), [repo]))
        machine.nbd(None)
        shutil.rmtree(repo, ignore_errors=True)
    b.quiet(PROGRAM, "init", repo)
    b.quiet(PROGRAM, "--json", "backup", f"qmp:{machine.monitor}", repo, *b.state)
    mine, b.state = b.state, ["--state", f"{b.work}/state-of-another", "--scratch", f"{b.work}/scratch"]
    b.quiet(PROGRAM, "detach", f"qmp:{machine.monitor}", *mine)
    b.record("unchanged, livebackup by scan", payload, lambda: b.backup(machine, repo))
    b.quiet(PROGRAM, "detach", f"qmp:{machine.monitor}", *b.state)
    b.state = mine
    shutil.rmtree(repo)

# ---- of a libvirt domain ---------------------------------------------------------------------------------------------
LIBVIRT = "libvirt qcow2"  # in the names of its rows: what is backed up, and that no disk is raw
FULLS = {way: f"full, {LIBVIRT}: {way}" for way in ("virtnbdbackup", "virtnbdbackup, lz4", "virsh backup-begin push", "virsh backup-begin pull, nbdcopy", "livebackup")}
INCREMENTALS = {way: f"incremental, {LIBVIRT}: {way}" for way in ("virtnbdbackup", "virsh backup-begin push", "livebackup")}
VIRTNBDRESTORE = f"restore, {LIBVIRT}: virtnbdbackup"
CHAIN = "virtnbdbackup.0"  # what virtnbdbackup calls the checkpoint of its full

def same(b, what, form, files, images):
    """A way whose copies differ from the disks has measured nothing."""
    for path, image in zip(files, images):
        b.quiet("qemu-img", "compare", "-U", "-f", form, "-F", "qcow2", path, image)
    print(f"  {what}: equals the disks", flush=True)

def virtnbdbackup(b, dom, level, into, *options):
    """What a backup by virtnbdbackup costs, and where it is."""
    before = stored_mib([into])
    command = dom.virtnbd("virtnbdbackup", "-S", f"{b.work}/scratch", "-d", dom.name, "-l", level, "-o", into, *options)
    return {**b.command(command, machine=dom, server=dom.daemon), "before": before}, [into]

def virtnbdbackup_full(b, dom, recorded=True):
    """The full that this run's restore and incremental are of; earlier checkpoints end."""
    into = f"{b.work}/virtnbdbackup"
    shutil.rmtree(into, ignore_errors=True)
    run = lambda: virtnbdbackup(b, dom, "full", into)
    b.record(FULLS["virtnbdbackup"], DATA, run) if recorded else run()

def virtnbdbackup_lz4(b, dom):
    into = f"{b.work}/virtnbdbackup-lz4"
    b.record(FULLS["virtnbdbackup, lz4"], DATA, lambda: virtnbdbackup(b, dom, "copy", into, "-z"))
    shutil.rmtree(into, ignore_errors=True)

def push(b, dom, what, payload, images=None, below=(), **options):
    """`below` are the images that an incremental is of; with them, it has to equal `images`."""
    files = [f"{b.work}/push-{d}.qcow2" for d, _, _ in dom.disks]
    if b.record(what, payload, lambda: (dom.push(files, **options), files)) and images:
        for path, image in zip(files, below):
            b.quiet("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", image, path)
        same(b, what, "qcow2", files, images)
    unlink(files)

def pull(b, dom, references):
    exports, files = f"{b.work}/pull.nbd", [f"{b.work}/pull-{d}.raw" for d, _, _ in dom.disks]
    virsh = ["virsh", "-q", "-c", dom.uri]
    copies = [["nbdcopy", f"nbd+unix:///{t}?socket={exports}", f] for t, f in zip(dom.targets(), files)]
    def run():
        cost = b.command([*virsh, "backup-begin", dom.name, dom.pull(exports)], *copies, [*virsh, "domjobabort", dom.name], machine=dom, server=dom.daemon)
        dom.completed()
        return cost, files
    what = FULLS["virsh backup-begin pull, nbdcopy"]
    if b.record(what, DATA, run) and references:
        same(b, what, "raw", files, references)
    unlink(files)

def virtnbdrestore(b, dom, references):
    made, into = f"{b.work}/virtnbdbackup", f"{b.work}/virtnbdrestored"
    if not b.wants(VIRTNBDRESTORE):
        return
    if not os.path.exists(made):
        virtnbdbackup_full(b, dom, recorded=False)
    evict(made)
    if b.record(VIRTNBDRESTORE, DATA, lambda: (b.command(*dom.virtnbdrestore(made, into), machine=dom, server=dom.daemon), [into])) and references:
        same(b, VIRTNBDRESTORE, "qcow2", dom.files_in(into), references)
    shutil.rmtree(into, ignore_errors=True)

def domain_incrementals(b, run, dom, extents, references):
    """virtnbdbackup's, `backup-begin`'s and livebackup's of the same writes. All have a full of before them; the
    checkpoint of virtnbdbackup's serves two, since it refuses a domain that has any of others."""
    into, repo, restored = f"{b.work}/virtnbdbackup", f"{b.work}/{dom.name}-here", f"{b.work}/virtnbdrestored"
    images = [image for _, _, image in dom.disks] if references else None
    if not os.path.exists(into):
        virtnbdbackup_full(b, dom, recorded=False)
    if run == 0:
        b.quiet(PROGRAM, "init", repo)
        b.backup(dom, repo)
    dom.scatter(run * 10 + len(extents), extents, SCATTERED)
    def by_virtnbdbackup():
        what = INCREMENTALS["virtnbdbackup"]
        if b.record(what, SCATTERED, lambda: virtnbdbackup(b, dom, "inc", into)) and images:
            b.command(*dom.virtnbdrestore(into, restored))
            same(b, what, "qcow2", dom.files_in(restored), images)
            shutil.rmtree(restored)
    def by_push():
        push(b, dom, INCREMENTALS["virsh backup-begin push"], SCATTERED, images, references or (), base=CHAIN, checkpoint="pushed")
        if "pushed" in dom.virsh("checkpoint-list", dom.name, "--name").split():
            dom.virsh("checkpoint-delete", dom.name, "pushed")
    ways = [by_virtnbdbackup, by_push, lambda: b.record(INCREMENTALS["livebackup"], SCATTERED, lambda: b.backup(dom, repo))]
    for i in range(len(ways)):
        ways[(i + run) % len(ways)]()

# ---- all in turn -----------------------------------------------------------------------------------------------------
def one_run(b, run, small, big, dom, extents):
    w, payload = b.work, DATA
    references = [f"{w}/reference-{d}.qcow2" for d, _, _ in small.disks]
    before = references if run == 0 else None  # what the disks are until the first writes
    full = f"{w}/full"  # kept: the source of restore and verify
    ways = [
        lambda: livebackup_full(b, small, "full, livebackup, none", payload, ["--compression", "none"], False),
        lambda: qemu_job(b, small, "full, QEMU job to raw", payload, "raw", "full"),
        lambda: livebackup_full(b, small, "full, livebackup, default", payload, [], False, full if run == 0 else None),
        lambda: livebackup_full(b, small, "full, livebackup over TCP, none", payload, ["--compression", "none"], True),
        lambda: livebackup_full(b, small, "full, livebackup over TCP, default", payload, [], True),
        lambda: qemu_job(b, small, "full, QEMU job to qcow2 zstd", payload, "qcow2", "full", ("-o", "compression_type=zstd"), compress=True),
        lambda: copy_exports(b, small, "full, nbdcopy to raw", payload, ["nbdcopy"]),
        lambda: copy_exports(b, small, "full, qemu-img convert to raw", payload, ["qemu-img", "convert", "-W", "-f", "raw", "-O", "raw"]),
    ]
    if dom:
        ways += [
            lambda: virtnbdbackup_full(b, dom),
            lambda: livebackup_full(b, dom, FULLS["livebackup"], payload, [], False),
            lambda: push(b, dom, FULLS["virsh backup-begin push"], payload, before),
            lambda: pull(b, dom, before),
            lambda: virtnbdbackup_lz4(b, dom),
        ]
    for i in range(len(ways)):
        ways[(i + 3 * run) % len(ways)]()

    if run == 0:
        deduplicators(b, small, payload)

    # Restore and verify: of a full that is as the disks were before any of the writes below.
    def restore():
        shutil.rmtree(f"{w}/restored", ignore_errors=True)
        evict(full)
        b.record("restore, livebackup", payload, lambda: (b.command([PROGRAM, "restore", full, "bench@latest", f"{w}/restored", "--format", "raw"]), [f"{w}/restored"]))
        if run == 0 and os.path.isdir(f"{w}/restored"):
            for (device, _, _), reference in zip(small.disks, references):
                b.quiet("qemu-img", "compare", "-f", "raw", "-F", "qcow2", f"{w}/restored/{device}.raw", reference)
            print("  what was restored equals the disks", flush=True)
        shutil.rmtree(f"{w}/restored", ignore_errors=True)
    def convert():
        files = [f"{w}/converted-{d}.raw" for d, _, _ in small.disks]
        evict(*references)
        b.record("restore, qemu-img convert", payload, lambda: (b.command(*[["qemu-img", "convert", "-W", "-O", "raw", r, f] for r, f in zip(references, files)]), files))
        unlink(files)
    restores = [restore, convert, *([lambda: virtnbdrestore(b, dom, before)] if dom else [])]
    for way in restores if run % 2 == 0 else restores[::-1]:
        way()
    evict(full)
    b.record("verify", payload, lambda: (b.command([PROGRAM, "verify", full]), []))
    def map_ours():
        evict(full)
        if os.path.isdir(full):
            map_disks(b, "map, livebackup, nbdcopy", payload, [[PROGRAM, "map", full, "bench@latest", "--socket", f"{w}/map"]], [f"nbd+unix:///{d}?socket={w}/map" for d, _, _ in small.disks])
    def map_images():
        evict(*references)
        sockets = [f"{w}/map-{d}" for d, _, _ in small.disks]
        servers = [["qemu-nbd", "-r", "-t", "-e", "16", "-f", "qcow2", "-k", socket, r] for socket, r in zip(sockets, references)]
        map_disks(b, "map, qemu-nbd of qcow2, nbdcopy", payload, servers, [f"nbd+unix:///?socket={socket}" for socket in sockets])
    for way in [map_ours, map_images][::1 if run % 2 == 0 else -1]:
        way()

    # Incrementals: everything sees the same writes. The repositories get their parents in the first run.
    repos = {(m.name, tcp): f"{w}/{m.name}-{'tcp' if tcp else 'here'}" for m in (small, big) for tcp in (False, True)}
    for (name, tcp), repo in repos.items():
        if run == 0:
            machine = big if name == big.name else small
            b.quiet(PROGRAM, "init", repo)
            if tcp:
                b.serve([machine])
            b.record(f"parent of incrementals, {name}, {'TCP' if tcp else 'here'}", DATA if machine is small else DATA * 2 // 3, lambda: b.backup(machine, repo, tcp=tcp))
            b.end_serve()
    for machine in (small, big):
        for device, _, _ in machine.disks:
            machine("block-dirty-bitmap-add", node=f"n{device}", name="bench", granularity=64 * KIB)
        mine = extents[machine.name]
        machine.scatter(run * 10 + len(mine), mine, SCATTERED)
        where = "1 TiB" if machine is big else "4 + 2 GiB"
        ways = []
        if machine is small:
            ways.append(lambda: qemu_job(b, small, "incremental, QEMU job to qcow2", SCATTERED, "qcow2", "bitmap", bitmap="bench", bitmap_mode="never"))
        for tcp in (False, True):
            def way(tcp=tcp, machine=machine):
                if tcp:
                    b.serve([machine])
                b.record(f"incremental, livebackup{' over TCP' if tcp else ''}, {where}", SCATTERED, lambda: b.backup(machine, repos[machine.name, tcp], tcp=tcp))
                b.end_serve()
            ways.append(way)
        for i in range(len(ways)):
            ways[(i + run) % len(ways)]()
        for device, _, _ in machine.disks:
            machine("block-dirty-bitmap-remove", node=f"n{device}", name="bench")
    if dom and any(map(b.wants, INCREMENTALS.values())):
        domain_incrementals(b, run, dom, extents[dom.name], before)

# ---- the report ------------------------------------------------------------------------------------------------------
def median(results, what, key):
    values = [c[key] for c in results.get(what, []) if key in c]
    return statistics.median(values) if values else None

def total_cpu(cost):
    return cost["cpu"] + cost.get("qemu", 0) + cost.get("server", 0)

def table(results):
    head = ("what", "seconds (min-max)", "of it flush", "MiB/s", "tool", "server", "QEMU", "CPU-s/GiB", "RSS", "server RSS", "stored")
    rows = [head]
    shown = lambda x, form="{:.2f}": "-" if x is None else form.format(x)
    for what, costs in results.items():
        m = lambda key: median(results, what, key)
        seconds = [c["seconds"] for c in costs]
        cpu = statistics.median(map(total_cpu, costs)) / (costs[0]["payload"] / 1024)
        stored = statistics.median(c["stored"] - c.get("before", 0) for c in costs) if m("stored") else None
        rows.append((what, f"{m('seconds'):.2f} ({min(seconds):.2f}-{max(seconds):.2f})", shown(m("flush")),
                     shown(costs[0]["payload"] / m("seconds"), "{:.0f}"), shown(m("cpu")), shown(m("server")), shown(m("qemu")),
                     shown(cpu), shown(m("rss") or None, "{:.0f}"), shown(m("server_rss"), "{:.0f}"), shown(stored, "{:.0f}")))
    widths = [max(len(r[i]) for r in rows) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths))).rstrip() for r in rows)

def bars(results, zstd_mib):
    """Every bar as (met, words); None where something was not measured."""
    out = []
    def bar(words, value, limit, at_most=True, form="{:.2f}"):
        met = None if value is None or limit is None else (value <= limit if at_most else value >= limit)
        words_of = "no bar" if limit is None else f"{'at most' if at_most else 'at least'} {form.format(limit)}"
        shown = "not measured" if value is None else f"{form.format(value)} ({words_of})"
        out.append((met, f"{words}: {shown}"))
    seconds = lambda what: median(results, what, "seconds")
    def per_gib(what):
        costs = results.get(what)
        return statistics.median(map(total_cpu, costs)) / (costs[0]["payload"] / 1024) if costs else None
    ratio = lambda above, below: above / below if above and below else None
    job = "full, QEMU job to raw"
    for over in ("", " over TCP"):
        # The bars for processor time are for one process; a network's is beside it.
        here = lambda limit: None if over else limit
        none, default = f"full, livebackup{over}, none", f"full, livebackup{over}, default"
        bar(f"full, none{over}: CPU-s/GiB, QEMU's included", per_gib(none), here(1.3))
        bar(f"full, none{over}: CPU-s beside QEMU's job", ratio(per_gib(none), per_gib(job)), here(1.3 / JOB_CPU_PER_GIB))
        bar(f"full, none{over}: rate beside QEMU's job", ratio(seconds(job), seconds(none)), 0.8, False)
        bar(f"full, default{over}: CPU-s/GiB, QEMU's included", per_gib(default), here(3.5))
        bar(f"full, default{over}: MiB/s", ratio(DATA, seconds(default)), 300, False, "{:.0f}")
        bar(f"full, default{over}: stored beside zstd -1", ratio(median(results, default, "stored"), zstd_mib), 1.05, form="{:.3f}")
        one, tera = f"incremental, livebackup{over}, 4 + 2 GiB", f"incremental, livebackup{over}, 1 TiB"
        bar(f"incremental{over}: seconds", seconds(one), 0.6)
        bar(f"incremental{over}: CPU-s, QEMU's included", statistics.median(map(total_cpu, results[one])) if one in results else None, here(0.5))
        dirty = "incremental, QEMU job to qcow2"
        cpu = lambda what: statistics.median(map(total_cpu, results[what])) if what in results else None
        bar(f"incremental{over}: seconds beside QEMU's job", ratio(seconds(one), seconds(dirty)), here(0.6 / DIRTY_JOB_SECONDS))
        bar(f"incremental{over}: CPU-s beside QEMU's job", ratio(cpu(one), cpu(dirty)), here(0.5 / DIRTY_JOB_CPU))
        bar(f"incremental{over}: seconds more at 1 TiB", seconds(tera) - seconds(one) if seconds(tera) and seconds(one) else None, 1.0)
        other = INCREMENTALS["virtnbdbackup"]
        bar(f"incremental{over}: seconds beside virtnbdbackup's", ratio(seconds(one), seconds(other)), 1.0)
        bar(f"incremental{over}: CPU-s beside virtnbdbackup's", ratio(cpu(one), cpu(other)), None)
    restore, convert = seconds("restore, livebackup"), seconds("restore, qemu-img convert")
    bar("restore: MiB/s", ratio(DATA, restore), 400, False, "{:.0f}")
    bar("restore: rate beside qemu-img convert", ratio(convert, restore), 1.0, False)
    bar("restore: rate beside virtnbdbackup's", ratio(seconds(VIRTNBDRESTORE), restore), 6.0, False)
    scanned, again = results.get("unchanged, livebackup by scan"), results.get("unchanged, restic")
    bar("unchanged disks, by scan: CPU-s beside restic's", ratio(total_cpu(scanned[0]), total_cpu(again[0])) if scanned and again else None, 0.1, form="{:.3f}")
    for key, who in (("rss", "client or tool"), ("server_rss", "server")):
        peaks = [(c.get(key) or 0, what) for what, costs in results.items() for c in costs if "livebackup" in what or what == "verify"]
        peak = max(peaks, default=(None, ""))
        bar(f"peak RSS of any {who}, MiB ({peak[1]})", peak[0] or None, 200, form="{:.0f}")
    return out

def disk_text(work):
    """What the storage below the work directory does, past the page cache: what bars in seconds depend on."""
    path, block, n = f"{work}/probe", mmap.mmap(-1, MIB), 512
    block.write(os.urandom(MIB))
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    except OSError as e:
        return f"not measured (no writes past the page cache: {e.strerror})"
    rates = []
    for call in (os.writev, os.readv):
        os.lseek(fd, 0, os.SEEK_SET)
        start = time.monotonic()
        for _ in range(n):
            call(fd, [block])
        if call is os.writev:
            os.fsync(fd)
        rates.append(n / (time.monotonic() - start))
    os.close(fd)
    os.unlink(path)
    return f"{rates[0]:.0f} MiB/s written and flushed, {rates[1]:.0f} MiB/s read (1 MiB at a time, past the page cache)"

def machine_text():
    flags = next((l.split(":")[1].split() for l in open("/proc/cpuinfo") if l.startswith("flags")), [])
    vectors = "with AVX-512" if "avx512f" in flags else "with AVX2" if "avx2" in flags else "without AVX2"
    cpu = next((l.split(":")[1].strip() for l in open("/proc/cpuinfo") if l.startswith("model name")), platform.machine())
    memory = next(int(l.split()[1]) // MIB for l in open("/proc/meminfo") if l.startswith("MemTotal"))
    version = subprocess.run([QEMU, "--version"], capture_output=True, text=True).stdout.splitlines()[0]
    return f"{os.cpu_count()} cores ({cpu}, {vectors}), {memory} GiB memory, Linux {platform.release()}, {version}"

def torture():
    """The longest run of the torture test, as its own file says."""
    with open(f"{HERE}/TORTURE.md") as f:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in f if line.startswith("| 20")]
    runs = "; ".join(f"{rounds} rounds on QEMU {qemu} ({when} UTC), {points} restore points, {wrong} wrong" for when, qemu, rounds, points, wrong, *_ in rows)
    return f"The longest runs of the torture test so far ([TORTURE.md](TORTURE.md)): {runs}.\n"

def changes():
    """What made livebackup faster or cheaper before this run, as a file that is kept by hand says."""
    with open(f"{HERE}/CHANGES.md") as f:
        return f.read().replace("# ", "## ", 1)

def write_report(bench, args, zstd_mib, load, began):
    results = bench.results
    lines = [f"Date: {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(began))}; {args.runs} runs in turn, medians; {DATA} MiB of data, {SCATTERED} MiB scattered.",
             f"Machine: {machine_text()}.", f"Load average before: {load[0]:.2f}, after: {os.getloadavg()[0]:.2f}; "
             f"other programs took {statistics.median([c['others'] for cs in results.values() for c in cs] or [0]):.2f} of {os.cpu_count()} cores (median).",
             f"Storage: {bench.storage}.",
             f"zstd -1 of all data in one stream: {'not measured (no zstd program)' if zstd_mib is None else f'{zstd_mib:.0f} MiB'}."]
    met = bars(results, zstd_mib)
    words = {True: "met    ", False: "NOT MET", None: "-      "}
    body = "\n".join(lines) + "\n\n" + table(results) + "\n\n" + "\n".join(f"{words[m]}  {w}" for m, w in met)
    body += "\n" + "".join(f"\n{n}" for n in bench.notes) + "\n"
    print("\n" + body)
    os.makedirs(args.out, exist_ok=True)
    report = {"machine": machine_text(), "storage": bench.storage, "began": began, "data_mib": DATA, "zstd_mib": zstd_mib, "load": load, "results": results,
              "failed": bench.failed, "bars": [{"met": m, "bar": w} for m, w in met], "notes": bench.notes}
    with open(f"{args.out}/throughput.json", "w") as f:
        json.dump(report, f, indent=1)
    if not args.only:
        with open(f"{HERE}/RESULTS.md", "w") as f:
            f.write(f"# What the last `make bench-throughput` measured\n\n![{picture.TITLE}](RESULTS.svg)\n\nMeans of the columns and the bars: [README.md](README.md).\n\n"
                    f"```\n{body}```\n\n{torture()}\n{changes()}")
        picture.write(report, f"{HERE}/RESULTS.svg")
    picture.write(report, f"{args.out}/throughput.svg")

def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=int(os.environ.get("RUNS", "3")))
    parser.add_argument("--only", action="append", help="only what has this in its name (RESULTS.md and its picture stay as they are)")
    parser.add_argument("--out", default=f"{TARGET}/bench", help="where throughput.json and throughput.svg go")
    parser.add_argument("--keep", action="store_true", help="keep the working directory")
    args = parser.parse_args()
    if not os.access(PROGRAM, os.X_OK):
        sys.exit(f"{PROGRAM} is missing: cargo build --release makes it")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # a domain's QEMU is nobody's child, and would stay
    began, load, machines, dom = time.time(), os.getloadavg(), [], None
    work = tempfile.mkdtemp(prefix="livebackup-bench-")
    bench = Bench(work, args.only)
    try:
        of_libvirt = any(map(bench.wants, [*FULLS.values(), VIRTNBDRESTORE, *INCREMENTALS.values()]))
        if of_libvirt and domain.missing():
            sys.exit(f"these Debian packages are missing: {', '.join(domain.missing())}; tests/setup.sh --bench installs them")
        if shutil.disk_usage(work).free < DATA * 12 * MIB:
            sys.exit(f"{work} needs {DATA * 12 // 1024} GiB of room; TMPDIR names another place")
        bench.storage = disk_text(work)
        print(f"making {DATA} MiB of data twice in {work}", flush=True)
        squeeze, sizes = Squeezed(), (DATA * 2 // 3, DATA - DATA * 2 // 3)
        extents = {"bench": {f"vd{i}": make(f"{work}/vd{i}.raw", 2 * n * MIB, n, i, squeeze) for i, n in enumerate(sizes)}}
        squeeze.end()
        extents["big"] = {"vd0": make(f"{work}/big.raw", 1024 * GIB, sizes[0], 7, lambda data: None)}
        for i in range(2):
            bench.quiet("qemu-img", "convert", "-f", "raw", "-O", "qcow2", f"{work}/vd{i}.raw", f"{work}/reference-vd{i}.qcow2")
        shutil.copyfile(f"{work}/reference-vd0.qcow2", f"{work}/vd0.qcow2")
        os.unlink(f"{work}/vd0.raw")
        for name, disks in (("bench", [("vd0", "qcow2", f"{work}/vd0.qcow2"), ("vd1", "raw", f"{work}/vd1.raw")]), ("big", [("vd0", "raw", f"{work}/big.raw")])):
            machines.append(Machine(work, name, disks))
        if of_libvirt:
            disks = [(f"virtio-disk{i}", "qcow2", shutil.copyfile(f"{work}/reference-vd{i}.qcow2", f"{work}/libvirt-vd{i}.qcow2")) for i in range(2)]
            extents["libvirt"] = {device: extents["bench"][f"vd{i}"] for i, (device, _, _) in enumerate(disks)}
            dom = domain.Domain(work, "libvirt", disks)
            bench.notes.append(f"The rows of a libvirt domain: {dom.versions()}.")
        for run in range(args.runs):
            print(f"run {run + 1} of {args.runs}, {time.time() - began:.0f} s", flush=True)
            one_run(bench, run, *machines, dom, extents)
        write_report(bench, args, squeeze.mib, load, began)
    finally:
        bench.end_serve()
        for machine in filter(None, [*machines, dom]):
            machine.end()
        print(f"kept: {work}" if args.keep else f"{time.time() - began:.0f} s in all", flush=True)
        if not args.keep:
            shutil.rmtree(work)

if __name__ == "__main__":
    main()
