//! Doctor, of the guest: its agent, which grade a backup could reach, and the holds that are configured.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::super::agent::{self, Absence};
use super::super::{Check, CheckVerdict, Vm};
use crate::agent::{AgentInfo, FreezeStatus};
use crate::grade::{Grade, Policy};
use crate::hooks::hold::{Hold, Place};
use crate::monitor;

/// What an agent needs, for QEMU and in the guest.
const OPTIONS: &str = "-device virtio-serial -chardev socket,id=qga0,path=/run/VM.qga,server=on,wait=off -device \
                       virtserialport,chardev=qga0,name=org.qemu.guest_agent.0";
const PACKAGE: &str = "the package qemu-guest-agent (of that name on Debian, Ubuntu, Fedora, RHEL and SUSE; on Windows part of \
                       virtio-win)";
const ALLOW: &str = "allow them in the guest: block-rpcs and allow-rpcs in /etc/qemu/qemu-ga.conf, BLOCK_RPCS or \
                     FILTER_RPC_ARGS in /etc/sysconfig/qemu-ga";

fn advice(absence: &Absence) -> String {
    match absence {
        Absence::NoPort => format!("start QEMU with {OPTIONS}, and install {PACKAGE} in the guest"),
        Absence::NotRunning => format!("install {PACKAGE} in the guest and start it"),
        Absence::Taken(_) => {
            "libvirt keeps it for its domains: let that program go of it, or run a second qemu-ga in the guest at a port of its \
             own, and name that port's socket (agent = \"unix:PATH\", --agent)"
                .into()
        }
        Absence::Silent(_) => "start the agent in the guest again; a guest that is very busy may need time".into(),
        Absence::Unknown(_) => "see that QEMU's monitor answers".into(),
    }
}

impl Vm {
    /// Asks the guest's agent, if no backup does.
    pub(super) async fn check_guest(&self, checks: &mut Vec<Check>) {
        use CheckVerdict::{Bad, Good, Warn};
        let quiet = &self.inner.options.quiet;
        let Ok(_guard) = self.claim() else {
            checks.push(Check::new(
                "guest agent",
                Good,
                "not asked, since a backup is running; ask again when it is over",
            ));
            return;
        };
        let running = monitor::run_state(self.monitor()).await.is_ok_and(|state| state == "running");
        let mut info = None;
        let mut why = None;
        if running {
            match agent::open(self.monitor(), quiet.agent.as_ref()).await {
                Err(absence) => why = Some((format!("{absence}"), advice(&absence))),
                Ok(mut agent) => match (agent.info().await, agent.freeze_status().await) {
                    (Ok(said), status) => info = Some((said, status.ok())),
                    (Err(e), _) => why = Some((e.to_string(), advice(&Absence::Silent(String::new())))),
                },
            }
        }
        let needed = quiet.freeze == Policy::Require;
        checks.push(match (&info, &why) {
            (Some((said, status)), _) => agent_check(said, *status),
            (None, Some((why, advice))) => {
                Check::new("guest agent", if needed { Bad } else { Warn }, format!("{why}; {advice}"))
            }
            (None, None) => Check::new("guest agent", Warn, "not asked, since the guest does not run"),
        });
        let said = info.as_ref().map(|(said, _)| said);
        let mut holds = vec![];
        for hold in &quiet.holds {
            holds.push(self.hold_check(hold, said));
        }
        let all_hold = holds.iter().all(|check| check.verdict == Good);
        let reason = match (running, quiet.freeze, said) {
            (_, Policy::Never, _) => Some("freezing the guest is switched off (freeze = \"never\")"),
            (false, ..) => Some("the guest does not run"),
            (_, _, None) => Some("no agent of the guest can be asked to freeze its file systems"),
            (_, _, Some(said)) if !can_freeze(said, &quiet.mount_points) => {
                Some("the agent does not freeze file systems, by its guest's configuration")
            }
            _ => None,
        };
        checks.push(match reason {
            Some(why) if needed => Check::new("grade", Bad, format!("no backup: {why}, which is required")),
            Some(why) => Check::new("grade", Warn, format!("{} at most: {why}", Grade::Crash.name())),
            None if quiet.holds.is_empty() => {
                let words =
                    "can be reached; a database in the guest wants a hold of its own, for the grade application";
                Check::new("grade", Good, format!("{} {words}", Grade::Filesystem.name()))
            }
            None if all_hold => Check::new("grade", Good, format!("{} can be reached", Grade::Application.name())),
            None => Check::new(
                "grade",
                Warn,
                format!("{} at most, since not every hold can hold", Grade::Filesystem.name()),
            ),
        });
        checks.append(&mut holds);
    }

    /// Whether a hold's program can be run, as far as it can be seen from here, and how it went the last time.
    fn hold_check(&self, hold: &Hold, agent: Option<&AgentInfo>) -> Check {
        use CheckVerdict::{Bad, Good, Warn};
        let program = hold.script.run.first().map(String::as_str).unwrap_or_default();
        let can = match hold.place {
            Place::Host => match find_program(program) {
                Some(path) => Ok(format!("{} can be run on this host", path.display())),
                None => {
                    Err(format!("there is no program {program} on this host: install it, or say where it is (client)"))
                }
            },
            Place::Guest => match agent {
                Some(said) if said.can("guest-exec") && said.can("guest-exec-status") => {
                    Ok("the agent starts programs in the guest".to_owned())
                }
                Some(_) => Err(format!("the agent does not execute guest-exec and guest-exec-status: {ALLOW}")),
                None => Err("the agent that is to start it in the guest cannot be asked".to_owned()),
            },
        };
        let last = self.last_held(&hold.name).map(|(time, held)| match held.failed {
            None => (true, format!("it held at {time:.0}, for {:.0} ms", held.held_us as f64 / 1e3)),
            Some(why) => (false, format!("it did not hold at {time:.0}: {why}")),
        });
        let bad = if hold.policy == Policy::Require { Bad } else { Warn };
        let verdict = match (&can, &last) {
            (Err(_), _) => bad,
            (Ok(_), Some((false, _))) => Warn,
            _ => Good,
        };
        let last = last.map_or("not tried yet by this process".to_owned(), |(_, words)| words);
        Check::new(&format!("hold {}", hold.name), verdict, format!("{}; {last}", can.unwrap_or_else(|why| why)))
    }
}

fn can_freeze(agent: &AgentInfo, mount_points: &[String]) -> bool {
    let freeze = if mount_points.is_empty() { "guest-fsfreeze-freeze" } else { "guest-fsfreeze-freeze-list" };
    [freeze, "guest-fsfreeze-thaw", "guest-fsfreeze-status"].iter().all(|command| agent.can(command))
}

fn agent_check(agent: &AgentInfo, status: Option<FreezeStatus>) -> Check {
    let wanted = [
        "guest-fsfreeze-freeze",
        "guest-fsfreeze-thaw",
        "guest-fsfreeze-status",
        "guest-exec",
        "guest-exec-status",
        "guest-fstrim",
    ];
    let lacking: Vec<_> = wanted.into_iter().filter(|command| !agent.can(command)).collect();
    let version = &agent.version;
    if status == Some(FreezeStatus::Frozen) {
        let words = format!(
            "version {version}; the guest's file systems are FROZEN now, by another program; it has to thaw them"
        );
        return Check::new("guest agent", CheckVerdict::Warn, words);
    }
    match lacking.is_empty() {
        true => {
            let words = format!("version {version}; it freezes file systems, starts programs and trims");
            Check::new("guest agent", CheckVerdict::Good, words)
        }
        false => {
            let words = format!("version {version}; it does not execute {}: {ALLOW}", lacking.join(", "));
            Check::new("guest agent", CheckVerdict::Warn, words)
        }
    }
}

/// Where a program is, as a shell would find it.
fn find_program(name: &str) -> Option<PathBuf> {
    let runs =
        |path: &Path| path.metadata().is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0);
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| runs(path));
    }
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|path| runs(path))
}
