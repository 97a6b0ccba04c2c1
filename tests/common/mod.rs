//! What the tests share: real QEMUs of both versions, guest writes through their monitor, and a model that knows the
//! bytes. Nothing here uses the code under test.

#![allow(dead_code, clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

pub mod device;
pub mod guest;
pub mod partitioned;
pub mod played;
pub mod proxy;
pub mod side;
pub mod slow;
pub mod tiny;

/// A QEMU version to test with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// The installed QEMU, 10.0 or later.
    V10,
    /// QEMU 7.2, unpacked by `tests/setup.sh`.
    V7,
}

/// Both versions.
pub const VERSIONS: [Version; 2] = [Version::V10, Version::V7];

impl Version {
    /// The path of a program of this version: `qemu-system-x86_64`, `qemu-img`, …
    pub fn program(self, name: &str) -> PathBuf {
        let path = match self {
            Version::V10 => PathBuf::from("/usr/bin").join(name),
            Version::V7 => cache_dir().join("qemu-7.2").join(name),
        };
        assert!(path.exists(), "{} is missing: run tests/setup.sh (as root) first", path.display());
        path
    }
}

/// Where `tests/setup.sh` keeps what it made.
pub fn cache_dir() -> PathBuf {
    if let Some(dir) = std::env::var_os("LIVEBACKUP_CACHE") {
        return dir.into();
    }
    let base = std::env::var_os("XDG_CACHE_HOME")
        .map_or_else(|| PathBuf::from(std::env::var_os("HOME").expect("HOME is set")).join(".cache"), PathBuf::from);
    base.join("livebackup")
}

/// The built program.
pub fn livebackup() -> Command {
    Command::new(env!("CARGO_BIN_EXE_livebackup"))
}

/// Runs a command and fails with its output unless it succeeds; returns standard output.
pub fn run(command: &mut Command) -> String {
    let out = command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        out.status.success(),
        "{command:?}: {}\n{}\n{}",
        out.status,
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
    String::from_utf8_lossy(&out.stdout).into_owned()
}

/// Waits until `done` says so; fails after a generous time.
pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited a minute for: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A running QEMU with two monitors: `qmp` for the code under test, and one of the test's own. Killed when dropped.
pub struct Qemu {
    pub version: Version,
    pub dir: tempfile::TempDir,
    child: Child,
    /// QEMU itself, where the child is a program that runs it.
    pid: u32,
    monitor: Qmp,
}

impl Qemu {
    /// Starts `-S -nodefaults -machine q35` with these further arguments; `DIR` in an argument becomes the VM's own
    /// directory, in which `prepare` may make images first.
    pub fn start_with(version: Version, args: &[&str], prepare: impl FnOnce(&Path)) -> Qemu {
        let dir = tempfile::Builder::new().prefix("livebackup-test-").tempdir().unwrap();
        prepare(dir.path());
        Self::start_in(version, dir, args)
    }

    /// As [`Qemu::start_with`], in a directory that exists: for a second start of the same machine.
    pub fn start_in(version: Version, dir: tempfile::TempDir, args: &[&str]) -> Qemu {
        Self::start_by(None, version, dir, args)
    }

    /// As [`Qemu::start_in`], by a program that takes QEMU's command line as its last arguments.
    pub fn start_by(by: Option<Command>, version: Version, dir: tempfile::TempDir, args: &[&str]) -> Qemu {
        let at = dir.path().to_str().unwrap();
        let log = std::fs::File::create(dir.path().join("qemu.log")).unwrap();
        let program = version.program("qemu-system-x86_64");
        let mut command = by.map_or_else(
            || Command::new(&program),
            |mut by| {
                by.arg(&program);
                by
            },
        );
        command.args("-S -nodefaults -display none -accel tcg -m 64".split(' '));
        if !args.contains(&"-machine") {
            command.args(["-machine", "q35"]);
        }
        for name in ["qmp", "qmp-test"] {
            let _ = std::fs::remove_file(dir.path().join(name));
            command.args(["-qmp", &format!("unix:{at}/{name},server=on,wait=off")]);
        }
        command.args(args.iter().map(|a| a.replace("DIR", at)));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let mut child = command.spawn().unwrap();
        let socket = dir.path().join("qmp-test");
        wait_until("QEMU to open its monitor", || {
            if let Some(status) = child.try_wait().unwrap() {
                let log = std::fs::read_to_string(dir.path().join("qemu.log")).unwrap();
                panic!("QEMU ended at its start with {status}: {log}\n{command:?}");
            }
            UnixStream::connect(&socket).is_ok_and(|s| {
                s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
                s.take(1).read(&mut [0]).is_ok_and(|n| n == 1)
            })
        });
        let monitor = Qmp::connect(&socket);
        let pid = monitor.peer();
        Qemu { version, dir, child, pid, monitor }
    }

    /// A QEMU with one virtio-blk disk `vd0` on node `disk0`, a raw image of `size_bytes`.
    pub fn with_raw_disk(version: Version, size_bytes: u64) -> Qemu {
        Self::start_with(
            version,
            &[
                "-blockdev",
                "driver=raw,node-name=disk0,discard=unmap,file.driver=file,file.filename=DIR/disk0.raw,file.discard=unmap",
                "-device",
                "virtio-blk-pci,drive=disk0,id=vd0",
            ],
            |dir| {
                std::fs::File::create(dir.join("disk0.raw")).unwrap().set_len(size_bytes).unwrap();
            },
        )
    }

    /// The monitor socket for the code under test.
    pub fn socket(&self) -> PathBuf {
        self.dir.path().join("qmp")
    }

    /// A path in the VM's directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether QEMU itself runs, whoever started it.
    pub fn runs(&self) -> bool {
        // Empty of a zombie; another process with its number does not know the directory.
        let line = std::fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        String::from_utf8_lossy(&line).contains(self.dir.path().to_str().unwrap())
    }

    fn end(&mut self) {
        if self.pid != self.child.id() && self.runs() {
            self.signal(nix::sys::signal::Signal::SIGKILL);
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// A command on the test's own monitor; fails the test on an error reply.
    pub fn qmp(&mut self, name: &str, arguments: Value) -> Value {
        self.monitor.call(name, arguments)
    }

    /// As [`Qemu::qmp`], giving an error reply back.
    pub fn try_qmp(&mut self, name: &str, arguments: Value) -> Result<Value, Value> {
        self.monitor.try_call(name, arguments)
    }

    /// `qemu-io` on a guest device, by full QOM path: a write like the guest's own. `command` as in
    /// `write -P 0xab 0 64k`.
    pub fn qemu_io(&mut self, qom_path: &str, command: &str) {
        let line = format!("qemu-io -d {qom_path} \"{command}\"");
        let said = self.qmp("human-monitor-command", json!({"command-line": line}));
        assert!(said.as_str().unwrap().is_empty(), "{line}: {said}");
    }

    /// A guest write of `len` bytes of `pattern` to `vd0`.
    pub fn write(&mut self, offset: u64, len: u64, pattern: u8) {
        self.qemu_io("/machine/peripheral/vd0/virtio-backend", &format!("write -P {pattern:#04x} {offset} {len}"));
    }

    /// What QEMU (and `qemu-io` in it) printed so far.
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("qemu.log")).unwrap()
    }

    /// Whether the process lives.
    pub fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub fn status(&mut self) -> String {
        self.qmp("query-status", json!({}))["status"].as_str().unwrap().to_owned()
    }

    /// Names of all block nodes.
    pub fn nodes(&mut self) -> Vec<String> {
        let nodes = self.qmp("query-named-block-nodes", json!({"flat": true}));
        let mut names: Vec<_> =
            nodes.as_array().unwrap().iter().map(|n| n["node-name"].as_str().unwrap().to_owned()).collect();
        names.sort();
        names
    }

    /// All (node, bitmap name) pairs; anonymous bitmaps as `""`.
    pub fn bitmaps(&mut self) -> Vec<(String, String)> {
        let nodes = self.qmp("query-named-block-nodes", json!({"flat": true}));
        let mut found = vec![];
        for n in nodes.as_array().unwrap() {
            for b in n["dirty-bitmaps"].as_array().unwrap_or(&vec![]) {
                found.push((n["node-name"].as_str().unwrap().into(), b["name"].as_str().unwrap_or("").into()));
            }
        }
        found.sort();
        found
    }

    /// Ids of all block exports.
    pub fn exports(&mut self) -> Vec<String> {
        let exports = self.qmp("query-block-exports", json!({}));
        exports.as_array().unwrap().iter().map(|e| e["id"].as_str().unwrap().to_owned()).collect()
    }

    /// `kill -9`, and waits; the directory is given back for another start.
    pub fn kill(mut self) {
        self.end();
    }

    /// Sends the program that runs it a signal.
    pub fn signal_parent(&self, signal: nix::sys::signal::Signal) {
        assert_ne!(self.pid, self.child.id(), "QEMU was started without one");
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), signal).unwrap();
    }

    /// Kills the program that runs it.
    pub fn kill_parent(&mut self) {
        assert_ne!(self.pid, self.child.id(), "QEMU was started without one");
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Ends QEMU by `quit` and waits for its exit.
    pub fn quit(&mut self) {
        self.send_quit();
        self.child.wait().unwrap();
    }

    /// `quit`, and does not wait.
    pub fn send_quit(&mut self) {
        let _ = self.monitor.send("quit", json!({}));
    }

    /// Sends the process a signal.
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.pid as i32), signal).unwrap();
    }

    /// Waits until the process has ended.
    pub fn wait_for_exit(&mut self) -> std::process::ExitStatus {
        wait_until("QEMU to end", || self.child.try_wait().unwrap().is_some());
        self.child.wait().unwrap()
    }

    /// Ends it if it has not ended, and gives its directory back for another start.
    pub fn into_dir(mut self) -> tempfile::TempDir {
        self.end();
        std::mem::replace(&mut self.dir, tempfile::tempdir().unwrap())
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        self.end();
        if std::thread::panicking() {
            let log = std::fs::read_to_string(self.dir.path().join("qemu.log")).unwrap_or_default();
            let tail: Vec<_> =
                log.lines().rev().filter(|l| !l.starts_with("wrote ") && !l.contains("ops;")).take(15).collect();
            eprintln!("the end of QEMU's own output ({:?}):", self.version);
            tail.iter().rev().for_each(|l| eprintln!("  {l}"));
        }
    }
}

/// A plain blocking QMP client.
pub struct Qmp {
    stream: BufReader<UnixStream>,
    pub events: Vec<Value>,
}

impl Qmp {
    pub fn connect(socket: &Path) -> Qmp {
        let stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut me = Qmp { stream: BufReader::new(stream), events: vec![] };
        assert!(me.read().get("QMP").is_some());
        me.call("qmp_capabilities", json!({}));
        me
    }

    /// The process at the other end.
    fn peer(&self) -> u32 {
        use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
        getsockopt(self.stream.get_ref(), PeerCredentials).unwrap().pid() as u32
    }

    fn read(&mut self) -> Value {
        let mut line = String::new();
        self.stream.read_line(&mut line).expect("an answer from QEMU");
        assert!(!line.is_empty(), "QEMU closed its monitor");
        serde_json::from_str(&line).unwrap()
    }

    fn send(&mut self, name: &str, arguments: Value) -> std::io::Result<()> {
        let line = json!({"execute": name, "arguments": arguments}).to_string() + "\n";
        self.stream.get_mut().write_all(line.as_bytes())
    }

    pub fn try_call(&mut self, name: &str, arguments: Value) -> Result<Value, Value> {
        self.send(name, arguments).unwrap();
        loop {
            let mut answer = self.read();
            if answer.get("event").is_some() {
                self.events.push(answer);
            } else if answer.get("error").is_some() {
                return Err(answer["error"].take());
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    pub fn call(&mut self, name: &str, arguments: Value) -> Value {
        self.try_call(name, arguments.clone()).unwrap_or_else(|e| panic!("{name} {arguments}: {e}"))
    }
}

/// A small random generator with a printed seed, so that a failing run can be repeated:
/// `LIVEBACKUP_SEED=… cargo test …`.
pub struct Rng(u64);

impl Rng {
    /// Seeded from `LIVEBACKUP_SEED` or the clock; prints the seed.
    pub fn new() -> Rng {
        let seed = match std::env::var("LIVEBACKUP_SEED") {
            Ok(text) => text.parse().expect("LIVEBACKUP_SEED is a number"),
            Err(_) => std::time::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64,
        };
        println!("LIVEBACKUP_SEED={seed}");
        Rng::seeded(seed)
    }

    pub fn seeded(seed: u64) -> Rng {
        Rng(seed)
    }

    /// splitmix64
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// A number below `bound`.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn fill(&mut self, buffer: &mut [u8]) {
        for piece in buffer.chunks_mut(8) {
            let word = self.next().to_le_bytes();
            piece.copy_from_slice(&word[..piece.len()]);
        }
    }
}
