//! The small Linux guest of `tests/guest/build.sh` under a real QEMU, with its agent, a shell, and the writer whose log
//! proves what a restored disk must hold.
//!
//! The shell is on a virtio-serial port of its own: the agent's socket (`agent` in the VM's directory), which takes one
//! client at a time, is left to the code under test, and commands also run while the guest's file systems are frozen.

use std::fmt::Write as _;
use std::ops::{Deref, DerefMut};
use std::sync::{Condvar, Mutex, OnceLock};
use std::thread::ThreadId;

use super::*;

/// Where the guest's files are; builds it on first use.
pub fn guest_files() -> &'static Path {
    static FILES: OnceLock<PathBuf> = OnceLock::new();
    FILES.get_or_init(|| {
        let said = run(&mut Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/build.sh")));
        PathBuf::from(said.lines().last().expect("build.sh prints the guest's directory"))
    })
}

/// Where the disk of the guest with databases is; builds it on first use.
pub fn database_disk() -> &'static Path {
    static FILE: OnceLock<PathBuf> = OnceLock::new();
    FILE.get_or_init(|| {
        let said = run(&mut Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guest/build-db.sh")));
        PathBuf::from(said.lines().last().expect("build-db.sh prints the directory")).join("db.raw")
    })
}

/// A disk of the guest: a virtio-blk device with this id and serial number, `/dev/disk/NAME` in the guest.
#[derive(Clone, Copy, Debug)]
pub struct GuestDisk {
    /// Id of the device, name of its image.
    pub name: &'static str,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// Size that the guest sees.
    pub size_bytes: u64,
    /// Whether it holds an ext4 that is mounted at `/mnt/NAME`.
    pub ext4: bool,
    /// Whether it is the disk of [`database_disk`], from which the guest runs.
    pub root: bool,
}

impl GuestDisk {
    /// An empty raw disk.
    pub const fn raw(name: &'static str, size_bytes: u64) -> GuestDisk {
        GuestDisk { name, format: "raw", size_bytes, ext4: false, root: false }
    }

    /// An empty qcow2 disk.
    pub const fn qcow2(name: &'static str, size_bytes: u64) -> GuestDisk {
        GuestDisk { name, format: "qcow2", size_bytes, ext4: false, root: false }
    }

    /// The same with an empty ext4 in it, mounted in the guest.
    pub const fn with_ext4(mut self) -> GuestDisk {
        self.ext4 = true;
        self
    }

    /// The root of the guest with databases: a qcow2 over the built disk, or a raw restored one.
    pub const fn databases(name: &'static str, format: &'static str) -> GuestDisk {
        GuestDisk { name, format, size_bytes: 0, ext4: false, root: true }
    }

    /// QEMU's arguments for it.
    pub fn arguments(&self) -> [String; 4] {
        let GuestDisk { name, format, .. } = self;
        [
            "-blockdev".into(),
            format!(
                "driver={format},node-name={name}-node,discard=unmap,\
                 file.driver=file,file.filename=DIR/{name}.{format},file.discard=unmap"
            ),
            "-device".into(),
            format!("virtio-blk-pci,drive={name}-node,id={name},serial={name}"),
        ]
    }

    /// File name of the image: `NAME.raw`, `NAME.qcow2`.
    pub fn file_name(&self) -> String {
        format!("{}.{}", self.name, self.format)
    }

    /// Makes the image in a directory.
    pub fn create(&self, version: Version, dir: &Path) {
        if self.root {
            run(Command::new(version.program("qemu-img"))
                .args(["create", "-q", "-f", self.format, "-F", "raw", "-b"])
                .args([database_disk(), &dir.join(self.file_name())]));
            return;
        }
        let raw = dir.join(format!("{}.raw", self.name));
        std::fs::File::create(&raw).unwrap().set_len(self.size_bytes).unwrap();
        if self.ext4 {
            run(Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&raw));
        }
        if self.format != "raw" {
            let image = dir.join(self.file_name());
            run(Command::new(version.program("qemu-img"))
                .args(["convert", "-f", "raw", "-O", self.format])
                .args([&raw, &image]));
            std::fs::remove_file(raw).unwrap();
        }
    }
}

/// How many tests have guests at once: each takes one or two processors whole, and databases in one that gets none give up.
const TURNS: usize = 2;
/// The threads of the tests that have guests.
static WITH_GUESTS: Mutex<Vec<ThreadId>> = Mutex::new(Vec::new());
static TURN_IS_FREE: Condvar = Condvar::new();

/// A test's turn to have guests, until its first one goes.
struct Turn(ThreadId);

impl Turn {
    /// Waits for it; nothing where this test has it already.
    fn take() -> Option<Turn> {
        let own = std::thread::current().id();
        let mut with_guests = WITH_GUESTS.lock().unwrap();
        if with_guests.contains(&own) {
            return None;
        }
        while with_guests.len() >= TURNS {
            with_guests = TURN_IS_FREE.wait(with_guests).unwrap();
        }
        with_guests.push(own);
        Some(Turn(own))
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        WITH_GUESTS.lock().unwrap().retain(|thread| *thread != self.0);
        TURN_IS_FREE.notify_all();
    }
}

/// A running guest. It is a [`Qemu`] too: monitors, `kill`ed when dropped.
pub struct Guest {
    qemu: Qemu,
    shell: Shell,
    disks: Vec<GuestDisk>,
    /// Given back when QEMU is gone.
    _turn: Option<Turn>,
}

impl Deref for Guest {
    type Target = Qemu;
    fn deref(&self) -> &Qemu {
        &self.qemu
    }
}

impl DerefMut for Guest {
    fn deref_mut(&mut self) -> &mut Qemu {
        &mut self.qemu
    }
}

impl Guest {
    /// Makes the disks in a new directory, boots, and waits until the guest answers.
    pub fn boot(version: Version, disks: &[GuestDisk]) -> Guest {
        Self::boot_with(version, disks, &[])
    }

    /// As [`Guest::boot`], with further arguments for QEMU.
    pub fn boot_with(version: Version, disks: &[GuestDisk], args: &[&str]) -> Guest {
        let dir = tempfile::Builder::new().prefix("livebackup-guest-").tempdir().unwrap();
        for disk in disks {
            disk.create(version, dir.path());
        }
        Self::boot_in(version, dir, disks, args)
    }

    /// Boots with the images `NAME.FORMAT` of a directory that exists: a second start, or restored disks.
    pub fn boot_in(version: Version, dir: tempfile::TempDir, disks: &[GuestDisk], args: &[&str]) -> Guest {
        Self::boot_by(None, version, dir, disks, args)
    }

    /// The same, by a program that takes QEMU's command line, like `livebackup run`: the guest is let go once the program
    /// has its bitmaps on the disks.
    pub fn boot_by(
        by: Option<Command>,
        version: Version,
        dir: tempfile::TempDir,
        disks: &[GuestDisk],
        args: &[&str],
    ) -> Guest {
        let is_run = by.is_some();
        let files = guest_files();
        let mounts: Vec<_> = disks.iter().filter(|d| d.ext4).map(|d| d.name).collect();
        let mut line = "console=ttyS0 quiet panic=-1 tsc=reliable mitigations=off no_timer_check random.trust_cpu=on \
                        apparmor=0 audit=0"
            .to_owned();
        if !mounts.is_empty() {
            write!(line, " livebackup.mount={}", mounts.join(",")).unwrap();
        }
        if let Some(root) = disks.iter().find(|d| d.root) {
            write!(line, " livebackup.root={}", root.name).unwrap();
        }
        let (kernel, initramfs) = (files.join("vmlinuz"), files.join("initramfs"));
        let mut all: Vec<String> = [
            "-m 256 -cpu max -name guest -serial file:DIR/console.log -device virtio-serial-pci",
            "-chardev socket,id=agent,path=DIR/agent,server=on,wait=off",
            "-device virtserialport,chardev=agent,name=org.qemu.guest_agent.0",
            "-chardev socket,id=shell,path=DIR/shell,server=on,wait=off",
            "-device virtserialport,chardev=shell,name=livebackup.shell",
        ]
        .iter()
        .flat_map(|part| part.split(' '))
        .map(str::to_owned)
        .collect();
        all.extend(["-kernel".into(), kernel.to_str().unwrap().into()]);
        all.extend(["-initrd".into(), initramfs.to_str().unwrap().into()]);
        all.extend(["-append".into(), line]);
        all.extend(disks.iter().flat_map(GuestDisk::arguments));
        all.extend(args.iter().map(|a| (*a).to_owned()));
        let all: Vec<_> = all.iter().map(String::as_str).collect();
        let (mut by, mut dir, mut falls) = (by, dir, 0);
        let mut turn = Turn::take();
        let guest = loop {
            let mut qemu = Qemu::start_by(by.take(), version, dir, &all);
            let mut shell = Shell::connect(&qemu.path("shell"));
            wait_until("the disks to be tracked", || !is_run || qemu.bitmaps().len() >= 2 * disks.len());
            qemu.qmp("cont", json!({}));
            let up = shell.ask("echo up");
            let guest = Guest { qemu, shell, disks: disks.to_vec(), _turn: turn.take() };
            if up.is_some_and(|(status, said)| status == 0 && said == "up\n") {
                break guest;
            }
            // Emulation has a fault of its own: while the firmware moves the devices' memory about, a vCPU that waited
            // for QEMU's lock may use a mapping that is gone. Nothing of ours has run yet, so that start is repeated.
            let log = std::fs::read_to_string(guest.path("qemu.log")).unwrap();
            let fell = !is_run && log.contains("iotlb_to_section: Assertion");
            falls += 1;
            assert!(fell && falls < 4, "the guest's shell does not answer: {}", guest.console());
            eprintln!("QEMU fell over its own emulation, once more: {log}");
            (dir, turn) = (guest.qemu.into_dir(), guest._turn);
        };
        // The agent starts in the background.
        drop(Agent::connect(&guest.agent()));
        guest
    }

    /// What the guest wrote to its serial console.
    pub fn console(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(self.path("console.log")).unwrap_or_default()).into_owned()
    }

    /// The directory, for another start, once the guest has powered off.
    pub fn powered_off(mut self) -> tempfile::TempDir {
        let status = self.qemu.wait_for_exit();
        assert!(status.success(), "{status}: {}", self.console());
        self.qemu.into_dir()
    }

    /// The guest agent's socket.
    pub fn agent(&self) -> PathBuf {
        self.path("agent")
    }

    /// Path of a disk's image.
    pub fn image(&self, name: &str) -> PathBuf {
        let disk = self.disks.iter().find(|d| d.name == name).expect("a disk of this guest");
        self.path(&disk.file_name())
    }

    /// Runs a shell command in the guest; fails the test unless it succeeds; returns its output.
    pub fn sh(&mut self, command: &str) -> String {
        let (status, output) = self.try_sh(command);
        assert_eq!(status, 0, "in the guest: {command}\n{output}\n{}", self.console());
        output
    }

    /// As [`Guest::sh`], giving the exit status back with the output (of both streams).
    pub fn try_sh(&mut self, command: &str) -> (i32, String) {
        self.shell.run(command)
    }

    /// Starts the writer in the background on these disks, and returns when it has begun to write.
    pub fn start_writer(&mut self, log: &WriteLog, disks: &[&str]) {
        let devices: Vec<_> = disks.iter().map(|name| format!("/dev/disk/{name}")).collect();
        self.start_writer_on(log, &devices);
    }

    /// The same on paths of the guest: devices, or files of their final size.
    pub fn start_writer_on(&mut self, log: &WriteLog, paths: &[impl AsRef<str>]) {
        let paths: Vec<_> = paths.iter().map(AsRef::as_ref).collect();
        let WriteLog { seed, flight, pause_us, from } = log;
        self.sh(&format!(
            "rm -f /run/written; writer write --seed {seed} --flight {flight} --pause {pause_us} --from {from} \
             --progress /run/written {} </dev/null >/run/writer.log 2>&1 & echo $! >/run/writer.pid",
            paths.join(" ")
        ));
        let from = log.from;
        // It makes its progress file a moment after it was started.
        wait_until("the writer to begin", || {
            self.sh("wc -c </run/written || true").trim().parse::<u64>().is_ok_and(|n| n > 1)
        });
        wait_until("the writer's first write", || self.written() > from);
    }

    /// N such that all writes up to N are complete.
    pub fn written(&mut self) -> u64 {
        let (_, text) = self.try_sh("kill -0 $(cat /run/writer.pid) && cat /run/written");
        text.trim().parse().unwrap_or_else(|_| panic!("the writer: {text}{}", self.try_sh("cat /run/writer.log").1))
    }

    /// Waits until `count` more writes than now are complete; returns how many are.
    pub fn wait_for_writes(&mut self, count: u64) -> u64 {
        let goal = self.written() + count;
        wait_until("the guest's writes", || self.written() >= goal);
        self.written()
    }

    /// Stops the writer and waits until it has flushed; returns the number of its last write.
    pub fn stop_writer(&mut self) -> u64 {
        self.sh("p=$(cat /run/writer.pid); kill $p; while kill -0 $p 2>/dev/null; do usleep 20000; done");
        self.sh("cat /run/written").trim().parse().unwrap()
    }
}

/// One write log: what `tests/guest/writer.c` writes and checks.
#[derive(Clone, Copy, Debug)]
pub struct WriteLog {
    /// All contents follow from it.
    pub seed: u64,
    /// Writes on their way at a time, up to 31.
    pub flight: u64,
    /// A pause after each write.
    pub pause_us: u64,
    /// The last write that the disks hold already.
    pub from: u64,
}

impl WriteLog {
    /// One write at a time, without pause, on disks of zeros.
    pub const fn seeded(seed: u64) -> WriteLog {
        WriteLog { seed, flight: 1, pause_us: 0, from: 0 }
    }

    /// Writes on the host, as fast as it goes, `count` more writes into raw images (of their final size).
    pub fn write(&mut self, count: u64, images: &[impl AsRef<Path>]) {
        let mut command = self.command("write");
        command.args(["--buffered", "--from", &self.from.to_string(), "--count", &count.to_string()]);
        run(command.args(images.iter().map(AsRef::as_ref)));
        self.from += count;
    }

    /// The N for which these raw images, in the order in which the writer had the disks, are as they were after write
    /// N; or where they are not.
    pub fn instant(&self, images: &[impl AsRef<Path>]) -> Result<u64, String> {
        let mut command = self.command("check");
        let out = command.args(images.iter().map(AsRef::as_ref)).stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&out.stdout).into_owned();
        match out.status.code() {
            Some(0) => Ok(said
                .lines()
                .find_map(|l| l.strip_prefix("proved: N=")?.split(' ').next()?.parse().ok())
                .expect("the checker says N")),
            Some(1) => Err(said),
            _ => panic!("{command:?}: {}\n{said}{}", out.status, String::from_utf8_lossy(&out.stderr)),
        }
    }

    /// Fails the test unless the images are of one instant not before write `complete_before` was complete and not
    /// after write `complete_after` was.
    pub fn prove(&self, images: &[impl AsRef<Path>], complete_before: u64, complete_after: u64) -> u64 {
        let n = self.instant(images).unwrap_or_else(|difference| panic!("{difference}"));
        let range = complete_before..=complete_after + self.flight;
        assert!(range.contains(&n), "the disks are of write {n}, the backup was made during {range:?}");
        n
    }

    fn command(&self, what: &str) -> Command {
        let mut command = Command::new(guest_files().join("writer"));
        command.args([what, "--seed", &self.seed.to_string(), "--flight", &self.flight.to_string()]);
        command
    }
}

/// The client of the guest's shell port. Each command's output comes back with its length, behind a line with a number
/// that only this command has.
struct Shell {
    stream: BufReader<UnixStream>,
    count: u64,
}

impl Shell {
    fn connect(socket: &Path) -> Shell {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
        Shell { stream: BufReader::new(stream), count: 0 }
    }

    fn run(&mut self, command: &str) -> (i32, String) {
        self.ask(command).unwrap_or_else(|| panic!("the guest's shell does not answer: {command}"))
    }

    /// Exit status and output of a command, or nothing where no answer comes.
    fn ask(&mut self, command: &str) -> Option<(i32, String)> {
        self.count += 1;
        let mark = format!("@{}-{}", std::process::id(), self.count);
        let quoted = command.replace('\'', r"'\''");
        let line = format!(
            "sh -c '{quoted}' </dev/null >/run/said 2>&1; echo \"{mark} $? $(wc -c </run/said)\"; cat /run/said\n"
        );
        self.stream.get_mut().write_all(line.as_bytes()).ok()?;
        loop {
            let mut head = vec![];
            self.stream.read_until(b'\n', &mut head).ok().filter(|&n| n > 0)?;
            let head = String::from_utf8_lossy(&head);
            let Some((status, len)) =
                head.trim_end().strip_prefix(&mark).and_then(|rest| rest.trim_start().split_once(' '))
            else {
                continue;
            };
            let mut output = vec![0; len.parse().unwrap()];
            self.stream.read_exact(&mut output).unwrap();
            return Some((status.parse().unwrap(), String::from_utf8_lossy(&output).into_owned()));
        }
    }
}

/// A plain blocking client of the guest agent. The agent takes one client at a time: drop it before the code under test
/// connects.
pub struct Agent(BufReader<UnixStream>);

impl Agent {
    /// Connects and waits until the agent is up.
    pub fn connect(socket: &Path) -> Agent {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(120))).unwrap();
        let mut me = Agent(BufReader::new(stream));
        me.call("guest-ping");
        me
    }

    /// A command without arguments; fails the test on an error reply.
    pub fn call(&mut self, name: &str) -> Value {
        self.0.get_mut().write_all((json!({"execute": name}).to_string() + "\n").as_bytes()).unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap_or_else(|e| panic!("{name}: {e}"));
        let mut answer: Value = serde_json::from_str(&line).unwrap();
        assert!(answer.get("error").is_none(), "{name}: {answer}");
        answer["return"].take()
    }
}
