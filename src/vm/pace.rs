//! Pace: how fast a session reads, so that it keeps its [budget](Budget).
//!
//! ```text
//!  before the instant: how long the guest's writes take (p99)
//!  every 250 ms:       how long they took since the last look, less that = added
//!
//!    added > budget                  half the rate, down to 1 MiB/s
//!    not, four times one after another    a quarter more; free again when reading is slower than that by itself
//!    added > budget at 1 MiB/s, 12 looks more than not    let go: what costs the guest is the copying, not the reading
//!                                                          (a write of seconds is several looks)
//! ```
//!
//! A look counts when 20 writes have ended, or after a second: p99 of a few writes is the slowest of them. Latencies are
//! taken as the middle of their bins (a factor of √2), so the budget is kept to that resolution. A guest that writes
//! nothing is not hurt. Where no histogram can be had there is no latency to keep: the session says so and goes on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::{Instant, sleep_until};

use super::gauge::{Gauge, Readings};
use crate::impact::Budget;
use crate::units::{MIB, human_bytes};
use crate::wire::message::{Failure, FailureCode};

/// Between two looks at the guest's latency.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// Writes that make a look count, and looks after which it counts anyhow.
const ENOUGH_WRITES: u64 = 20;
const ENOUGH_LOOKS: u32 = 4;
/// How long the guest is watched before the instant.
const WATCH_BEFORE: Duration = Duration::from_secs(2);
/// The slowest reading.
const LOWEST: u64 = MIB;
/// Looks without harm before reading gets faster.
const CALM_LOOKS: u32 = 4;
/// As long as it takes to become faster, with a second for each look.
const LONG_NS: u64 = CALM_LOOKS as u64 * 1_000_000_000;
/// Looks over the budget at the slowest reading, less those that were not, before the fleece is let go. A calm moment does
/// not make up for more than one: a guest whose writes are over the budget in most looks is over it.
const HURT_LOOKS: u32 = 12;

/// Decides the rate of reading. Pure.
#[derive(Debug)]
struct Governor {
    budget_ns: u64,
    /// Bytes a second; absent: as fast as it goes.
    rate: Option<u64>,
    calm: u32,
    hurt: u32,
}

/// What a look leads to.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Read,
    LetGo,
}

impl Governor {
    fn new(budget_ns: u64) -> Self {
        Self { budget_ns, rate: None, calm: 0, hurt: 0 }
    }

    /// A look that counts: what was added to the guest's writes, and how fast was read meanwhile, in bytes a second.
    fn look(&mut self, added_ns: u64, read_rate: u64) -> Step {
        if added_ns > self.budget_ns {
            self.calm = 0;
            // A write that took seconds counts for the looks that saw nothing end. By those, taken for calm, reading may have
            // become faster meanwhile.
            if self.rate == Some(LOWEST) || added_ns >= LONG_NS {
                self.hurt =
                    self.hurt.saturating_add(1 + u32::try_from(added_ns / 1_000_000_000).unwrap_or(u32::MAX - 1));
            }
            self.rate = Some((self.rate.unwrap_or(read_rate).min(read_rate.max(LOWEST)) / 2).max(LOWEST));
            return if self.hurt >= HURT_LOOKS { Step::LetGo } else { Step::Read };
        }
        self.hurt = self.hurt.saturating_sub(1);
        self.calm += 1;
        if let (Some(rate), true) = (self.rate, self.calm >= CALM_LOOKS) {
            self.calm = 0;
            let limits = read_rate >= rate / 2;
            self.rate = limits.then_some(rate.saturating_add(rate / 4));
        }
        Step::Read
    }
}

/// The pace of one session.
#[derive(Debug)]
pub struct Pace {
    budget: Budget,
    /// The guest's write latency before the instant (p99), in nanoseconds, by QOM path.
    before_ns: BTreeMap<String, u64>,
    /// The rate of the moment in bytes a second; 0: as fast as it goes.
    rate: AtomicU64,
    /// The lowest that it was; 0: never limited by latency.
    slowest: AtomicU64,
    read_bytes: AtomicU64,
    /// When the next read may start. Who waits, waits holding it: one after another.
    next: Mutex<Instant>,
}

impl Pace {
    /// Takes the guest's latency before a session that has a budget for it: two seconds long.
    pub async fn prepare(budget: Budget, gauge: &Gauge, paths: &[&str]) -> Self {
        let mut before_ns = BTreeMap::new();
        if budget.max_added_write_latency_ms.is_some() {
            let then = gauge.read().await;
            tokio::time::sleep(WATCH_BEFORE).await;
            let now = gauge.read().await;
            let measured = now.iter().filter(|(path, _)| paths.contains(&path.as_str()));
            for (path, now) in measured {
                let between = then.get(path).and_then(|then| now.since(then)).unwrap_or_else(|| now.emptied());
                before_ns.insert(path.clone(), between.percentile(99).map_or(0, |bin| bin.middle_ns()));
            }
        }
        Self {
            budget,
            before_ns,
            rate: AtomicU64::new(budget.max_read_rate.unwrap_or(0)),
            slowest: AtomicU64::new(0),
            read_bytes: AtomicU64::new(0),
            next: Mutex::new(Instant::now()),
        }
    }

    /// Waits until so many bytes may be read.
    pub async fn turn(&self, bytes: u64) {
        self.read_bytes.fetch_add(bytes, Ordering::Relaxed);
        if self.rate.load(Ordering::Relaxed) == 0 {
            return;
        }
        let mut next = self.next.lock().await;
        sleep_until(*next).await;
        let rate = self.rate.load(Ordering::Relaxed);
        if rate > 0 {
            *next = (*next).max(Instant::now() - LOOK_EVERY) + Duration::from_secs_f64(bytes as f64 / rate as f64);
        }
    }

    /// Keeps the budget, until the fleece must be let go.
    pub async fn keep(&self, gauge: &Gauge) -> Failure {
        let Some(budget_ms) = self.budget.max_added_write_latency_ms.filter(|_| !self.before_ns.is_empty()) else {
            return std::future::pending().await;
        };
        let mut governor = Governor::new(u64::from(budget_ms) * 1_000_000);
        let (mut since, mut looks) = (gauge.read().await, 0);
        let (mut at, mut read) = (Instant::now(), self.read_bytes.load(Ordering::Relaxed));
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            looks += 1;
            let now = gauge.read().await;
            let (writes, added_ns) = self.added(&since, &now);
            if writes < ENOUGH_WRITES && looks < ENOUGH_LOOKS {
                continue;
            }
            let bytes = self.read_bytes.load(Ordering::Relaxed);
            let read_rate = ((bytes - read) as f64 / at.elapsed().as_secs_f64()) as u64;
            (since, looks, at, read) = (now, 0, Instant::now(), bytes);
            if governor.look(added_ns, read_rate) == Step::LetGo {
                return gave_way(added_ns, budget_ms);
            }
            self.set_rate(governor.rate);
        }
    }

    fn set_rate(&self, wanted: Option<u64>) {
        let most = self.budget.max_read_rate;
        let rate = [wanted, most].into_iter().flatten().min().unwrap_or(0);
        if self.rate.swap(rate, Ordering::Relaxed) != rate {
            tracing::debug!(rate, "the pace of reading, in bytes a second (0: free)");
        }
        if let Some(wanted) = wanted {
            let slowest = self.slowest.load(Ordering::Relaxed);
            self.slowest.store(if slowest == 0 { wanted } else { slowest.min(wanted) }, Ordering::Relaxed);
        }
    }

    /// How many writes ended between two readings, and what was added to the disk that suffers most.
    fn added(&self, since: &Readings, now: &Readings) -> (u64, u64) {
        let (mut writes, mut worst) = (0, 0);
        for (path, before_ns) in &self.before_ns {
            let between = since.get(path).zip(now.get(path)).and_then(|(since, now)| now.since(since));
            let Some(between) = between else { continue };
            writes += between.count();
            let p99_ns = between.percentile(99).filter(|_| between.count() > 0).map_or(0, |bin| bin.middle_ns());
            worst = worst.max(p99_ns.saturating_sub(*before_ns));
        }
        (writes, worst)
    }

    /// What the report has to say of it.
    pub fn warnings(&self) -> Vec<String> {
        let mut said = vec![];
        if self.budget.max_added_write_latency_ms.is_some() && self.before_ns.is_empty() {
            said.push("the guest's write latency cannot be measured here: its budget was not watched".to_owned());
        }
        match self.slowest.load(Ordering::Relaxed) {
            0 => {}
            rate => said.push(format!(
                "reading was held down to {}/s for a while, to keep the guest's writes within their budget",
                human_bytes(rate)
            )),
        }
        said
    }
}

fn gave_way(added_ns: u64, budget_ms: u32) -> Failure {
    Failure::new(
        FailureCode::GaveWay,
        format!(
            "the backup gave way to the guest: its writes took {:.1} ms longer than before (p99) although the backup read no more \
             than {}/s; the budget is {budget_ms} ms. What was stored is used by the next backup: run it at a quieter time, put \
             --scratch on a faster file system, or allow more with max_added_write_latency_ms",
            added_ns as f64 / 1e6,
            human_bytes(LOWEST)
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BUDGET_NS: u64 = 5_000_000;

    #[test]
    fn reading_slows_down_while_it_hurts_and_recovers() {
        let mut governor = Governor::new(BUDGET_NS);
        assert_eq!(governor.look(0, 800 * MIB), Step::Read);
        assert_eq!(governor.rate, None);
        for rate in [400, 200, 100] {
            assert_eq!(governor.look(BUDGET_NS + 1, rate * 2 * MIB), Step::Read);
            assert_eq!(governor.rate, Some(rate * MIB));
        }
        for _ in 0..CALM_LOOKS {
            governor.look(BUDGET_NS, 100 * MIB);
        }
        assert_eq!(governor.rate, Some(125 * MIB));
        // The client is slower than that: there is nothing to hold down.
        for _ in 0..CALM_LOOKS {
            governor.look(0, 10 * MIB);
        }
        assert_eq!(governor.rate, None);
    }

    #[test]
    fn a_guest_that_suffers_without_reading_is_let_go() {
        let mut governor = Governor::new(BUDGET_NS);
        let steps: Vec<_> = (0..100).map(|_| governor.look(BUDGET_NS * 2, governor.rate.unwrap_or(64 * MIB))).collect();
        let ended = steps.iter().position(|step| *step == Step::LetGo);
        assert_eq!(ended, Some(6 + HURT_LOOKS as usize - 1), "64 MiB/s are halved six times to {LOWEST}");
    }

    #[test]
    fn a_calm_look_now_and_then_does_not_keep_the_fleece() {
        let mut governor = Governor::new(BUDGET_NS);
        let looks = |hurt: usize| (0..300).map(move |look| if look % 3 < hurt { BUDGET_NS * 2 } else { 0 });
        assert!(looks(2).any(|added| governor.look(added, LOWEST) == Step::LetGo), "two of three");
        let mut governor = Governor::new(BUDGET_NS);
        assert!(looks(1).all(|added| governor.look(added, LOWEST) == Step::Read), "one of three");
    }

    #[test]
    fn a_guest_that_stands_still_is_hurt() {
        let mut governor = Governor::new(BUDGET_NS);
        // Nothing ends for five seconds, time and again.
        let looks = (0..100).map(|look| if look % 5 == 4 { 5_000_000_000 } else { 0 });
        let ended = looks.map(|added| governor.look(added, 64 * MIB)).position(|step| step == Step::LetGo);
        assert!(ended.is_some_and(|look| look < 50), "{ended:?}");
    }

    proptest! {
        #[test]
        fn the_rate_stays_in_bounds(looks in prop::collection::vec((0u64..20_000_000, any::<u64>()), 0..200)) {
            let mut governor = Governor::new(BUDGET_NS);
            for (added_ns, read_rate) in looks {
                let step = governor.look(added_ns, read_rate);
                prop_assert!(governor.rate.is_none_or(|rate| rate >= LOWEST));
                prop_assert!(step == Step::Read || added_ns > BUDGET_NS);
            }
        }
    }
}
