//! A virtual machine's lives, at random: it writes, is reset, powered off, killed, told to quit, resized, started again;
//! its disks are changed behind its back while it is off; the service beside it is killed and started again; two clients
//! back it up into repositories of their own, now and then in the midst of all that. Every restore point must equal what
//! the machine's disks held at some moment of the backup, which the test knows.
//!
//! A round is one thing that happens. `LIVEBACKUP_SEED=…` replays a run, `LIVEBACKUP_ROUNDS=…` makes it longer.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::common::side::*;
use crate::common::*;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

const ROUNDS: u64 = 45;
const GRANULE: u64 = 64 << 10;
type Models = [Vec<u8>; 2];

/// What the disks held, in short.
fn digest(models: &Models) -> u64 {
    let mut hasher = DefaultHasher::new();
    models.hash(&mut hasher);
    hasher.finish()
}

/// A restore point that was made: the client's repository, its id, what it holds.
struct Made {
    client: usize,
    point: String,
    holds: u64,
}

struct Lives {
    rng: Rng,
    side: Side,
    serve: Option<Serve>,
    /// The machine runs, and the guest has been let go.
    lives: bool,
    /// QEMU is a child of `livebackup run`, which may be dead.
    run: Option<bool>,
    made: Vec<Made>,
    /// What happened, for a failure.
    story: Vec<String>,
    counts: BTreeMap<String, u64>,
}

impl Lives {
    fn new(version: Version) -> Lives {
        let (rng, side) = (Rng::new(), Side::new(version));
        let (story, made, counts) = Default::default();
        let lives = Lives { rng, side, serve: None, lives: false, run: None, made, story, counts };
        lives.side.ok(&["init", lives.repo(1).to_str().unwrap(), "--chunk-size", "64KiB"]);
        lives
    }

    fn repo(&self, client: usize) -> std::path::PathBuf {
        self.side.home.path().join(["repo", "repo2"][client])
    }

    fn tell(&mut self, what: impl Into<String>) {
        let what = what.into();
        *self.counts.entry(what.split(':').next().unwrap().to_owned()).or_default() += 1;
        self.story.push(what);
    }

    /// One of several words.
    fn one<'a>(&mut self, of: &[&'a str]) -> &'a str {
        of[self.rng.below(of.len() as u64) as usize]
    }

    fn round(&mut self) {
        let what = match (self.lives, self.rng.below(20)) {
            (false, 0..4) => self.change_while_off(),
            (false, 4..6) => self.serve_event(),
            (false, _) => self.start(),
            (true, 0..5) => self.write(),
            (true, 5..11) => self.back_up(),
            (true, 11..14) => self.back_up_in_the_midst(),
            (true, 14..16) => self.serve_event(),
            (true, 16) => self.resize(),
            (true, 17) => self.pause(),
            (true, _) => self.end(),
        };
        self.tell(what);
    }

    fn write(&mut self) -> String {
        self.side.scatter(&mut self.rng);
        if self.rng.below(4) == 0 {
            self.side.flush();
        }
        "write".into()
    }

    /// The guest is reset, or stopped for a while.
    fn pause(&mut self) -> String {
        if self.rng.below(2) == 0 {
            self.side.tiny().reset();
            self.side.tiny().wait();
            return "reset".into();
        }
        self.side.qemu().qmp("stop", json!({}));
        self.side.scatter(&mut self.rng);
        self.side.qemu().qmp("cont", json!({}));
        "stop and cont".into()
    }

    /// A new size. A qcow2 keeps what is beyond a shrunk end in its last cluster, so it is cut at clusters.
    fn new_size(&mut self, disk: usize) -> u64 {
        let size = (4 << 20) + self.rng.below(64) * GRANULE;
        if disk == 0 { size + 512 * self.rng.below(128) } else { size }
    }

    fn resize(&mut self) -> String {
        let disk = self.rng.below(2) as usize;
        let size = self.new_size(disk);
        let resize = json!({"node-name": DISKS[disk].1, "size": size});
        if let Err(refused) = self.side.qemu().try_qmp("block_resize", resize) {
            // A service that was killed in the midst of a backup leaves its filter to the next one.
            let said = refused.to_string();
            assert!(said.contains("livebackup-") && said.contains("resize"), "{said}");
            return format!("resize is refused: {}", DISKS[disk].0);
        }
        self.side.models[disk].resize(size as usize, 0);
        format!("resize: {} to {size}", DISKS[disk].0)
    }

    /// The service is started, killed, or ended in good order.
    fn serve_event(&mut self) -> String {
        match self.serve.take() {
            Some(serve) => match self.rng.below(3) {
                0 => {
                    serve.stop();
                    "serve ends".into()
                }
                _ => {
                    serve.kill();
                    "serve is killed".into()
                }
            },
            None => {
                let options = self.one(&["shutdown = \"harvest\"", "shutdown = \"harvest\"", ""]);
                let mut serve = Serve::start(&self.side, options);
                if self.lives && self.run != Some(true) && self.rng.below(2) == 0 {
                    serve.wait_until_attached(&self.side);
                }
                self.serve = Some(serve);
                format!("serve starts: {options}")
            }
        }
    }

    fn start(&mut self) -> String {
        // A service at the same monitor might be there first, and `run` would end its QEMU again.
        let by_run = self.rng.below(3) == 0 && self.serve.is_none();
        let by = by_run.then(|| {
            let mut command = livebackup();
            command.arg("--state").arg(self.side.state()).args(["run", "--"]);
            command
        });
        self.side.start_by(by);
        self.run = by_run.then_some(true);
        // Where nobody waits, the guest may write before the service has looked.
        let waits = self.rng.below(3) > 0;
        if let (Some(serve), true, false) = (&mut self.serve, waits, by_run) {
            serve.wait_until_attached(&self.side);
        }
        if by_run {
            // It takes the disks' tracking up before it holds the guest's end.
            self.side.wait_until_tracked();
        }
        self.side.cont();
        self.lives = true;
        let how = if by_run { "by run" } else { "alone" };
        format!("start: {how}, {}", if waits { "looked at first" } else { "let go at once" })
    }

    /// The machine's end, in one of all ways.
    fn end(&mut self) -> String {
        let way = self.one(&["powers off", "powers off", "powers off", "quit", "SIGTERM", "SIGKILL", "run is killed"]);
        self.end_by(way);
        format!("end: {way}")
    }

    fn end_by(&mut self, way: &str) {
        let mut alone = false;
        match way {
            "powers off" => self.side.tiny().power_off(),
            "quit" => self.side.qemu().send_quit(),
            "SIGTERM" => self.side.qemu().signal(Signal::SIGTERM),
            "SIGKILL" => {
                alone = true;
                self.side.qemu().signal(Signal::SIGKILL);
            }
            // QEMU is left alone; its guardian lets it end at the guest's power-off.
            _ => {
                if self.run == Some(true) {
                    self.side.qemu().kill_parent();
                    self.run = Some(false);
                }
                self.side.tiny().power_off();
            }
        }
        let qemu = self.side.qemu();
        wait_until("QEMU to end", || !qemu.runs());
        if self.run == Some(true) {
            qemu.wait_for_exit();
        }
        let said = qemu.log();
        assert!(!said.contains("write failed") && !said.contains("ssertion"), "{said}");
        self.side.ended();
        (self.lives, self.run) = (false, None);
        if alone {
            // What QEMU had not written of a qcow2's tables is lost, which it may: the image says what the disk holds.
            self.look_at(1);
        }
    }

    /// Takes what an image holds for the model; QEMU's own program reads it.
    fn look_at(&mut self, disk: usize) {
        let (name, _, format) = DISKS[disk];
        let (image, raw) = (self.side.path(&format!("{name}.{format}")), self.side.path("looked.raw"));
        let mut command = Command::new(self.side.version.program("qemu-img"));
        command.args(["convert", "-f", format, "-O", "raw"]).args([&image, &raw]);
        crate::common::run(&mut command);
        self.side.models[disk] = std::fs::read(&raw).unwrap();
        std::fs::remove_file(raw).unwrap();
    }

    /// Somebody else has the disks while the machine is off.
    fn change_while_off(&mut self) -> String {
        let disk = self.rng.below(2) as usize;
        let (name, _, format) = DISKS[disk];
        let image = self.side.path(&format!("{name}.{format}"));
        match self.rng.below(4) {
            0 => {
                let size = self.new_size(disk);
                let mut command = Command::new(self.side.version.program("qemu-img"));
                command.args(["resize", "-q", "--shrink", "-f", format]).arg(&image).arg(size.to_string());
                crate::common::run(&mut command);
                self.side.models[disk].resize(size as usize, 0);
                format!("resized while off: {name} to {size}")
            }
            1 => {
                let copy = self.side.path("copy");
                std::fs::copy(&image, &copy).unwrap();
                std::fs::rename(copy, &image).unwrap();
                format!("replaced by a copy: {name}")
            }
            _ => {
                let at = self.rng.below(self.side.models[disk].len() as u64 / 512) * 512;
                let pattern = 1 + self.rng.below(255) as u8;
                if disk == 0 {
                    let file = std::fs::OpenOptions::new().write(true).open(&image).unwrap();
                    file.write_all_at(&[pattern; 512], at).unwrap();
                } else {
                    let mut command = Command::new(self.side.version.program("qemu-io"));
                    let write = format!("write -P {pattern} {at} 512");
                    crate::common::run(command.args(["-f", format, "-c", &write]).arg(&image));
                }
                self.side.models[disk][at as usize..at as usize + 512].fill(pattern);
                format!("written to while off: {name}")
            }
        }
    }

    fn level(&mut self, client: usize) -> &'static str {
        let first = !self.made.iter().any(|made| made.client == client);
        if first { "auto" } else { self.one(&["auto", "auto", "auto", "auto", "differential", "full", "copy"]) }
    }

    /// A client's backup, on its way.
    fn client(&self, client: usize, level: &str) -> Child {
        let mut command = livebackup();
        command.arg("--json").arg("--state").arg(self.side.state());
        command.args(["backup", &self.side.source()]).arg(self.repo(client)).args(["--level", level]);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    /// Nobody is in its way: it must succeed, and hold what the disks hold.
    fn back_up(&mut self) -> String {
        let client = self.rng.below(2) as usize;
        let level = self.level(client);
        self.back_up_by(client, level)
    }

    fn back_up_by(&mut self, client: usize, level: &str) -> String {
        let mut out = None;
        // A service may be at work on an end or a start.
        wait_until("the machine to be free", || {
            let done = self.client(client, level).wait_with_output().unwrap();
            out = Some(done).filter(|out| !is_not_yet(out));
            out.is_some()
        });
        let out = out.unwrap();
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        if level == "differential" && out.status.code() == Some(5) {
            // The disks have another size than in any full point.
            return format!("no differential: client {client}");
        }
        assert!(out.status.success(), "{level}: {text}\n{}", String::from_utf8_lossy(&out.stderr));
        let holds = [self.side.models.clone()];
        let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        self.prove(client, &report, &holds);
        let taken = |disk: &Value| disk["taken"].as_str().unwrap_or("?").to_owned();
        let taken: Vec<_> = report["disks"].as_array().unwrap().iter().map(taken).collect();
        for way in &taken {
            *self.counts.entry(format!("disk taken {way}")).or_default() += 1;
        }
        format!("backup: client {client} {level}, taken {}", taken.join(" and "))
    }

    /// A backup during which things happen. It may fail then; a point that it makes is right.
    fn back_up_in_the_midst(&mut self) -> String {
        let client = self.rng.below(2) as usize;
        let level = self.level(client);
        let mut holds = vec![self.side.models.clone()];
        let backup = self.client(client, level);
        std::thread::sleep(Duration::from_millis(self.rng.below(500)));
        for _ in 0..self.rng.below(8) {
            let disk = self.rng.below(2) as usize;
            let size = self.side.models[disk].len() as u64;
            let offset = self.rng.below(size / 512) * 512;
            let len = ((1 + self.rng.below(300)) * 512).min(size - offset);
            let pattern = self.rng.below(256) as u8;
            self.side.write_at(disk, offset, len, pattern);
            holds.push(self.side.models.clone());
        }
        let ways = ["powers off", "quit", "SIGTERM", "SIGKILL", "serve", "serve", "resize", "reset", "nothing"];
        let way = self.one(&ways);
        match way {
            "serve" => drop(self.serve_event()),
            "resize" => {
                let disk = self.rng.below(2) as usize;
                let size = self.new_size(disk);
                let resize = json!({"node-name": DISKS[disk].1, "size": size});
                // Refused while a filter of ours is above the node.
                if self.side.qemu().try_qmp("block_resize", resize).is_ok() {
                    self.side.models[disk].resize(size as usize, 0);
                    holds.push(self.side.models.clone());
                }
            }
            "reset" => {
                self.side.tiny().reset();
                // A guest that stands still for the instant is reset, and says so once it goes on.
                self.side.tiny().wait();
            }
            "nothing" => {}
            end => {
                self.end_by(end);
                holds.push(self.side.models.clone());
            }
        }
        let out = backup.wait_with_output().unwrap();
        let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy).concat();
        if !out.status.success() {
            let code = out.status.code();
            // The disks may have another size than in any full point.
            let is_no_differential = level == "differential" && code == Some(5);
            let may_fail = way != "nothing" && way != "reset" || is_no_differential || is_not_yet(&out);
            assert!(may_fail, "{way}: {code:?} {said}");
            assert!(code.is_some_and(|code| code < 100) && !said.trim().is_empty(), "{way}: {code:?} {said}");
            assert!(!said.contains("panicked"), "{said}");
            return format!("backup in the midst fails: client {client} {level}, {way}: {}", said.trim());
        }
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let report = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
        self.prove(client, &report, &holds);
        format!("backup in the midst succeeds: client {client} {level}, {way}")
    }

    /// Restores the point of a report: it must be one of these.
    fn prove(&mut self, client: usize, report: &Value, holds: &[Models]) {
        let point = report["point"].as_str().unwrap_or_else(|| panic!("{report}")).to_owned();
        let restored = self.restore(client, &point);
        let found = holds.contains(&restored);
        if !found {
            let differs = |disk: usize, models: &Models| {
                let (now, then) = (&restored[disk], &models[disk]);
                let wrong = now.chunks(512).zip(then.chunks(512)).enumerate().filter(|(_, (a, b))| a != b);
                let wrong: Vec<_> = wrong.map(|(block, _)| block * 512).take(20).collect();
                format!("{}: {} bytes, not {}; differs at {wrong:?}", DISKS[disk].0, now.len(), then.len())
            };
            for models in holds {
                eprintln!("against a moment of it: {}; {}", differs(0, models), differs(1, models));
            }
            panic!("point {point} of client {client} is none of {} moments\n{report}", holds.len());
        }
        self.made.push(Made { client, point, holds: digest(&restored) });
    }

    fn restore(&self, client: usize, point: &str) -> Models {
        let (dir, repo, at) = (self.side.home.path().join("restored"), self.repo(client), format!("vm1@{point}"));
        self.side.ok(&["restore", repo.to_str().unwrap(), &at, dir.to_str().unwrap(), "--force"]);
        DISKS.map(|(name, _, _)| std::fs::read(dir.join(format!("{name}.raw"))).unwrap())
    }

    /// After all: every point is there still, and nothing of ours is in QEMU but bitmaps.
    fn finish(&mut self) {
        if !self.lives {
            self.start();
        }
        for client in 0..2 {
            let what = self.back_up_by(client, "auto");
            self.tell(what);
        }
        let nodes = self.side.qemu().nodes();
        assert!(nodes.iter().all(|node| !node.contains("livebackup")), "{nodes:?}");
        assert_eq!(self.side.qemu().exports(), Vec::<String>::new());
        for Made { client, point, holds } in &self.made {
            assert_eq!(digest(&self.restore(*client, point)), *holds, "point {point} of client {client} has changed");
        }
        self.end_by("powers off");
    }
}

/// "Try again later", or a service that is about to have the machine.
fn is_not_yet(out: &Output) -> bool {
    let said = [&out.stdout[..], &out.stderr].map(String::from_utf8_lossy).concat();
    out.status.code() == Some(4) || !out.status.success() && said.contains("cannot be reached now")
}

impl Drop for Lives {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("what happened:");
            self.story.iter().enumerate().for_each(|(round, what)| eprintln!("  {round:4} {what}"));
        }
    }
}

fn lives(version: Version) {
    let rounds = std::env::var("LIVEBACKUP_ROUNDS").map_or(ROUNDS, |rounds| rounds.parse().expect("a number"));
    let mut lives = Lives::new(version);
    for _ in 0..rounds {
        lives.round();
    }
    lives.finish();
    let counts: Vec<_> = lives.counts.iter().map(|(what, n)| format!("{n} × {what}")).collect();
    println!("{rounds} rounds on {version:?}, {} points, all right: {}", lives.made.len(), counts.join(", "));
}

#[test]
fn lives_on_10() {
    lives(Version::V10);
}

#[test]
fn lives_on_7() {
    lives(Version::V7);
}
