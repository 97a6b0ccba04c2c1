//! Power-off: taking the last bitmaps from a QEMU whose guest has powered off, so that tracking goes on when the virtual
//! machine is started again.
//!
//! ```text
//!  hold:  guardian owes `quit` ─► set-action shutdown=pause
//!         │ the guest powers off: QEMU stops in state `shutdown`
//!         ▼
//!  take:  a running backup ends ─► next bitmaps ─► old ones read and sealed ─► files held ─► `quit`
//!         │ QEMU exits
//!         ▼
//!  close: nobody resumed it meanwhile, the next bitmaps were empty ─► stamp ─► the log says "closed"
//! ```
//!
//! * **QEMU ends in any case**: each step has a time limit, and `quit` follows whatever became of them. If we die, the
//!   guardian owes it. A QEMU that was started to stay (`-no-shutdown`) is left to stay; its bitmaps are taken too.
//! * **A QEMU that stays** may have something else write to its disks after the bitmaps were taken (an export, a job): the
//!   files must stand at its end as they stood then.
//! * **A reset is no end**: the state is looked at before `quit`, and a guest that runs again goes on being tracked.
//! * **What cannot be taken is said**: after `quit` from elsewhere, a signal or a crash nothing can be read any more. The
//!   epoch ends then and there, with that reason.
//! * **A crash of ours** before the stamp is stored leaves an epoch that is not closed: the next QEMU begins a new one.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;
use tokio::sync::{OwnedMutexGuard, broadcast};
use tokio::time::timeout;

use super::device::{self, Held};
use super::guardian::Guardian;
use super::harvest::{self, Harvester};
use super::medium::Subject;
use super::place::not_kept;
use super::tracking::{self, Bench};
use super::undo::{self, Debt, Debts};
use super::{Vm, carry, fleece, internal, persist, qemu_failed};
use crate::checkpoint::{Closed, Log, LogError, Sealed, Stamp};
use crate::machine::Verdict;
use crate::monitor::{self, Event, MonitorError, Process};
use crate::units::{CheckpointId, EpochId, GRANULE_BYTES};
use crate::wire::message::{Failure, FailureCode};

/// How long a backup that runs at power-off may go on.
const BACKUP_WITHIN: Duration = Duration::from_secs(30);
/// How long it may take to end when it is told to.
const BACKUP_ENDS_WITHIN: Duration = Duration::from_secs(15);
/// How long taking the last bitmaps may take, all disks together.
const TAKEN_WITHIN: Duration = Duration::from_secs(10);
/// How long QEMU may take to exit after `quit`: it stores and flushes its images.
const EXITS_WITHIN: Duration = Duration::from_secs(120);
/// How long a QEMU whose monitor has closed may take to be gone.
const GONE_WITHIN: Duration = Duration::from_secs(10);
/// How often a machine is looked at whose events may have told nothing: QEMU may not have answered when they came.
const LOOK_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Backups at power-off are told with these words.
const BACKUP_TOO_LONG: &str = "the guest powered off, and the backup was not done 30 s later";

/// Backups of a machine that is ended from outside, with these.
const BACKUP_CUT_OFF: &str = "the virtual machine was told to end during the backup";

/// What becomes of a QEMU whose guest powers off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PowerOff {
    /// It ends by itself, as without us.
    #[default]
    Leave,
    /// It is kept until its last bitmaps are taken, and then ended.
    Harvest,
}

/// How a keeper parts from a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// The virtual machine runs on without us.
    LetGo,
    /// The virtual machine ends: the guest is stopped, its last bitmaps are taken, QEMU quits.
    End,
}

/// The hold on a QEMU that stays at the guest's power-off; empty where nothing was to be held.
#[derive(Debug, Default)]
pub struct Hold(Option<Guardian>);

/// The last bitmaps of a machine, taken.
struct Taken {
    disks: BTreeMap<PathBuf, TakenDisk>,
    /// Keeps backups away while QEMU is being ended.
    guard: Option<OwnedMutexGuard<()>>,
}

struct TakenDisk {
    epoch: EpochId,
    last: CheckpointId,
    held: Result<Held, String>,
    /// How the files stood when the bitmap was taken.
    stood: Result<Stamp, String>,
}

/// How QEMU came to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// By our `quit`, at once after the last bitmaps were taken.
    Ours,
    /// Later, or by somebody else.
    Others,
}

/// A disk on the way to be taken.
struct Leaving {
    index: usize,
    dir: PathBuf,
    node: String,
    size_bytes: u64,
    log: Log,
    name: String,
    old: CheckpointId,
    next: CheckpointId,
    /// Whether the image keeps the bitmap.
    kept: bool,
    subject: Subject,
    /// Granules for the fingerprint of an exclusive device.
    recent: Option<Vec<u64>>,
}

/// Whether QEMU was started to stay when the guest powers off: nobody can be asked, but its command line says.
fn was_started_to_stay(command_line: &[String]) -> bool {
    let mut stays = false;
    let mut arguments = command_line.iter();
    while let Some(argument) = arguments.next() {
        let option = argument.strip_prefix('-').map(|o| o.strip_prefix('-').unwrap_or(o));
        match option {
            Some("no-shutdown") => stays = true,
            Some("action") => {
                for part in arguments.next().map(|a| a.split(',')).into_iter().flatten() {
                    match part {
                        "shutdown=pause" => stays = true,
                        "shutdown=poweroff" => stays = false,
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    stays
}

/// Why nothing could be read, from QEMU's own event.
fn words_for(cause: Option<&str>) -> String {
    let how = match cause {
        Some("host-qmp-quit") => "QEMU was ended by `quit` from another monitor",
        Some("host-signal") => "QEMU was ended by a signal (SIGTERM, SIGINT or SIGHUP)",
        Some("host-error") => "QEMU ended on an error of its own",
        Some("guest-shutdown" | "guest-reset" | "guest-panic") => "the guest powered off, and QEMU ended at once",
        Some(_) => "QEMU ended",
        None => "QEMU was killed or crashed",
    };
    format!("{how}, so its last bitmap could not be read")
}

impl Vm {
    /// Keeps the VM until QEMU has ended, or `parting` says to part from it. At a power-off it does what
    /// [`VmOptions::power_off`](super::VmOptions) says. Must not be dropped half-way. Gives whether QEMU has ended.
    pub async fn tend(&self, hold: Hold, parting: impl Future<Output = Parting>) -> bool {
        let Hold(mut hold) = hold;
        let mut events = self.monitor().subscribe();
        let mut sessions = self.inner.sessions.subscribe();
        let (mut taken, mut why, mut cause) = (None, None, None);
        let (mut end, mut quitting) = (false, false);
        tokio::pin!(parting);
        loop {
            if taken.is_none() && (end || self.harvests() && self.is_off().await) {
                drain(&mut events, &mut cause);
                let (done, failed) = self.take(end).await;
                (taken, why) = (Some(done), failed);
                sessions.borrow_and_update();
                crate::fault::point("power.taken");
                if drain(&mut events, &mut cause) {
                    taken = None;
                    continue;
                }
                quitting = end || (hold.is_some() && self.is_off().await);
                if quitting {
                    let _ = self.monitor().raw_within(EXITS_WITHIN, "quit", json!({})).await;
                    crate::fault::point("power.quit");
                } else if let Some(taken) = &mut taken {
                    taken.guard = None;
                }
            }
            tokio::select! {
                event = events.recv() => match event {
                    Ok(event) => if resumes(&event, &mut cause) { taken = None },
                    Err(broadcast::error::RecvError::Lagged(_)) => taken = None,
                    Err(broadcast::error::RecvError::Closed) => break,
                },
                // It may be off without our having been able to see it, or to say `quit`.
                () = tokio::time::sleep(LOOK_AGAIN_AFTER), if self.harvests() && !quitting => {
                    if hold.is_some() {
                        taken = None;
                    }
                }
                // A backup of a machine that is off took a checkpoint, or broke what was taken.
                Ok(()) = sessions.changed(), if !quitting => taken = None,
                how = &mut parting, if !end && !quitting => {
                    if how == Parting::LetGo {
                        let Some(guardian) = hold else { return false };
                        match self.let_go().await {
                            Ok(false) => self.settle_hold(guardian).await,
                            // The guardian tells it, as soon as it listens.
                            Err(_) => drop(guardian),
                            Ok(true) => {
                                (hold, end, taken) = (Some(guardian), true, None);
                                continue;
                            }
                        }
                        return false;
                    }
                    (end, taken) = (true, None);
                }
            }
        }
        let words = match (why.filter(|_| taken.is_some()), quitting) {
            (Some(why), _) => why,
            (None, true) => "the virtual machine ran on after its last bitmaps were taken".to_owned(),
            (None, false) => words_for(cause.as_deref()),
        };
        let end = if quitting { End::Ours } else { End::Others };
        let gone = self.write_ends(taken, end, &words).await;
        if gone {
            Debts::new(&self.inner.place.sockets).paid(Debt::End);
            if let Some(guardian) = hold {
                self.settle_hold(guardian).await;
            }
        }
        // Else the monitor is lost and QEMU lives: the guardian pays, if nobody attaches again.
        gone
    }

    /// Pays the `quit` that a dead sidecar and its guardian left, unless this one takes it over.
    pub(super) async fn pay_quit(&self) -> Result<(), Failure> {
        let debts = Debts::new(&self.inner.place.sockets);
        let ending = debts.owed(Debt::End);
        if !ending && (self.harvests() || !debts.owed(Debt::Quit)) {
            return Ok(());
        }
        let ended = undo::let_power_off(self.monitor(), ending).await.map_err(qemu_failed)?;
        debts.paid(Debt::Quit);
        debts.paid(Debt::End);
        let words = match (ended, ending) {
            (false, _) => return Ok(()),
            (true, false) => {
                "the guest had powered off, and QEMU waited for a livebackup that was killed; it was ended now"
            }
            (true, true) => "the virtual machine was being ended by a livebackup that was killed; it was ended now",
        };
        Err(Failure::new(FailureCode::Qemu, words))
    }

    fn harvests(&self) -> bool {
        self.inner.options.power_off == PowerOff::Harvest
    }

    async fn is_off(&self) -> bool {
        monitor::run_state(self.monitor()).await.is_ok_and(|state| state == "shutdown")
    }

    /// Makes QEMU stay at power-off, if that is wanted and it would not anyhow. The debt comes first.
    ///
    /// # Errors
    /// When QEMU or the guardian refuse: it will not wait for us then.
    pub async fn hold(&self) -> Result<Hold, Failure> {
        let debts = Debts::new(&self.inner.place.sockets);
        if !self.harvests() {
            return Ok(Hold(None));
        }
        // Off already and not by our doing, or started so: somebody else wants it to stay.
        let stays = was_started_to_stay(&self.inner.machine.command_line) || self.is_off().await;
        if stays && !debts.owed(Debt::Quit) {
            return Ok(Hold(None));
        }
        let failed = |e: std::io::Error| internal(format!("cannot start the guardian: {e}"));
        let mut guardian = Guardian::spawn(self.monitor().address()).map_err(failed)?;
        debts.owe_with(Debt::Quit, &guardian.token()).map_err(internal)?;
        guardian.owe(Debt::Quit, &debts.path(Debt::Quit)).map_err(failed)?;
        match self.monitor().raw("set-action", json!({"shutdown": "pause"})).await {
            Err(refused) if refused.refusal().is_some() => {
                self.settle_hold(guardian).await;
                return Err(qemu_failed(refused));
            }
            // It may do so yet, and would wait for us then.
            Err(late) => {
                tracing::warn!(vm = self.inner.name, "QEMU was told to wait at power-off, and has not answered: {late}")
            }
            Ok(_) => {}
        }
        crate::fault::point("power.held");
        Ok(Hold(Some(guardian)))
    }

    /// Lets the guest of a QEMU that was started stopped go.
    pub async fn let_run(&self) -> Result<(), Failure> {
        self.monitor().raw("cont", json!({})).await.map(drop).map_err(qemu_failed)
    }

    /// Whether the guest of a QEMU that was started stopped has not been let go yet.
    pub async fn is_before_start(&self) -> bool {
        monitor::run_state(self.monitor()).await.is_ok_and(|state| state == "prelaunch")
    }

    /// Takes [`Vm::hold`] back. True when the guest has powered off at this very moment: QEMU is still there then.
    async fn let_go(&self) -> Result<bool, MonitorError> {
        let told = self.monitor().raw("set-action", json!({"shutdown": "poweroff"})).await;
        let off = match told {
            Ok(_) => monitor::run_state(self.monitor()).await.map(|state| state == "shutdown"),
            Err(error) => Err(error),
        };
        off.inspect_err(|error| {
            tracing::warn!(
                vm = self.inner.name,
                "QEMU was not told to end by itself at power-off, it is tried on: {error}"
            );
        })
    }

    /// The debt of [`Vm::hold`] is paid.
    async fn settle_hold(&self, guardian: Guardian) {
        Debts::new(&self.inner.place.sockets).paid(Debt::Quit);
        let _ = tokio::task::spawn_blocking(move || guardian.paid()).await;
    }

    /// Takes the last bitmaps, within bounds. Gives why, if none could be.
    async fn take(&self, stop: bool) -> (Taken, Option<String>) {
        let mut taken = Taken { disks: BTreeMap::new(), guard: None };
        let session = self.inner.session.clone();
        let (within, words) = if stop { (Duration::ZERO, BACKUP_CUT_OFF) } else { (BACKUP_WITHIN, BACKUP_TOO_LONG) };
        taken.guard = match timeout(within, session.clone().lock_owned()).await {
            Ok(guard) => Some(guard),
            Err(_) => {
                self.inner.give_up.send_replace(Some(words));
                timeout(BACKUP_ENDS_WITHIN, session.lock_owned()).await.ok()
            }
        };
        self.inner.give_up.send_replace(None);
        if taken.guard.is_none() {
            return (taken, Some("the backup that ran at power-off did not end".to_owned()));
        }
        let why = match timeout(TAKEN_WITHIN, self.take_disks(stop, &mut taken)).await {
            Ok(Ok(())) => None,
            Ok(Err(failure)) => Some(failure.message),
            Err(_) => Some(format!("QEMU did not give its last bitmaps within {} s", TAKEN_WITHIN.as_secs())),
        };
        if let Some(why) = &why {
            tracing::error!(vm = self.inner.name, "the last bitmaps could not be taken: {why}");
        }
        let _ = timeout(TAKEN_WITHIN, self.clean_up_now()).await;
        (taken, why)
    }

    async fn take_disks(&self, stop: bool, taken: &mut Taken) -> Result<(), Failure> {
        let monitor = self.monitor();
        let state = monitor::run_state(monitor).await.map_err(qemu_failed)?;
        if stop && state == "running" {
            Debts::new(&self.inner.place.sockets).owe(Debt::End).map_err(internal)?;
            monitor.raw("stop", json!({})).await.map_err(qemu_failed)?;
            crate::fault::point("power.stopped");
        }
        self.clean_up_now().await?;
        let mut leaving = self.leaving().await?;
        // Between the two bitmaps nothing is lost, and nothing is written: the guest stands still.
        let actions = leaving.iter().map(|d| {
            let name = self.names().since(d.next);
            json!({"type": "block-dirty-bitmap-add", "data": persist::bitmap(&d.node, &name, d.kept)})
        });
        let disable = leaving.iter().map(|d| {
            let name = self.names().since(d.old);
            json!({"type": "block-dirty-bitmap-disable", "data": {"node": d.node, "name": name}})
        });
        let actions: Vec<_> = actions.chain(disable).collect();
        if !actions.is_empty() {
            monitor.raw("transaction", json!({"actions": actions})).await.map_err(qemu_failed)?;
        }
        crate::fault::point("power.next");
        let mut harvester = Harvester::new(monitor.clone(), &self.inner.place.sockets);
        for disk in &mut leaving {
            self.take_disk(disk, &mut harvester).await?;
        }
        let nodes = monitor.raw("query-named-block-nodes", json!({"flat": true})).await.map_err(qemu_failed)?;
        for mut disk in leaving {
            let name = self.names().since(disk.next);
            if fleece::count(&nodes, &disk.node, &name) != Some(0) {
                if monitor::run_state(monitor).await.map_err(qemu_failed)? == "running" {
                    let words = "the guest ran on while its last bitmaps were taken";
                    return Err(Failure::new(FailureCode::Busy, words));
                }
                disk.log.end_epoch("something wrote to the disk after the guest had powered off").map_err(not_kept)?;
                continue;
            }
            let Some(epoch) = disk.log.epoch() else { continue };
            let (pid, subject) = (self.inner.qemu.pid, disk.subject);
            let held = carry::on_files(move || Held::new(pid, &subject, disk.recent)).await.and_then(|held| held);
            let stood = held.as_ref().map_err(Clone::clone).and_then(Held::look);
            taken.disks.insert(disk.dir, TakenDisk { epoch: epoch.id, last: disk.next, held, stood });
        }
        Ok(())
    }

    /// The disks whose epoch goes on in this QEMU.
    async fn leaving(&self) -> Result<Vec<Leaving>, Failure> {
        let (monitor, names) = (self.monitor(), self.names());
        let graph = self.graph_with_sharers().await?;
        let run_state = monitor::run_state(monitor).await.map_err(qemu_failed)?;
        let mut others: Vec<_> = graph.foreign.iter().map(ToString::to_string).collect();
        let exports = monitor.raw("query-block-exports", json!({})).await.map_err(qemu_failed)?;
        others.extend(exports.as_array().into_iter().flatten().map(|e| format!("export {} is open", e["id"])));
        if !others.is_empty() {
            let words =
                format!("something else was at work on the disks when the guest powered off: {}", others.join("; "));
            return Err(Failure::new(FailureCode::Busy, words));
        }
        let media = self.media(&graph).await;
        let bench = Bench { names, graph: &graph, qemu: &self.inner.qemu, run_state: &run_state };
        let mut found = vec![];
        // One that others may write to is among them: its epoch ends here, with that reason.
        let writable = graph.disks.iter().filter(|d| d.verdict == Verdict::Protectable && !d.disk.read_only);
        for (index, disk) in writable.map(|found| &found.disk).enumerate() {
            let dir = tracking::log_dir(&self.inner.place.disks, &disk.name)?;
            let mut log = tracking::open_log(&self.inner.place.disks, &disk.name)?;
            let (Some(old), Some(medium)) = (log.last(), media.get(&disk.name)) else { continue };
            if log.epoch().is_none_or(|e| e.qemu != self.inner.qemu) {
                continue;
            }
            if let Err(reason) = tracking::judge(&log, bench, disk, medium, None) {
                log.end_epoch(&reason).map_err(not_kept)?;
                continue;
            }
            tracking::recover(monitor, names, &graph, &disk.node, &log).await.map_err(qemu_failed)?;
            let kept = graph.bitmap(&disk.node, &names.since(old)).is_some_and(|b| b.persistent);
            found.push(Leaving {
                kept,
                name: disk.name.clone(),
                index,
                dir,
                node: disk.node.clone(),
                size_bytes: disk.size_bytes,
                log,
                old,
                next: CheckpointId::random(),
                subject: Subject::of(&graph, disk),
                recent: None,
            });
        }
        Ok(found)
    }

    /// Reads a disk's old bitmap, seals it, and removes it from QEMU.
    async fn take_disk(&self, disk: &mut Leaving, harvester: &mut Harvester) -> Result<(), Failure> {
        let (monitor, names) = (self.monitor(), self.names());
        let (helper, old) = (names.helper(disk.index), names.since(disk.old));
        harvest::add_helper_node(monitor, &helper, disk.size_bytes).await.map_err(qemu_failed)?;
        tracking::add_bitmap(monitor, &helper, "old", GRANULE_BYTES, true).await.map_err(qemu_failed)?;
        tracking::merge(monitor, (&helper, "old"), &[(&disk.node, &old)]).await.map_err(qemu_failed)?;
        let bitmap = harvester.read(&helper, "old", disk.size_bytes).await?;
        let (id, prev, number, time) = (disk.next, Some(disk.old), disk.log.next_number(), Timestamp::now());
        let log = &mut disk.log;
        let exclusive = self.inner.options.exclusive_device.has(&disk.name);
        disk.recent = tokio::task::block_in_place(|| {
            log.seal(Sealed { id, prev, number, time, bitmap: &bitmap })?;
            Ok::<_, LogError>(exclusive.then(|| device::choose(log, &bitmap)))
        })
        .map_err(not_kept)?;
        crate::fault::point("power.sealed");
        tracking::remove_bitmap(monitor, &disk.node, &old).await.map_err(qemu_failed)
    }

    /// After the monitor's end: waits for QEMU's exit, and writes down for every disk how its tracking ended. `why` is for
    /// those whose last bitmap was not taken. Gives whether QEMU has ended.
    async fn write_ends(&self, taken: Option<Taken>, end: End, why: &str) -> bool {
        let (disks, _guard) = match taken {
            Some(taken) => (taken.disks, taken.guard),
            None => (BTreeMap::new(), None),
        };
        let limit = if disks.is_empty() { GONE_WITHIN } else { EXITS_WITHIN };
        let qemu = &self.inner.qemu;
        let process = Process { pid: qemu.pid, start_time: qemu.start_time, boot_id: qemu.boot_id.clone() };
        if timeout(limit, process.ended()).await.is_err() {
            tracing::warn!(vm = self.inner.name, "the monitor is closed, but QEMU runs on");
            return false;
        }
        let _guard = match _guard {
            Some(guard) => Some(guard),
            // A session of this QEMU notices its end by itself.
            None => timeout(BACKUP_ENDS_WITHIN, self.inner.session.clone().lock_owned()).await.ok(),
        };
        if _guard.is_none() {
            return true;
        }
        crate::fault::point("power.ended");
        let (logs, qemu, why) = (self.inner.place.disks.clone(), qemu.clone(), why.to_owned());
        let name = self.inner.name.clone();
        let closing = move || {
            for entry in std::fs::read_dir(logs).into_iter().flatten().flatten() {
                let result = close_log(&entry.path(), &qemu, disks.get(&entry.path()), end, &why);
                if let Err(error) = result {
                    tracing::error!(vm = name, "the end of tracking could not be written down: {error}");
                }
            }
        };
        let _ = tokio::task::spawn_blocking(closing).await;
        true
    }
}

/// Writes down how the tracking of one disk ended. Where the image keeps our bitmap, that decides.
fn close_log(
    dir: &std::path::Path,
    qemu: &crate::checkpoint::QemuInstance,
    taken: Option<&TakenDisk>,
    end: End,
    why: &str,
) -> Result<(), LogError> {
    let mut log = Log::open(dir)?;
    let Some(epoch) = log.epoch().filter(|e| e.qemu == *qemu && e.closed.is_none()) else { return Ok(()) };
    match taken.filter(|t| t.epoch == epoch.id && t.last == epoch.last) {
        Some(taken) => {
            let closed = taken.held.as_ref().map_err(Clone::clone).and_then(Held::close);
            let closed = closed.and_then(|closed| match (end, &closed.stamp, &taken.stood) {
                // QEMU itself may write to a file's header when it closes it.
                (End::Ours, ..) => Ok(closed),
                (End::Others, Some(stamp), Ok(stood)) if stamp.difference(stood).is_none() => Ok(closed),
                (End::Others, _, Ok(_)) => {
                    Err("was changed after the guest had powered off, in the QEMU that stayed".to_owned())
                }
                (End::Others, _, Err(why)) => Err(why.clone()),
            });
            log.close_epoch(closed.unwrap_or_else(|why| Closed {
                time: Timestamp::now(),
                stamp: None,
                device: None,
                no_stamp: Some(why),
            }))
        }
        None if epoch.kept => Ok(()),
        None => log.end_epoch(why),
    }
}

/// Notes why QEMU ends; says whether the guest may run again.
fn resumes(event: &Event, cause: &mut Option<String>) -> bool {
    match event.name.as_str() {
        "SHUTDOWN" => {
            *cause = event.data["reason"].as_str().map(str::to_owned);
            false
        }
        "RESUME" => true,
        _ => false,
    }
}

/// Takes the events that are there; says whether the guest may run again.
fn drain(events: &mut broadcast::Receiver<Event>, cause: &mut Option<String>) -> bool {
    let mut resumed = false;
    loop {
        match events.try_recv() {
            Ok(event) => resumed |= resumes(&event, cause),
            Err(broadcast::error::TryRecvError::Lagged(_)) => resumed = true,
            Err(_) => return resumed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_says_whether_qemu_stays() {
        for (line, stays) in [
            ("qemu -m 64", false),
            ("qemu -no-shutdown", true),
            ("qemu --no-shutdown", true),
            ("qemu -action shutdown=pause", true),
            ("qemu -action reboot=shutdown,shutdown=pause", true),
            ("qemu -no-shutdown -action shutdown=poweroff", false),
            ("qemu -append no-shutdown", false),
            ("qemu -action", false),
        ] {
            let line: Vec<_> = line.split(' ').map(str::to_owned).collect();
            assert_eq!(was_started_to_stay(&line), stays, "{line:?}");
        }
    }
}
