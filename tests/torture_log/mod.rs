//! The log of several writers, and what a restore point may hold by it.
//!
//! Two disks are copied as they were at one instant, for which the machine is stopped. Each monitor tells a writer of stops in
//! order with its answers, so of each write it is known how many stops came before it; QEMU ends all writes that are under way
//! before it has stopped. A point of the k-th stop therefore holds all writes that were sent to QEMU before that stop, of all
//! writers and on both disks, and none that was sent after it.
//!
//! A monitor's write reaches a stopped machine as well, which a guest's never does, and then falls before or after the filter
//! of its disk: a point has such a write whole or not at all, and has it if it has a later one of the same disk. Writers
//! stand still once they see the stop, so there is at most one of each.
//!
//! Of overlapping writes that were under way together, either may be the later one in each block, but all points agree on
//! which.

#![allow(dead_code)]

use std::collections::HashMap;

pub const BLOCK: usize = 512;

/// One write, as its writer saw it. Steps are of a clock that all writers share.
#[derive(Clone, Copy, Debug)]
pub struct Write {
    pub writer: usize,
    pub disk: usize,
    pub offset: usize,
    pub len: usize,
    pub pattern: u8,
    /// A step before it was sent.
    pub begun: u64,
    /// A step after it was complete.
    pub done: u64,
    /// Stops of the machine before it.
    pub stops: u64,
    /// Whether the machine stood still.
    pub in_stop: bool,
}

impl Write {
    fn blocks(&self) -> std::ops::Range<usize> {
        self.offset / BLOCK..(self.offset + self.len).div_ceil(BLOCK)
    }

    /// Whether it was certainly complete before the other one began.
    fn is_before(&self, other: &Write) -> bool {
        self.stops < other.stops || self.done < other.begun
    }
}

/// By disk and block, the writes of which one is the last there; none where nobody wrote.
type Last = [Vec<Vec<usize>>; 2];

/// Points must be checked in the order in which they were made.
pub struct Model {
    /// In an order in which none is overwritten by one before it.
    writes: Vec<Write>,
    last: Last,
    /// The first of `writes` that is not in `last`.
    next: usize,
    /// What was found where several writes may be the last.
    settled: HashMap<(usize, usize, Vec<usize>), Vec<u8>>,
}

impl Model {
    /// Disks of these sizes, all zeroes, and all that was written since.
    pub fn new(sizes: [usize; 2], mut writes: Vec<Write>) -> Model {
        writes.sort_by_key(|w| (w.stops, w.begun));
        let last = sizes.map(|size| vec![vec![]; size.div_ceil(BLOCK)]);
        Model { writes, last, next: 0, settled: HashMap::new() }
    }

    /// How many blocks had several writes of which any may have been the last, in all points so far.
    pub fn disputed(&self) -> usize {
        self.settled.len()
    }

    /// Fails, with what is wrong, unless the images are of one of these stops.
    pub fn check(&mut self, images: [&[u8]; 2], stops: std::ops::RangeInclusive<u64>) -> Result<u64, String> {
        let mut wrong = format!("no stop is among {stops:?}");
        for stop in stops {
            match self.check_one(images, stop) {
                Ok(()) => return Ok(stop),
                Err(why) => wrong = why,
            }
        }
        Err(wrong)
    }

    fn check_one(&mut self, images: [&[u8]; 2], stop: u64) -> Result<(), String> {
        while self.writes.get(self.next).is_some_and(|w| w.stops < stop) {
            apply(&self.writes, &mut self.last, self.next);
            self.next += 1;
        }
        let of_stop = self.writes[self.next..].iter().take_while(|w| w.stops == stop);
        let open: Vec<_> = of_stop.enumerate().filter(|(_, w)| w.in_stop).map(|(i, _)| self.next + i).collect();
        let mut first = None;
        // All of them first, which is the rule: they come right after the stop, before the filters.
        for mask in (0..1_usize << open.len()).rev() {
            let (there, missing): (Vec<_>, Vec<_>) = (0..open.len()).partition(|i| mask >> i & 1 == 1);
            let [there, missing] = [there, missing].map(|some| some.iter().map(|i| open[*i]).collect::<Vec<_>>());
            let comes_after = |a: usize, b: usize| {
                let (a, b) = (&self.writes[a], &self.writes[b]);
                a.disk == b.disk && b.done < a.begun
            };
            if there.iter().any(|a| missing.iter().any(|b| comes_after(*a, *b))) {
                continue;
            }
            let mut last = self.last.clone();
            there.iter().for_each(|i| apply(&self.writes, &mut last, *i));
            match self.compare(images, &last) {
                Ok(settled) => {
                    self.settled.extend(settled);
                    return Ok(());
                }
                Err(why) => first = first.or(Some(format!("{why}{}", self.around(stop)))),
            }
        }
        Err(first.expect("no write in the stop is one of the cases"))
    }

    /// What was found where several writes may be the last; or where the images are not of these writes.
    #[allow(clippy::type_complexity)]
    fn compare(&self, images: [&[u8]; 2], last: &Last) -> Result<Vec<((usize, usize, Vec<usize>), Vec<u8>)>, String> {
        let (mut settled, mut wrong, mut count) = (vec![], String::new(), 0);
        for (disk, (image, last)) in images.iter().zip(last).enumerate() {
            if image.len().div_ceil(BLOCK) != last.len() {
                return Err(format!("disk {disk} has {} bytes", image.len()));
            }
            for (block, (bytes, last)) in image.chunks(BLOCK).zip(last).enumerate() {
                let is_right = match last[..] {
                    [] => is_full_of(bytes, 0),
                    [one] => is_full_of(bytes, self.writes[one].pattern),
                    _ => {
                        let key = (disk, block, last.clone());
                        let agrees = self.settled.get(&key).is_none_or(|found| found == bytes);
                        settled.push((key, bytes.to_vec()));
                        agrees && bytes.iter().all(|b| last.iter().any(|i| self.writes[*i].pattern == *b))
                    }
                };
                if !is_right {
                    count += 1;
                    if count <= 30 {
                        let at = block * BLOCK;
                        let of: Vec<_> = last.iter().map(|i| self.writes[*i]).collect();
                        wrong += &format!("disk {disk}, {at}: {}, not of {of:?}\n", bytes[0]);
                    }
                }
            }
        }
        if count == 0 { Ok(settled) } else { Err(format!("{count} blocks differ\n{wrong}")) }
    }

    /// For a failure: the writes next to a stop.
    fn around(&self, stop: u64) -> String {
        let after = self.writes[self.next..].iter().take_while(|w| w.stops == stop).count().min(12);
        let near = &self.writes[self.next.saturating_sub(12)..self.next + after];
        near.iter().fold(format!("around stop {stop}:\n"), |text, write| text + &format!("  {write:?}\n"))
    }
}

fn apply(writes: &[Write], last: &mut Last, one: usize) {
    for block in writes[one].blocks() {
        let there = &mut last[writes[one].disk][block];
        there.retain(|i| !writes[*i].is_before(&writes[one]));
        there.push(one);
    }
}

fn is_full_of(bytes: &[u8], pattern: u8) -> bool {
    *bytes == [pattern; BLOCK][..bytes.len()]
}
