//! A machine with two disks beside the sidecar: what the guest wrote is known to the test, and restored points are held
//! against that.

use std::process::{Child, Stdio};

use super::tiny::{self, Tiny};
use super::*;

/// Size of each disk.
pub const SIZE: u64 = (6 << 20) + 512;
/// The disks: name, node, format.
pub const DISKS: [(&str, &str, &str); 2] = [("vd0", "disk0", "raw"), ("vd1", "disk1", "qcow2")];

/// A machine with the tiny guest, a raw and a qcow2 disk, and the bytes that they must hold.
pub struct Side {
    pub version: Version,
    pub models: [Vec<u8>; 2],
    pub qemu: Option<Qemu>,
    /// Further arguments for QEMU.
    pub args: Vec<String>,
    tiny: Option<Tiny>,
    dir: Option<tempfile::TempDir>,
    /// State, repository, restored disks: not in QEMU's directory, which moves from start to start.
    pub home: tempfile::TempDir,
}

/// QEMU's arguments for the disks.
pub fn arguments() -> Vec<String> {
    let mut all: Vec<String> = ["-name", "vm1"].into_iter().chain(tiny::ARGS).map(str::to_owned).collect();
    for (name, node, format) in DISKS {
        let file = format!("file.driver=file,file.filename=DIR/{name}.{format}");
        all.extend(["-blockdev".to_owned(), format!("driver={format},node-name={node},{file}")]);
        all.extend(["-device".to_owned(), format!("virtio-blk-pci,drive={node},id={name}")]);
    }
    all
}

impl Side {
    /// Makes the disks; does not start QEMU.
    pub fn new(version: Version) -> Side {
        let dir = tempfile::Builder::new().prefix("livebackup-side-").tempdir().unwrap();
        tiny::write(dir.path());
        for (name, _, format) in DISKS {
            let image = dir.path().join(format!("{name}.{format}"));
            run(Command::new(version.program("qemu-img"))
                .args(["create", "-q", "-f", format])
                .arg(image)
                .arg(SIZE.to_string()));
        }
        let home = tempfile::Builder::new().prefix("livebackup-home-").tempdir().unwrap();
        let models = [vec![0; SIZE as usize], vec![0; SIZE as usize]];
        let side = Side { version, models, qemu: None, args: arguments(), tiny: None, dir: Some(dir), home };
        side.ok(&["init", side.repo().to_str().unwrap()]);
        side
    }

    /// Starts QEMU, stopped (`-S`).
    pub fn start(&mut self) {
        self.start_by(None);
    }

    /// The same, by a program that takes QEMU's command line.
    pub fn start_by(&mut self, by: Option<Command>) {
        let args: Vec<_> = self.args.iter().map(String::as_str).collect();
        let qemu = Qemu::start_by(by, self.version, self.dir.take().expect("not running"), &args);
        self.tiny = Some(Tiny::connect(qemu.dir.path()));
        self.qemu = Some(qemu);
    }

    /// Another QEMU has the machine from now on; gives the one before.
    pub fn take_over(&mut self, qemu: Qemu) -> Qemu {
        self.tiny = Some(Tiny::connect(qemu.dir.path()));
        self.qemu.replace(qemu).expect("QEMU runs")
    }

    /// Waits until the disks have a bitmap each that records for livebackup.
    pub fn wait_until_tracked(&mut self) {
        wait_until("the disks to be tracked", || {
            let bitmaps = self.qemu().bitmaps();
            let ours = |node: &str| bitmaps.iter().any(|(on, name)| on == node && name.contains("livebackup"));
            DISKS.iter().all(|(_, node, _)| ours(node))
        });
    }

    /// The running QEMU.
    pub fn qemu(&mut self) -> &mut Qemu {
        self.qemu.as_mut().expect("QEMU runs")
    }

    /// Lets the guest go.
    pub fn cont(&mut self) {
        self.qemu().qmp("cont", json!({}));
        self.tiny.as_mut().unwrap().wait();
    }

    /// The guest's own power switch and reset button.
    pub fn tiny(&mut self) -> &mut Tiny {
        self.tiny.as_mut().unwrap()
    }

    /// Ends QEMU if it has not ended.
    pub fn ended(&mut self) {
        self.tiny = None;
        self.dir = Some(self.qemu.take().expect("QEMU was started").into_dir());
    }

    /// Waits until QEMU ends by itself.
    pub fn wait_for_exit(&mut self) {
        let status = self.qemu().wait_for_exit();
        assert!(status.success(), "{status}");
        self.ended();
    }

    /// QEMU's directory, running or not.
    pub fn path(&self, name: &str) -> PathBuf {
        let dir = self.qemu.as_ref().map(|q| q.dir.path()).or(self.dir.as_ref().map(|d| d.path()));
        dir.unwrap().join(name)
    }

    pub fn repo(&self) -> PathBuf {
        self.home.path().join("repo")
    }

    pub fn state(&self) -> PathBuf {
        self.home.path().join("state")
    }

    /// One write of the guest's, which the model follows.
    pub fn write_at(&mut self, disk: usize, offset: u64, len: u64, pattern: u8) {
        self.models[disk][offset as usize..(offset + len) as usize].fill(pattern);
        let path = format!("/machine/peripheral/{}/virtio-backend", DISKS[disk].0);
        self.qemu().qemu_io(&path, &format!("write -P {pattern:#04x} {offset} {len}"));
    }

    /// Some random writes to both disks.
    pub fn scatter(&mut self, rng: &mut Rng) {
        for disk in 0..2 {
            for _ in 0..1 + rng.below(6) {
                let size = self.models[disk].len() as u64;
                let offset = rng.below(size / 512) * 512;
                let len = ((1 + rng.below(300)) * 512).min(size - offset);
                self.write_at(disk, offset, len, rng.below(256) as u8);
            }
        }
    }

    /// Both disks flushed: QEMU keeps parts of a qcow2's tables in memory, which a kill would lose.
    pub fn flush(&mut self) {
        for (name, _, _) in DISKS {
            self.qemu().qemu_io(&format!("/machine/peripheral/{name}/virtio-backend"), "flush");
        }
    }

    /// `livebackup` with these words, on this machine's state.
    pub fn livebackup(&self, args: &[&str]) -> std::process::Output {
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(self.state()).args(args).stdin(Stdio::null());
        command.output().unwrap()
    }

    /// The same; fails the test unless it succeeds.
    pub fn ok(&self, args: &[&str]) -> Value {
        let out = self.livebackup(args);
        let (text, err) = (String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
        assert!(out.status.success(), "{args:?}: {}\n{text}\n{err}", out.status);
        match text.trim().is_empty() {
            true => Value::Null,
            false => serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}")),
        }
    }

    /// The VM as a source: its monitor.
    pub fn source(&self) -> String {
        format!("qmp:{}", self.path("qmp").display())
    }

    /// A backup at this level; the newest point is then held against the model.
    pub fn backup(&mut self, level: &str) -> Value {
        self.backup_with(level, &[])
    }

    /// As [`Side::backup`], with further options.
    pub fn backup_with(&mut self, level: &str, options: &[&str]) -> Value {
        let (source, repo) = (self.source(), self.repo());
        let args = [&["backup", &source, repo.to_str().unwrap(), "--level", level], options].concat();
        let mut out = None;
        // The service may be at work on a power-off: "try again later" is what it says then.
        wait_until("the machine to be free", || {
            out = Some(self.livebackup(&args)).filter(|out| out.status.code() != Some(4));
            out.is_some()
        });
        let out = out.unwrap();
        let text = String::from_utf8_lossy(&out.stdout);
        assert!(out.status.success(), "{args:?}: {text}\n{}", String::from_utf8_lossy(&out.stderr));
        let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        self.prove("latest");
        report
    }

    /// Restores a point and compares it with the model.
    pub fn prove(&self, point: &str) {
        let dir = self.home.path().join("restored");
        let (repo, at) = (self.repo(), format!("vm1@{point}"));
        self.ok(&["restore", repo.to_str().unwrap(), &at, dir.to_str().unwrap(), "--force"]);
        for ((name, _, _), model) in DISKS.iter().zip(&self.models) {
            let image = std::fs::read(dir.join(format!("{name}.raw"))).unwrap();
            assert_eq!(image.len(), model.len());
            let wrong = (0..image.len()).find(|at| image[*at] != model[*at]);
            assert_eq!(wrong, None, "point {point}: {name} is not what the guest wrote");
        }
    }

    /// A full backup, so that there is much to transfer, in its midst: it is held up there.
    pub fn hold_a_backup(&mut self) -> Held {
        let is_ours = |node: &String| node.contains("livebackup") && node.contains("snap");
        self.hold_a_backup_at("backup.begun", |qemu| !qemu.exports().is_empty() && qemu.nodes().iter().any(is_ours))
    }

    /// The same at another point of it, where QEMU must look so.
    pub fn hold_a_backup_at(&mut self, point: &str, mut is_there: impl FnMut(&mut Qemu) -> bool) -> Held {
        let go = self.home.path().join("go");
        let here = go.with_extension("here");
        let _ = (std::fs::remove_file(&go), std::fs::remove_file(&here));
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(self.state());
        command.args(["backup", &self.source()]).arg(self.repo()).args(["--level", "full"]);
        command.env("LIVEBACKUP_PAUSE_AT", format!("{point}={}", go.display()));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        let qemu = self.qemu();
        wait_until(&format!("the backup to be at {point}"), || here.exists() && is_there(qemu));
        Held { child, go }
    }

    /// Tracking of the disks, as `status` says.
    pub fn tracking(&self) -> Vec<Value> {
        self.ok(&["status", &self.source()])["disks"].as_array().unwrap().clone()
    }
}

/// Where its service listens.
pub fn socket(side: &Side) -> PathBuf {
    side.home.path().join("serve.sock")
}

/// A backup that is held up while it transfers, until it is let go.
pub struct Held {
    child: Child,
    go: PathBuf,
}

impl Held {
    /// Lets it go, and waits for its end.
    pub fn let_go(self) -> std::process::Output {
        std::fs::write(self.go, "").unwrap();
        self.child.wait_with_output().unwrap()
    }
}

/// What a disk of a report was read as: whole, and why; nothing where it was not.
pub fn whole(report: &Value, disk: &str) -> Option<String> {
    let all = report["disks"].as_array().unwrap_or_else(|| panic!("{report}"));
    let taken = all.iter().find(|d| d["disk"] == disk).unwrap_or_else(|| panic!("{report}"));
    taken.to_string().contains("reason").then(|| taken.to_string())
}

/// A `livebackup serve` of one VM. Killed when dropped.
pub struct Serve {
    child: Child,
    log: PathBuf,
    /// The VM, as a source.
    pub source: String,
}

impl Serve {
    /// Starts it for this machine's monitor. `options` are lines of its `[[vm]]` table.
    pub fn start(side: &Side, options: &str) -> Serve {
        Self::start_with(side, options, &[])
    }

    /// As [`Serve::start`], with variables in its environment.
    pub fn start_with(side: &Side, options: &str, environment: &[(&str, &str)]) -> Serve {
        Self::start_configured(side, "", options, environment)
    }

    /// As [`Serve::start_with`], with more lines at the configuration's head.
    pub fn start_configured(side: &Side, head: &str, options: &str, environment: &[(&str, &str)]) -> Serve {
        Self::start_for("vm1", side.home.path(), &side.path("qmp"), (head, options), environment)
    }

    /// For any VM, at this monitor; its state is `HOME/state`. Lines for the configuration's head, and for the VM's table.
    pub fn start_for(
        vm: &str,
        home: &Path,
        monitor: &Path,
        (head, options): (&str, &str),
        environment: &[(&str, &str)],
    ) -> Serve {
        let (config, socket) = (home.join("serve.toml"), home.join("serve.sock"));
        let text = format!(
            "{head}\nlisten = \"unix:{}\"\nstate = \"{}\"\n[[vm]]\nname = \"{vm}\"\nmonitor = \"qmp:{}\"\n{options}\n",
            socket.display(),
            home.join("state").display(),
            monitor.display()
        );
        std::fs::write(&config, text).unwrap();
        let log = home.join("serve.log");
        let out = std::fs::OpenOptions::new().append(true).create(true).open(&log).unwrap();
        let mut command = livebackup();
        command.args(["serve", "--config"]).arg(&config).stdin(Stdio::null());
        command.stdout(out.try_clone().unwrap()).stderr(out).envs(environment.iter().copied());
        let source = format!("unix:{}/{vm}", socket.display());
        Serve { child: command.spawn().unwrap(), log, source }
    }

    /// Waits until it has the running VM.
    pub fn wait_until_attached(&mut self, _: &Side) {
        self.wait();
    }

    /// The same, for any VM.
    pub fn wait(&mut self) {
        wait_until("the service to attach", || {
            assert!(self.child.try_wait().unwrap().is_none(), "serve ended: {}", self.log());
            let out = self.status();
            let status: Value = serde_json::from_slice(&out.stdout).unwrap_or_default();
            let state = status["state"].as_str().unwrap_or("unreachable");
            out.status.success() && !status["qemu_version"].is_null() && !state.starts_with("unreachable")
        });
    }

    fn status(&self) -> std::process::Output {
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(self.log.with_file_name("state"));
        command.args(["status", &self.source]).stdin(Stdio::null()).output().unwrap()
    }

    /// What it said.
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// SIGTERM, and waits.
    pub fn stop(mut self) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child.id() as i32), nix::sys::signal::Signal::SIGTERM)
            .unwrap();
        wait_until("the service to end", || self.child.try_wait().unwrap().is_some());
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until a fault point has killed it.
    pub fn wait_until_killed(mut self) {
        use std::os::unix::process::ExitStatusExt;
        wait_until("the service to be killed", || self.child.try_wait().unwrap().is_some());
        assert_eq!(self.child.wait().unwrap().signal(), Some(9), "{}", self.log());
    }
}

impl Drop for Serve {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("the service's own output:\n{}", self.log());
        }
    }
}
