//! Holds in the guest: the agent starts launchers, which detach the databases' clients and return when they are prepared; one
//! more program locks all of them, and one releases all of them.
//!
//! ```text
//!  agent ─► launcher ──► (prepare; waits; input; waits; farewell) ──pipe──► client ──► out, err, exit
//!              └─ returns at PREPARED        ▲        ▲     each waits at a fifo, for its limit at most
//!  agent ─► locker ──────────────────────────┘        │      ─► returns when all have said READY
//!  agent ─► releaser ─────────────────────────────────┘      ─► returns what the clients said
//! ```
//!
//! * Nothing is asked of the agent between locker and releaser: while file systems are frozen it starts no program.
//! * Between the lock and its release no program is started but by these two, which begin with what they are there for: to
//!   start one takes a guest a while.
//! * A client has time limits of its own in the guest: it ends when the sidecar and the agent are both gone.
//! * Its files lie in a directory of its own in the guest's `/run`, for root only, and are removed by the releaser.
//! * The scripts are for any POSIX shell with coreutils or busybox.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::hold::{Hold, Said};
use crate::agent::{AgentError, Channel, Executed};
use crate::grade::Held;

/// How often a program in the guest is asked for. To be asked costs the guest some time itself.
const LOOK_EVERY: Duration = Duration::from_millis(25);
/// What a script may take beyond its own limits.
const GRACE: Duration = Duration::from_secs(10);
/// What the releaser prints before what a client said, and before its complaints.
const OF: &str = "livebackup-hold";
const COMPLAINTS: &str = "livebackup-complaints";

/// $1 prepare, $2 input, $3 farewell, $4 limit, $5 ready within, then the client.
const LAUNCHER: &str = r#"
umask 077
d=$(mktemp -d /run/livebackup-hold.XXXXXX) || exit 1
mkfifo "$d/go" "$d/said" && exec 8<>"$d/go" 9<>"$d/said" || exit 1
prepare=$1 input=$2 farewell=$3 limit=$4 within=$5
shift 5
letter() { [ "$(timeout "$1" dd bs=1 count=1 <&8 2>/dev/null)" = "$2" ]; }
uptime() { read -r up rest </proc/uptime; echo "$1 $up"; }
(
  if [ -z "$prepare" ] && ! letter $((within + limit)) l; then uptime 0 >"$d/exit"; : >"$d/end"; exit; fi
  { printf '%s' "$prepare"
    if [ -z "$prepare" ] || letter $((within + limit)) l; then
      printf '%s' "$input"
      if letter "$limit" r; then printf '%s' "$farewell"; elif [ ! -e "$d/exit" ]; then : >"$d/expired"; fi
    fi
  } | {
    timeout $((2 * (limit + within) + 5)) "$@" 8<&- 9<&- 2>"$d/err"
    uptime $? >"$d/exit.new"
    mv "$d/exit.new" "$d/exit"
    printf x >&8
  } | {
    while IFS= read -r line; do
      printf '%s\n' "$line" >>"$d/out"
      case $line in PREPARED|READY) echo "$line" >&9;; esac
    done
    echo END >&9
    : >"$d/end"
    [ ! -e "$d/abandoned" ] || rm -rf "$d"
  }
) </dev/null >/dev/null 2>&1 &
echo "$d"
[ -n "$prepare" ] || exit 0
case $(timeout "$within" sh -c 'read -r said; echo "$said"' <&9) in
  PREPARED) exit 0;;
  END) cat "$d/out" "$d/err" >&2; rm -rf "$d"; exit 2;;
esac
cat "$d/out" "$d/err" >&2
: >"$d/abandoned"
printf r >&8
exit 3
"#;

/// The directories. Prints those whose clients have not become ready.
const LOCKER: &str = r#"
read -r up rest </proc/uptime
for d; do [ ! -d "$d" ] || { printf l 1<>"$d/go"; echo "$up" >"$d/locked"; }; done
for d; do
  said=END
  [ ! -d "$d" ] || read -r said <>"$d/said"
  [ "$said" = READY ] || echo "$d"
done
"#;

/// The directories. Prints of each what its client said: `livebackup-hold DIRECTORY CODE EXPIRED EARLY LOCKED ENDED`, where the
/// last two are the guest's uptime in seconds.
const RELEASER: &str = r#"
for d; do
  if [ -e "$d/exit" ]; then : >"$d/early"; elif [ -d "$d" ]; then printf r 1<>"$d/go"; fi
done
n=0
for d; do
  until [ -e "$d/end" ] || [ ! -d "$d" ] || [ $n -gt 200 ]; do n=$((n + 1)); sleep 0.05; done
done
for d; do
  code=gone ended=0 locked=0 expired=no early=no
  [ ! -d "$d" ] || code=late
  [ ! -e "$d/exit" ] || read -r code ended <"$d/exit"
  [ ! -e "$d/locked" ] || read -r locked <"$d/locked"
  [ ! -e "$d/expired" ] || expired=yes
  [ ! -e "$d/early" ] || early=yes
  echo "livebackup-hold $d $code $expired $early $locked $ended"
  cat "$d/out" 2>/dev/null
  echo
  echo livebackup-complaints
  cat "$d/err" 2>/dev/null
  echo
  [ ! -e "$d/exit" ] || rm -rf "$d"
done
"#;

/// A hold in the guest that can be locked, or holds.
#[derive(Debug)]
pub struct Taken {
    hold: Hold,
    dir: String,
    started: Instant,
    /// When the lock was asked for.
    locked: Instant,
    ready_us: u64,
}

fn failed(hold: &Hold, why: String) -> Held {
    Held { name: hold.name.clone(), failed: Some(why), ..Held::default() }
}

fn in_words(text: &str) -> String {
    text.split_whitespace().take(60).collect::<Vec<_>>().join(" ")
}

/// Prepares holds in the guest, all at once. Each comes back, or what the manifest says of it: why it does not hold.
pub async fn prepare(agent: &mut Channel, holds: &[&Hold]) -> Vec<Result<Taken, Held>> {
    let started = Instant::now();
    let mut running = vec![];
    for hold in holds {
        let (limit, within) = (seconds(hold.limit), seconds(hold.ready_within));
        let script = &hold.script;
        let mut arguments =
            vec!["-c", LAUNCHER, "sh", &script.prepare, &script.input, &script.farewell, &limit, &within];
        arguments.extend(script.run.iter().map(String::as_str));
        running.push(agent.execute("/bin/sh", &arguments, b"").await.map_err(|e| e.to_string()));
    }
    let mut prepared = vec![];
    for (hold, number) in holds.iter().zip(running) {
        let done = match number {
            Ok(number) => wait(agent, number, started + hold.ready_within + GRACE).await,
            Err(why) => Err(why),
        };
        prepared.push(done.map_err(|why| failed(hold, why)).and_then(|done| launched(hold, &done, started)));
    }
    prepared
}

fn launched(hold: &Hold, done: &Executed, started: Instant) -> Result<Taken, Held> {
    let said = String::from_utf8_lossy(&done.output);
    match (done.exit_code, said.lines().next().filter(|d| d.starts_with("/run/livebackup-hold."))) {
        (Some(0), Some(dir)) => {
            Ok(Taken { hold: (*hold).clone(), dir: dir.to_owned(), started, locked: started, ready_us: 0 })
        }
        (code, _) => {
            let why = match code {
                Some(2) => "it ended without being ready".to_owned(),
                Some(3) => format!("it was not ready within {} s", hold.ready_within.as_secs_f32()),
                _ => "it could not be started in the guest".to_owned(),
            };
            Err(failed(hold, format!("{why}: {}", in_words(&String::from_utf8_lossy(&done.errors)))))
        }
    }
}

/// Locks all that were prepared. Takes away and gives those that do not hold, which have to be released all the same.
///
/// # Errors
/// The agent did not answer, or could not run it: nothing is known of any.
pub async fn lock(agent: &mut Channel, prepared: &mut Vec<Taken>) -> Result<Vec<Taken>, String> {
    let within = prepared.iter().map(|taken| taken.hold.ready_within).max().unwrap_or_default();
    let asked = Instant::now();
    prepared.iter_mut().for_each(|taken| taken.locked = asked);
    let mut arguments = vec!["-c", LOCKER, "sh"];
    arguments.extend(prepared.iter().map(|taken| taken.dir.as_str()));
    let done = run(agent, &arguments, within + GRACE).await?;
    if done.exit_code != Some(0) {
        let complaints = in_words(&String::from_utf8_lossy(&done.errors));
        return Err(format!("it could not be locked in the guest: {complaints}"));
    }
    prepared.iter_mut().for_each(|taken| taken.ready_us = taken.started.elapsed().as_micros() as u64);
    let said = String::from_utf8_lossy(&done.output);
    Ok(prepared.extract_if(.., |taken| said.lines().any(|dir| dir == taken.dir)).collect())
}

/// Lets all go. Says what became of each.
pub async fn release(agent: &mut Channel, holds: Vec<Taken>) -> Vec<Held> {
    let mut arguments = vec!["-c", RELEASER, "sh"];
    arguments.extend(holds.iter().map(|taken| taken.dir.as_str()));
    let done = run(agent, &arguments, GRACE * 2).await;
    let text = done.as_ref().map(|done| String::from_utf8_lossy(&done.output).into_owned());
    holds.into_iter().map(|taken| taken.released(text.as_deref().map_err(|why| (*why).clone()))).collect()
}

impl Taken {
    /// The name of the hold.
    pub fn name(&self) -> &str {
        &self.hold.name
    }

    /// What became of it, by what the releaser printed.
    fn released(self, text: Result<&str, String>) -> Held {
        let mut held = Held {
            name: self.hold.name.clone(),
            ready_us: self.ready_us,
            held_us: self.locked.elapsed().as_micros() as u64,
            ..Held::default()
        };
        let text = match text {
            Ok(text) => text,
            Err(why) => return self.abandon(&why),
        };
        let head = format!("{OF} {} ", self.dir);
        let mut lines = text.lines().skip_while(|line| !line.starts_with(&head));
        let result: Vec<_> = lines.next().unwrap_or_default().split(' ').skip(2).collect();
        let mut failure = None;
        for line in lines.by_ref().take_while(|line| *line != COMPLAINTS) {
            match self.hold.script.read(line) {
                Said::Position(name, value) => drop(held.positions.insert(name, value)),
                Said::Failure(words) => failure = failure.or(Some(words)),
                Said::Prepared | Said::Ready | Said::Nothing => {}
            }
        }
        let complaints: Vec<_> = lines.take_while(|line| !line.starts_with(OF)).collect();
        let seconds = |at: usize| result.get(at).and_then(|text| text.parse::<f64>().ok()).filter(|s| *s > 0.0);
        if let Some((locked, ended)) = seconds(3).zip(seconds(4)) {
            // By the guest's own clock, which is in hundredths: what we saw of it came later.
            let seen = (ended - locked + 0.01).clamp(0.0, held.held_us as f64 / 1e6);
            held.held_us = (seen * 1e6) as u64;
        }
        let why = match result[..] {
            ["gone", ..] => Some("what it left in the guest is gone"),
            ["late", ..] => Some("it did not end within 10 s of its release"),
            [_, "yes", ..] => Some("its limit ran out before the instant was over"),
            [_, _, "yes", ..] => Some("it ended before it was released"),
            ["0", ..] => None,
            _ => Some("it failed"),
        };
        held.failed = why.map(|why| format!("{why}: {}", in_words(&complaints.join(" ")))).or(failure);
        held
    }

    /// Nobody is there to release it.
    pub fn abandon(self, why: &str) -> Held {
        let words = format!("{why}; it lets go by itself, {} s after its lock", seconds(self.hold.limit));
        let held_us = self.locked.elapsed().as_micros() as u64;
        Held { name: self.hold.name, ready_us: self.ready_us, held_us, failed: Some(words), ..Held::default() }
    }
}

fn seconds(time: Duration) -> String {
    time.as_secs().max(1).to_string()
}

/// Runs a shell in the guest to its end.
async fn run(agent: &mut Channel, arguments: &[&str], within: Duration) -> Result<Executed, String> {
    let deadline = Instant::now() + within;
    let number = agent.execute("/bin/sh", arguments, b"").await.map_err(|e: AgentError| e.to_string())?;
    wait(agent, number, deadline).await
}

async fn wait(agent: &mut Channel, number: i64, deadline: Instant) -> Result<Executed, String> {
    loop {
        if let Some(done) = agent.executed(number).await.map_err(|e| e.to_string())? {
            return Ok(done);
        }
        if Instant::now() > deadline {
            return Err("its program in the guest did not end in time".into());
        }
        sleep(LOOK_EVERY).await;
    }
}
