"""A domain of a libvirt that only the bench knows, for the means of backup that want one: virtnbdbackup and `virsh
backup-begin`.

The libvirtd is one of a session: configuration, state and sockets are below the work directory, it listens on a Unix socket
there and on no network, and ends with the bench. To root a libvirtd would be the system's, in /etc and /run; so root gives it
a user namespace in which it is somebody else (what it makes is still root's). The domain is as the other machines are: no
guest runs, and the bench and livebackup have monitors of their own beside libvirt's. Only its disks differ: libvirt keeps
checkpoints as bitmaps inside of qcow2 images, and has no incremental of others."""
import os, queue, resource, shutil, signal, socket, subprocess, threading, time
from xml.sax.saxutils import quoteattr
from measure import QEMU, Machine, peak_mib, processor_seconds

PACKAGES = {"libvirtd": "libvirt-daemon and libvirt-daemon-driver-qemu", "virsh": "libvirt-clients", "virtnbdbackup": "virtnbdbackup",
            "virtnbdrestore": "virtnbdbackup", "qemu-nbd": "qemu-utils", "nbdcopy": "libnbd-bin", "unshare": "util-linux"}
PATH = os.environ.get("PATH", "") + ":/usr/sbin"  # a user's path may lack libvirtd's

def missing():
    """The Debian packages of the programs that are not here."""
    return sorted({package for program, package in PACKAGES.items() if not shutil.which(program, path=PATH)})

class Domain(Machine):
    """A running libvirtd and its domain; disks as (device, format, image), where devices are called as libvirt calls them:
    virtio-disk0, virtio-disk1..."""
    def __init__(self, work, name, disks):
        self.name, self.disks, self.work = name, disks, work
        self.monitor, own = f"{work}/{name}.qmp", f"{work}/{name}.own"
        self.uri = f"qemu+unix:///session?socket={work}/run/libvirt/libvirt-sock"
        self.listener, self.ended = None, queue.Queue()
        self.start_daemon()
        try:
            with open(f"{work}/{name}.xml", "w") as f:
                f.write(self.definition(own))
            self.virsh("define", f.name)
            self.virsh("start", "--paused", name)
            self.log = open(f"{work}/cache/libvirt/qemu/log/{name}.log")
            self.preamble = os.path.getsize(self.log.name)
            self.pid = int(open(f"{work}/run/libvirt/qemu/run/{name}.pid").read())
            self.connect(own)
            self.listener = subprocess.Popen(
                ["stdbuf", "-oL", "virsh", "-q", "-c", self.uri, "event", "--domain", name, "--event", "job-completed", "--loop"],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
            threading.Thread(target=self.listen, daemon=True).start()
        except BaseException:
            self.end()
            raise
    def start_daemon(self):
        for directory in ("run", "cache", "data", "libvirt"):
            os.makedirs(f"{self.work}/{directory}", exist_ok=True)
        with open(f"{self.work}/libvirt/qemu.conf", "w") as f:
            f.write('stdio_handler = "file"\n')  # else a virtlogd is started, and stays
        homes = {f"XDG_{what}": f"{self.work}/{where}" for what, where in
                 (("RUNTIME_DIR", "run"), ("CONFIG_HOME", ""), ("CACHE_HOME", "cache"), ("DATA_HOME", "data"))}
        somebody = ["unshare", "--map-user=1000", "--map-group=1000"] if os.geteuid() == 0 else []
        log = open(f"{self.work}/libvirtd.log", "w")
        self.daemon = subprocess.Popen([*somebody, shutil.which("libvirtd", path=PATH)], env={**os.environ, **homes, "PATH": PATH},
                                       stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        for _ in range(400):
            try:
                with socket.socket(socket.AF_UNIX) as s:
                    return s.connect(f"{self.work}/run/libvirt/libvirt-sock")
            except OSError:
                time.sleep(0.05)
            if self.daemon.poll() is not None:
                break
        self.daemon.kill()
        raise SystemExit("libvirtd does not start (as root it needs user namespaces): " + open(log.name).read())
    def definition(self, own):
        disks = "".join(
            f"<disk type='file' device='disk'><driver name='qemu' type='{form}' discard='unmap'/><source file={quoteattr(image)}/>"
            f"<target dev='{target}' bus='virtio'/></disk>" for target, (_, form, image) in zip(self.targets(), self.disks))
        monitors = "".join(f"<qemu:arg value='-qmp'/><qemu:arg value={quoteattr(f'unix:{path},server=on,wait=off')}/>" for path in (self.monitor, own))
        return (f"<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>{self.name}</name>"
                "<memory unit='MiB'>64</memory><vcpu>1</vcpu><os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>"
                f"<devices><emulator>{shutil.which(QEMU)}</emulator>{disks}<controller type='usb' model='none'/><memballoon model='none'/></devices>"
                f"<qemu:commandline>{monitors}</qemu:commandline></domain>")
    def targets(self):
        return [f"vd{chr(ord('a') + i)}" for i in range(len(self.disks))]
    def virsh(self, *argv):
        done = subprocess.run(["virsh", "-q", "-c", self.uri, *argv], stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"virsh {' '.join(argv)}: {done.stderr.strip()}")
        return done.stdout
    def virtnbd(self, program, *options):
        """The command line of virtnbdbackup or virtnbdrestore. They want a name and a password for a URI that says where the
        socket is; libvirtd asks for none. Their temporary files are left behind, so they get a place for them."""
        return ["env", f"TMPDIR={self.work}/data", program, "-U", self.uri, "--user", "none", "--password", "none", "-n",
                "-f", f"{self.work}/virtnbd.sock", *options]
    def virtnbdrestore(self, made, into):
        """The commands, one for each disk: in one, the qemu-nbd of a disk that is still being flushed removes the socket of the
        next disk's, which has the same name."""
        return [self.virtnbd("virtnbdrestore", "-L", f"{self.work}/virtnbdrestore.log", "-i", made, "-o", into, "-d", t) for t in self.targets()]
    def files_in(self, restored):
        """What virtnbdrestore calls the disks."""
        return [f"{restored}/{os.path.basename(image)}" for _, _, image in self.disks]
    def backup_xml(self, of_disk, server="", mode="push", base=None):
        """The file that tells `backup-begin` what to do; `of_disk` says where to with the disk of that index."""
        disks = "".join(f"<disk name='{target}' backup='yes' type='file'>{of_disk(i)}</disk>" for i, target in enumerate(self.targets()))
        with open(f"{self.work}/backup.xml", "w") as f:
            f.write(f"<domainbackup mode='{mode}'>" + (f"<incremental>{base}</incremental>" if base else "") + f"{server}<disks>{disks}</disks></domainbackup>")
        return f.name
    def push(self, files, base=None, checkpoint=None):
        """`backup-begin` onto fresh qcow2 files, until libvirt says that it has completed: all, or what was written since the
        checkpoint `base`. Makes a checkpoint."""
        argv = ["backup-begin", self.name, self.backup_xml(lambda i: f"<driver type='qcow2'/><target file={quoteattr(files[i])}/>", base=base)]
        if checkpoint:
            with open(f"{self.work}/checkpoint.xml", "w") as f:
                f.write(f"<domaincheckpoint><name>{checkpoint}</name></domaincheckpoint>")
            argv.append(f.name)
        before = processor_seconds(self.pid), processor_seconds(self.daemon.pid)
        open(f"/proc/{self.daemon.pid}/clear_refs", "w").write("5")
        children = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
        while not self.ended.empty():  # other jobs'
            self.ended.get()
        start, usage = time.monotonic(), children()
        self.virsh(*argv)
        self.completed()
        wall, start = time.monotonic() - start, time.monotonic()
        while any(node["file"] in files for node in self("query-named-block-nodes", flat=True)):
            time.sleep(0.01)
        return {"wall": wall, "flush": time.monotonic() - start, "cpu": children() - usage, "qemu": processor_seconds(self.pid) - before[0],
                "server": processor_seconds(self.daemon.pid) - before[1], "rss": 0.0, "server_rss": peak_mib(self.daemon.pid)}
    def listen(self):
        for line in self.listener.stdout:
            if "success:" in line:
                self.ended.put(line.split(":")[1].strip() == "1")
        self.ended.put(False)
    def completed(self):
        """Waits for the end of a backup job."""
        if not self.ended.get():
            raise RuntimeError("backup-begin: the job has failed")
    def pull(self, socket_path):
        """The file for `backup-begin` in pull mode: exports by the disks' targets at this socket."""
        scratch = lambda i: f"<scratch file={quoteattr(f'{self.work}/scratch-{i}.qcow2')}/>"
        return self.backup_xml(scratch, f"<server transport='unix' socket={quoteattr(socket_path)}/>", "pull")
    def versions(self):
        said = subprocess.run(["virtnbdbackup", "-V"], capture_output=True, text=True)
        return f"libvirt {self.virsh('version', '--daemon').split('libvirt')[-1].split()[0]}, virtnbdbackup {(said.stdout + said.stderr).strip()}"
    def end(self):
        """QEMU is libvirt's child, or nobody's; it ends by its own monitor, and libvirtd after it."""
        try:
            self("quit")
            self.replies.read()
        except (AttributeError, OSError, SystemExit):
            subprocess.run(["virsh", "-q", "-c", self.uri, "destroy", self.name], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for process in filter(None, (self.listener, self.daemon)):
            process.terminate()
            process.wait()
        for pid in self.left_over():
            os.kill(pid, signal.SIGTERM)
    def left_over(self):
        """The qemu-nbds of a virtnbdrestore that was interrupted or failed: they wait for a client, and are nobody's children."""
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as f:
                    program, *arguments = f.read().split(b"\0")
            except OSError:
                continue  # it has ended
            if program == b"qemu-nbd" and f"{self.work}/virtnbd.sock".encode() in arguments:
                yield int(pid)
