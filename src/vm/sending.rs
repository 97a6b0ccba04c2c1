//! Sending: the disks of an open fleece to a client, over one line after the other where the session can be resumed.
//!
//! ```text
//!            ┌──── the client came back: needed − what it has − what it acknowledged ────┐
//!            ▼                                                                           │
//!  disk 0, disk 1, … ─► Sent ─┬─ cannot be resumed ─► done                               │
//!            │                └─ waits ─► Received ─► done                               │
//!            ╰─────────────────────╯── the line closed ─► lost ──────────────────────────┘
//!                                                          └── nobody can come back any more ─► the client left
//! ```
//!
//! A line is lost when its other end is dropped. How long a client may stay away is its holder's business, who has the
//! other end of the words: when that goes, the session ends.
//!
//! Acknowledgements are taken before words, and nobody gives any between losing a line and asking for the next: what is sent
//! again was not discarded, and will not be before the client has it.

use std::borrow::Cow;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Vm;
use super::compare::Expected;
use super::discards::Discards;
use super::transfer::{self, ReadyDisk, left};
use crate::checkpoint::Bitmap;
use crate::extent::Extent;
use crate::wire::message::{Ack, Event, Failure, FailureCode, Totals};
use crate::wire::resume::{Line, Word};

/// Events that wait for the client in this process.
const EVENTS_WAITING: usize = 4;
/// Batches of digests that wait for the reader: with the one that it looks at, 2.5 GiB of a disk in chunks of 128 KiB.
const DIGESTS_WAITING: usize = 4;

/// How long what is acknowledged waits for its neighbours.
const NEIGHBOURS_WITHIN: Duration = Duration::from_millis(50);

/// What comes from the client, and from who holds the session for it, if somebody does.
pub type FromClient = (mpsc::UnboundedReceiver<Ack>, Option<mpsc::UnboundedReceiver<Word>>);

/// The sidecar's end of a line.
pub struct Outlet {
    events: mpsc::Sender<Result<Event, Failure>>,
    expected: Expected,
    scans: bool,
}

impl Outlet {
    /// A line; with digests if a disk is scanned.
    pub fn open(scans: bool) -> (Self, Line) {
        let (events, event_queue) = mpsc::channel(EVENTS_WAITING);
        let (digests, digest_queue) = scans.then(|| mpsc::channel(DIGESTS_WAITING)).unzip();
        (Self { events, expected: Expected::new(digest_queue), scans }, Line { events: event_queue, digests })
    }

    /// Tells how it ended.
    pub async fn last(self, last: Result<Event, Failure>) {
        // Whoever has left does not care.
        let _ = self.events.send(last).await;
    }
}

/// A word, with what was acknowledged before it.
pub type Heard = (Word, Vec<Bitmap>);

/// Discards what is acknowledged, and passes words on. Never returns.
///
/// Who speaks is heard between two discards: a large disk's zeroes are many, and the last word must not wait for them.
pub async fn listen(disks: &[ReadyDisk], (mut acks, words): FromClient, to_sending: mpsc::Sender<Heard>) {
    let mut discards = Discards::new(disks.iter().map(|disk| &disk.needed).collect());
    // Dropped with the last word.
    let mut words = words.map(|words| (words, to_sending));
    let mut acknowledges = true;
    loop {
        let word = tokio::select! {
            biased;
            ack = acks.recv(), if acknowledges => {
                match ack {
                    Some(ack) => discards.acknowledge(ack.disk.into(), &ack.extents),
                    None => acknowledges = false,
                }
                continue;
            }
            word = next(&mut words) => word,
            () = std::future::ready(()), if discards.is_ready() => {
                if let Some((disk, extent)) = discards.next() {
                    disks[disk].discard(extent).await;
                }
                continue;
            }
            () = tokio::time::sleep(NEIGHBOURS_WITHIN), if discards.is_open() => {
                discards.close();
                continue;
            }
        };
        match (word, &words) {
            (Some(word), Some((_, to_sending))) => {
                let _ = to_sending.send((word, discards.acknowledged().to_vec())).await;
            }
            _ => words = None,
        }
    }
}

/// The next word; `None` once, when there will be none any more.
async fn next(words: &mut Option<(mpsc::UnboundedReceiver<Word>, mpsc::Sender<Heard>)>) -> Option<Word> {
    match words {
        Some((words, _)) => words.recv().await,
        None => std::future::pending().await,
    }
}

enum Step {
    Sent(Result<(), Failure>),
    Heard(Option<Heard>),
    Lost,
}

impl Vm {
    /// Sends all disks, until the client has them. Closing `heard` says that the session cannot be resumed any more.
    pub(super) async fn send_all(
        &self,
        disks: &[ReadyDisk],
        outlet: &mut Outlet,
        mut heard: mpsc::Receiver<Heard>,
        totals: &mut Totals,
    ) -> Result<(), Failure> {
        let mut rest: Vec<Cow<'_, Bitmap>> = disks.iter().map(|disk| Cow::Borrowed(&disk.needed)).collect();
        let (mut resumable, mut all_sent) = (true, false);
        loop {
            let step = {
                let Outlet { events, expected, .. } = &mut *outlet;
                let closed = events.clone();
                let sending = async {
                    if all_sent {
                        std::future::pending::<()>().await;
                    }
                    for (i, disk) in disks.iter().enumerate() {
                        let progress = |sent: transfer::Sent| self.count(totals, sent);
                        transfer::send(disk, i as u16, &rest[i], expected, events, progress).await?;
                    }
                    // Still under watch: a client that does not take it must not keep the fleece.
                    events.send(Ok(Event::Sent)).await.map_err(|_| left())
                };
                tokio::pin!(sending);
                loop {
                    tokio::select! {
                        biased;
                        heard = heard.recv(), if resumable => match heard {
                            // What is being sent goes on: to begin anew would send some of it twice.
                            None if !all_sent && !closed.is_closed() => resumable = false,
                            heard => break Step::Heard(heard),
                        },
                        sent = &mut sending => break Step::Sent(sent),
                        () = closed.closed() => break Step::Lost,
                    }
                }
            };
            let heard = match step {
                Step::Heard(heard) => heard,
                Step::Sent(Ok(())) if !resumable => return Ok(()),
                Step::Sent(Ok(())) => {
                    all_sent = true;
                    continue;
                }
                Step::Sent(Err(failure)) if failure.code != FailureCode::Disconnected => return Err(failure),
                Step::Sent(Err(_)) | Step::Lost if !resumable => return Err(left()),
                Step::Sent(Err(_)) | Step::Lost => match heard.recv().await {
                    None => return Err(left()),
                    heard => heard,
                },
            };
            match heard {
                None if outlet.events.is_closed() => return Err(left()),
                None => return Ok(()),
                Some((Word::Received, _)) if all_sent => return Ok(()),
                Some((Word::Received, _)) => {}
                Some((Word::Resume { have, reply }, acknowledged)) => {
                    rest = left_over(disks, &have, &acknowledged);
                    all_sent = false;
                    let (fresh, line) = Outlet::open(outlet.scans);
                    *outlet = fresh;
                    let left_bytes = rest.iter().map(|rest| rest.count_bytes()).sum();
                    self.set_progress(|p| {
                        if let Some(p) = p {
                            p.sent_bytes = p.needed_bytes.saturating_sub(left_bytes);
                        }
                    });
                    tracing::info!(vm = self.name(), left_bytes, "the session goes on over another connection");
                    // Who does not take it is seen to be lost again.
                    let _ = reply.send(line);
                }
            }
        }
    }

    fn count(&self, totals: &mut Totals, sent: transfer::Sent) {
        totals.data_bytes += sent.data_bytes;
        totals.zero_bytes += sent.zero_bytes;
        totals.same_bytes += sent.same_bytes;
        self.set_progress(|p| {
            if let Some(p) = p {
                p.sent_bytes += sent.data_bytes + sent.zero_bytes + sent.same_bytes;
            }
        });
    }
}

/// What is needed and was neither acknowledged nor lies before what the client has.
fn left_over<'a>(disks: &[ReadyDisk], have: &[u64], acknowledged: &[Bitmap]) -> Vec<Cow<'a, Bitmap>> {
    let have = have.iter().copied().chain(std::iter::repeat(0));
    let each = disks.iter().zip(have).zip(acknowledged).map(|((disk, have), acknowledged)| {
        let mut rest = disk.needed.clone();
        rest.clear(Extent::between(0, have));
        acknowledged.extents().for_each(|extent| rest.clear(extent));
        Cow::Owned(rest)
    });
    each.collect()
}
