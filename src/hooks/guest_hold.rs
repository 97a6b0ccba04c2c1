//! Hold in the guest: the agent starts a launcher, which detaches the database's client and returns when it is ready; a
//! second program releases it.
//!
//! ```text
//!  agent ─► launcher ──► (input; waits at a fifo, for its limit at most; farewell) ──pipe──► client ──► out, err, exit
//!              └─ returns at READY                        ▲
//!  agent ─► releaser ─────────────────────────────────────┘ ─► returns what the client said
//! ```
//!
//! * Nothing is asked of the agent between the two: while file systems are frozen it starts no program.
//! * The client has a time limit of its own in the guest: it ends when the sidecar and the agent are both gone.
//! * Its files lie in a directory of its own in the guest's `/run`, for root only, and are removed by the releaser.
//! * The scripts are for any POSIX shell with coreutils or busybox.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::hold::{Hold, Said};
use crate::agent::{AgentError, Channel, Executed};
use crate::grade::Held;

/// How often a program in the guest is asked for.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// What a script may take beyond its own limits.
const GRACE: Duration = Duration::from_secs(10);

/// $1 input, $2 farewell, $3 limit, $4 ready within, then the client.
const LAUNCHER: &str = r#"
umask 077
d=$(mktemp -d /run/livebackup-hold.XXXXXX) || exit 1
mkfifo "$d/release" || exit 1
input=$1 farewell=$2 limit=$3 within=$4
shift 4
(
  { printf '%s' "$input"
    if timeout "$limit" cat "$d/release"; then printf '%s' "$farewell"; else : >"$d/expired"; fi
  } | timeout $((limit + within + 5)) "$@" >"$d/out" 2>"$d/err"
  echo $? >"$d/exit.new"
  mv "$d/exit.new" "$d/exit"
) </dev/null >/dev/null 2>&1 &
echo "$d"
n=0
until grep -qx READY "$d/out" 2>/dev/null; do
  if [ -e "$d/exit" ]; then cat "$d/out" "$d/err" >&2; rm -rf "$d"; exit 2; fi
  n=$((n + 1))
  if [ $n -gt $((within * 10)) ]; then
    cat "$d/out" "$d/err" >&2
    timeout 2 sh -c ': >"$1"' sh "$d/release"
    exit 3
  fi
  sleep 0.1
done
"#;

/// $1 the directory.
const RELEASER: &str = r#"
d=$1
[ -d "$d" ] || exit 7
[ ! -e "$d/exit" ] || early=yes
[ "$early" ] || timeout 5 sh -c ': >"$1"' sh "$d/release"
n=0
until [ -e "$d/exit" ]; do
  n=$((n + 1))
  [ $n -le 100 ] || exit 3
  sleep 0.1
done
cat "$d/out"
cat "$d/err" >&2
code=$(cat "$d/exit")
[ ! -e "$d/expired" ] || expired=yes
rm -rf "$d"
[ "$code" = 0 ] || exit 4
[ -z "$expired" ] || exit 5
[ -z "$early" ] || exit 6
"#;

/// A hold in the guest that holds.
#[derive(Debug)]
pub struct Taken {
    hold: Hold,
    dir: String,
    held: Held,
    ready_at: Instant,
}

fn failed(hold: &Hold, why: String) -> Held {
    Held { name: hold.name.clone(), failed: Some(why), ..Held::default() }
}

fn complaints(done: &Executed) -> String {
    let text = String::from_utf8_lossy(&done.errors);
    text.split_whitespace().take(60).collect::<Vec<_>>().join(" ")
}

/// Takes a hold in the guest.
///
/// # Errors
/// What the manifest says of it: why it does not hold.
pub async fn take(agent: &mut Channel, hold: &Hold) -> Result<Taken, Held> {
    let start = Instant::now();
    let (limit, within) = (seconds(hold.limit), seconds(hold.ready_within));
    let script = &hold.script;
    let mut arguments = vec!["-c", LAUNCHER, "sh", &script.input, &script.farewell, &limit, &within];
    arguments.extend(script.run.iter().map(String::as_str));
    let done = run(agent, &arguments, hold.ready_within + GRACE).await.map_err(|why| failed(hold, why))?;
    let ready_us = start.elapsed().as_micros() as u64;
    let said = String::from_utf8_lossy(&done.output);
    match (done.exit_code, said.lines().next().filter(|d| d.starts_with("/run/livebackup-hold."))) {
        (Some(0), Some(dir)) => {
            let held = Held { name: hold.name.clone(), ready_us, ..Held::default() };
            Ok(Taken { hold: hold.clone(), dir: dir.to_owned(), held, ready_at: Instant::now() })
        }
        (code, _) => {
            let why = match code {
                Some(2) => "it ended without being ready".to_owned(),
                Some(3) => format!("it was not ready within {} s", hold.ready_within.as_secs_f32()),
                _ => "it could not be started in the guest".to_owned(),
            };
            Err(Held { ready_us, ..failed(hold, format!("{why}: {}", complaints(&done))) })
        }
    }
}

impl Taken {
    /// The name of the hold.
    pub fn name(&self) -> &str {
        &self.hold.name
    }

    /// Lets go. Says what became of the hold.
    pub async fn release(self, agent: &mut Channel) -> Held {
        let Self { hold, dir, mut held, ready_at } = self;
        let done = run(agent, &["-c", RELEASER, "sh", &dir], GRACE * 2).await;
        held.held_us = ready_at.elapsed().as_micros() as u64;
        held.failed = match done {
            Err(why) => Some(format!("{why}; it lets go by itself, {} s after its start", seconds(hold.limit))),
            Ok(done) => {
                let text = String::from_utf8_lossy(&done.output).into_owned();
                let mut failure = None;
                for line in text.lines() {
                    match hold.script.read(line) {
                        Said::Position(name, value) => drop(held.positions.insert(name, value)),
                        Said::Failure(words) => failure = Some(words),
                        Said::Ready | Said::Nothing => {}
                    }
                }
                let why = match done.exit_code {
                    Some(0) => None,
                    Some(3) => Some("it did not end within 10 s of its release"),
                    Some(5) => Some("its limit ran out before the instant was over"),
                    Some(6) => Some("it ended before it was released"),
                    Some(7) => Some("what it left in the guest is gone"),
                    _ => Some("it failed"),
                };
                why.map(|why| format!("{why}: {}", complaints(&done))).or(failure)
            }
        };
        held
    }

    /// Nobody is there to release it.
    pub fn abandon(self, why: &str) -> Held {
        let held_us = self.ready_at.elapsed().as_micros() as u64;
        let words = format!("{why}; it lets go by itself, {} s after its start", seconds(self.hold.limit));
        Held { held_us, failed: Some(words), ..self.held }
    }
}

fn seconds(time: Duration) -> String {
    time.as_secs().max(1).to_string()
}

/// Runs a shell in the guest to its end.
async fn run(agent: &mut Channel, arguments: &[&str], within: Duration) -> Result<Executed, String> {
    let deadline = Instant::now() + within;
    let words = |e: AgentError| e.to_string();
    let number = agent.execute("/bin/sh", arguments, b"").await.map_err(words)?;
    loop {
        if let Some(done) = agent.executed(number).await.map_err(words)? {
            return Ok(done);
        }
        if Instant::now() > deadline {
            return Err(format!("its program in the guest did not end within {} s", within.as_secs()));
        }
        sleep(LOOK_EVERY).await;
    }
}
