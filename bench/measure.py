"""What throughput.py is made of: a command measured, a QEMU without a guest, deterministic data. `measure.py REPORT COMMAND…`
runs a command and writes what it cost, with all its descendants, to the file REPORT."""
import ctypes, json, os, random, shutil, socket, subprocess, sys, threading, time

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
HZ = os.sysconf("SC_CLK_TCK")
QEMU = os.environ.get("QEMU", "qemu-system-x86_64")

# ---- one measured command --------------------------------------------------------------------------------------------
def reaper(report, argv):
    """Runs `argv` as the reaper of all its descendants, and writes what they cost to the file `report`."""
    import resource
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    start = time.monotonic()
    status = subprocess.Popen(argv).wait()
    wall, end = time.monotonic() - start, time.monotonic()
    while time.monotonic() < end + 60:  # a helper process may outlive its parent: qemu-nbd flushes when its client has gone
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                time.sleep(0.01)
        except ChildProcessError:
            break
    r = resource.getrusage(resource.RUSAGE_CHILDREN)
    with open(report, "w") as f:
        json.dump({"wall": wall, "flush": time.monotonic() - end, "cpu": r.ru_utime + r.ru_stime, "rss": r.ru_maxrss / 1024}, f)
    sys.exit(status)

def processor_seconds(pid):
    """User and system time of a process, of all its threads and of the children that it waited for."""
    fields = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return sum(map(int, fields[11:15])) / HZ

def peak_mib(pid):
    return next(int(l.split()[1]) / 1024 for l in open(f"/proc/{pid}/status") if l.startswith("VmHWM"))

def files_below(path):
    return [path] if os.path.isfile(path) else [os.path.join(d, f) for d, _, fs in os.walk(path) for f in fs]

def flush(paths):
    """Seconds until all below `paths` is on the storage."""
    start = time.monotonic()
    for path in [f for p in paths for f in files_below(p)]:
        fd = os.open(path, os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
    return time.monotonic() - start

def evict(*paths):
    """Puts all below `paths` out of the page cache."""
    for path in [f for p in paths for f in files_below(p)]:
        fd = os.open(path, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)

def stored_mib(paths):
    return sum(os.stat(f).st_blocks * 512 for p in paths for f in files_below(p)) / MIB

class Busy:
    """The whole machine's busy processor time, to say how much of it others took."""
    def __init__(self):
        self.at, self.busy = time.monotonic(), self.now()
    def now(self):
        f = [int(x) for x in open("/proc/stat").readline().split()[1:]]
        return (sum(f[:3]) + sum(f[5:8])) / HZ
    def others(self, ours):
        return max(0.0, self.now() - self.busy - ours) / max(time.monotonic() - self.at, 0.01)

# ---- QEMU ------------------------------------------------------------------------------------------------------------
class Machine:
    """A QEMU that runs no guest; disks as (device, format, image). The nodes are called as the devices, with an `n`."""
    preamble = 0  # how much of the log is not QEMU's own
    def __init__(self, work, name, disks):
        self.name, self.disks, self.work = name, disks, work
        self.monitor, own = f"{work}/{name}.qmp", f"{work}/{name}.own"
        self.log = open(f"{work}/{name}.log", "w+")
        argv = [QEMU, "-name", name, "-S", "-machine", "q35", "-accel", "tcg", "-m", "64", "-nodefaults", "-display", "none"]
        for path in (self.monitor, own):
            argv += ["-qmp", f"unix:{path},server=on,wait=off"]
        for device, form, image in disks:
            argv += ["-blockdev", f"driver={form},node-name=n{device},discard=unmap,file.driver=file,file.filename={image}",
                     "-device", f"virtio-blk-pci,drive=n{device},id={device},serial={device}"]
        self.process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)
        self.pid = self.process.pid
        self.connect(own)
    def connect(self, own):
        for _ in range(200):
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(own)
                break
            except OSError:
                time.sleep(0.05)
        self.replies, self.events = self.socket.makefile("rb"), []
        self.read()
        self("qmp_capabilities")
    def read(self):
        line = self.replies.readline()
        if not line:
            raise SystemExit(f"QEMU {self.name} has ended: {self.said()}")
        return json.loads(line)
    def said(self):
        with open(self.log.name) as f:
            f.seek(self.preamble)
            return f.read()
    def __call__(self, command, **arguments):
        self.socket.sendall(json.dumps({"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}).encode() + b"\n")
        while True:
            reply = self.read()
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise RuntimeError(f"{command}: {reply['error']['desc']}")
            else:
                return reply["return"]
    def job(self, sync, targets, **more):
        """Backs all disks up by jobs of one transaction onto these (format, file), and waits for the end."""
        for i, (form, path) in enumerate(targets):
            self("blockdev-add", driver=form, node_name=f"target{i}", discard="unmap",
                 file={"driver": "file", "filename": path, "discard": "unmap"})
        self.events.clear()
        usage, start = processor_seconds(self.pid), time.monotonic()
        self("transaction", actions=[{"type": "blockdev-backup", "data": {
            "job-id": f"job{i}", "device": f"n{d[0]}", "target": f"target{i}", "sync": sync,
            **{k.replace("_", "-"): v for k, v in more.items()}}} for i, d in enumerate(self.disks)])
        ended = 0
        while ended < len(targets):
            event = self.events.pop(0) if self.events else self.read()
            if event.get("event") == "BLOCK_JOB_COMPLETED":
                if "error" in event["data"]:
                    raise RuntimeError(event["data"]["error"])
                ended += 1
        wall, usage = time.monotonic() - start, processor_seconds(self.pid) - usage
        start = time.monotonic()  # QEMU flushes an image when it closes it
        for i in range(len(targets)):
            for _ in range(100):
                try:
                    self("blockdev-del", node_name=f"target{i}")
                    break
                except RuntimeError:
                    time.sleep(0.02)
        return {"wall": wall, "cpu": 0.0, "qemu": usage, "rss": 0.0, "flush": time.monotonic() - start}
    def scatter(self, seed, extents, mib):
        """Writes `mib` MiB of 64 KiB each, 64 % of them across a 64 KiB border: 1.64 times as much is dirty at 64 KiB."""
        rng, piece = random.Random(seed), f"{self.work}/piece"
        slots = [(device, at + i * 128 * KIB) for device in extents for at, n in extents[device] for i in range(n * 8)]
        with open(piece, "wb") as f:
            for k, (device, at) in enumerate(rng.sample(slots, mib * 16)):
                os.pwrite(f.fileno(), rng.randbytes(64 * KIB), 0)
                at += 4 * KIB * rng.randrange(1, 16) if k % 25 < 16 else 0
                self("human-monitor-command", command_line=f'qemu-io -d /machine/peripheral/{device}/virtio-backend "write -q -s {piece} {at} 64k"')
        for device in extents:
            self("human-monitor-command", command_line=f'qemu-io -d /machine/peripheral/{device}/virtio-backend "flush"')
        said = self.said()
        if "failed" in said or "rror" in said:
            raise SystemExit(f"writes failed: {said}")
    def nbd(self, path):
        """Exports all disks; ends with the same call without a path. livebackup wants QEMU's only server for itself."""
        if not path:
            return self("nbd-server-stop")
        self("nbd-server-start", addr={"type": "unix", "data": {"path": path}}, max_connections=16)
        for device, _, _ in self.disks:
            self("block-export-add", type="nbd", id=f"e{device}", node_name=f"n{device}", name=device, writable=False)
    def end(self):
        self.process.terminate()
        self.process.wait()

# ---- data ------------------------------------------------------------------------------------------------------------
def make(path, virtual, mib, seed, squeeze):
    """A sparse raw image with `mib` MiB of data in pieces all over it: every other MiB incompressible, the others about
    2:1 (of each 4 KiB, half is a filler). Returns the pieces as (offset, MiB). `squeeze` gets all of it."""
    rng, fillers = random.Random(seed), [bytes([65 + i]) * 2048 for i in range(64)]
    pieces = max(1, mib // 64)
    step, each, extents = virtual // pieces // MIB * MIB, mib // pieces, []
    with open(path, "wb") as f:
        f.truncate(virtual)
        for i in range(pieces):
            n = each + (mib % pieces if i == pieces - 1 else 0)
            extents.append((i * step, n))
            for k in range(n):
                data = rng.randbytes(MIB if k % 2 == 0 else MIB // 2)
                if k % 2:
                    data = b"".join(data[j * 2048:j * 2048 + 2048] + fillers[(j * 7 + k) & 63] for j in range(256))
                os.pwrite(f.fileno(), data, i * step + k * MIB)
                squeeze(data)
    return extents

class Squeezed:
    """How much `zstd -1` makes of all that it is given; `mib` is None without that program."""
    def __init__(self):
        self.mib, self.zstd = None, None
        if shutil.which("zstd"):
            self.zstd = subprocess.Popen(["zstd", "-1", "-q", "-c"], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self.total = 0
            self.thread = threading.Thread(target=self.count)
            self.thread.start()
    def count(self):
        while piece := self.zstd.stdout.read1(MIB):
            self.total += len(piece)
    def __call__(self, data):
        if self.zstd:
            self.zstd.stdin.write(data)
    def end(self):
        if self.zstd:
            self.zstd.stdin.close()
            self.thread.join()
            self.zstd.wait()
            self.mib = self.total / MIB

if __name__ == "__main__":
    reaper(sys.argv[1], sys.argv[2:])
