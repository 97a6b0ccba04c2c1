//! The client's end of a session: a task that reads into [`Session::events`] and writes what [`Session::acks`] gets.
//!
//! ```text
//!               ┌──────────── back: go on from where the events are ─────────────┐
//!               ▼                                                                │
//!  begun ─► connected ──(lost, and can be resumed)──► away: tries, with pauses ──┤
//!               │                                                                └─► too late, or gone: failed
//!               ├─► End, or the server's own word: done, or failed
//!               └─► the owner takes no more events: it is said (Leave), and closed
//! ```
//!
//! The task holds no more than a few events: when nobody takes them, it stops reading, and the server stops with it.
//! Dropping the receiver of the events ends the session at the server. When the connection breaks for good, the last event
//! says why.
//!
//! Acknowledgements may be refused while events still wait: the end, or a failure, has arrived behind them. That is no
//! error of its own, the last event tells. While the connection is away they wait; those that it took with it are said again
//! ([`unheard`](super::unheard)).
//!
//! What has arrived before a connection was lost is not asked for again. Should all have arrived, and the server be gone
//! before it said the end, only its figures are missing, and the end says so.

use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, sleep, timeout};

use super::client::{Client, Door, EVENTS_WAITING, breach, closed, name, read_reply};
use super::contract::{Breach, Promise};
use super::digests::Digests;
use super::frame::{Encoded, MAX_ACK_EXTENTS, MAX_REQUEST_BYTES};
use super::link::Timing;
use super::message::{Ack, Begin, Begun, Event, Failure, FailureCode, Reply, Request, Session, Totals};
use super::reader::{Frame, FrameReader};
use super::resume::{Again, COME_BACK_AFTER, Lasting, MAX_RESUMES, Resume, Token};
use super::unheard::Unheard;
use super::writer::FrameWriter;
use crate::machine::Taken;

/// Batches of digests that wait to be written.
const DIGESTS_WAITING: usize = 4;
/// So much longer than the server's grace time a client tries to come back: the two began to count at different times.
const LONGER_THAN_GRACE: Duration = Duration::from_secs(5);

/// Starts the task of a session that was begun.
pub(super) fn start(client: Client, promise: Promise, begin: Begin, begun: Begun) -> Session {
    let (to_owner, events) = mpsc::channel(EVENTS_WAITING);
    let (acks, acks_to_send) = mpsc::unbounded_channel();
    let (digests, digests_to_send) = mpsc::channel(DIGESTS_WAITING);
    let scans = begun.disks.iter().any(|disk| matches!(disk.taken, Taken::Scan { .. }));
    let (mut lasting, mut way_back) = (None, None);
    if let (Some(grace), Some(door), Some(token)) = (client.grace, client.door.clone(), begin.resume) {
        let (again, agains) = mpsc::channel(1);
        let (over, is_over) = oneshot::channel();
        lasting = Some(Lasting::Client { again: agains, over: Some(is_over) });
        let again = scans.then_some(again);
        way_back =
            Some(WayBack { door, vm: begin.vm, token, grace, begun: begun.clone(), again, left: MAX_RESUMES, over });
    }
    let Client { reader, writer, timing, peer, .. } = client;
    let unheard = way_back.as_ref().map(|_| Unheard::default());
    // What an earlier process has said is not this one's to say again.
    let unheard = unheard.map(|mut unheard| {
        let _ = unheard.heard(client.acks_heard);
        unheard
    });
    let task =
        Task { promise, to_owner, acks: acks_to_send, unheard, digests: digests_to_send, timing, peer, way_back };
    tokio::spawn(task.run(reader, writer));
    Session { begun, events, acks, digests: scans.then_some(digests), lasting }
}

/// How to come back to a session.
struct WayBack {
    door: Door,
    vm: String,
    token: Token,
    grace: Duration,
    begun: Begun,
    /// Where digests are asked for once more, if a disk is scanned.
    again: Option<mpsc::Sender<Again>>,
    /// So many times.
    left: u32,
    /// Dropped at the end.
    #[allow(dead_code)]
    over: oneshot::Sender<()>,
}

struct Task {
    promise: Promise,
    to_owner: mpsc::Sender<Result<Event, Failure>>,
    acks: mpsc::UnboundedReceiver<Ack>,
    /// Of a session that can be resumed.
    unheard: Option<Unheard>,
    digests: mpsc::Receiver<Digests>,
    timing: Timing,
    peer: String,
    way_back: Option<WayBack>,
}

/// How a session's events ended on a connection.
enum Ended {
    /// With the last of all, or nobody takes them.
    Done,
    /// The connection is lost.
    Lost(Failure),
    /// The server said why, or broke the protocol.
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl Task {
    async fn run(mut self, mut reader: FrameReader, mut writer: FrameWriter) {
        let to_owner = self.to_owner.clone();
        let outcome = loop {
            let ended = {
                let confirm = Notify::new();
                let Self { promise, to_owner, acks, unheard, digests, timing, peer, way_back } = &mut self;
                let confirm = way_back.as_ref().map(|_| &confirm);
                tokio::select! {
                    ended = read_events(&mut reader, promise, to_owner, confirm, *timing, peer) => ended,
                    () = write_all(&mut writer, (acks, unheard), digests, confirm, *timing) => Ended::Done,
                    () = to_owner.closed() => Ended::Done,
                }
            };
            let lost = match ended {
                Ended::Done => break Ok(()),
                Ended::Failed(failure) => break Err(failure),
                Ended::Lost(failure) => failure,
            };
            // The connection closes now, not when another is open.
            drop((reader, writer));
            let back = tokio::select! {
                back = self.come_back(lost) => back,
                () = to_owner.closed() => return,
            };
            match back {
                Ok(Some(client)) => {
                    (reader, writer) = (client.reader, client.writer);
                    let again = self.unheard.as_mut().into_iter().flat_map(|unheard| unheard.heard(client.acks_heard));
                    again.for_each(|ack| push(&mut writer, &Request::Ack(ack.clone())));
                }
                Ok(None) => return,
                Err(failure) => {
                    let _ = to_owner.send(Err(failure)).await;
                    return;
                }
            }
        };
        if let (Some(back), true) = (&self.way_back, to_owner.is_closed()) {
            let leave = Request::Leave { vm: back.vm.clone(), token: back.token };
            if let Ok(frame) = Encoded::control(&leave, MAX_REQUEST_BYTES) {
                writer.push(frame);
                // To close a socket with unread bytes could throw away what was written to it. A server that does not take it
                // closes the fleece when its grace time is over.
                let leaving = async {
                    writer.close().await?;
                    reader.discard().await
                };
                let _ = timeout(self.timing.farewell, leaving).await;
            }
        }
        // The connection closes now, not when somebody takes the last event.
        drop((reader, writer));
        if let Err(failure) = outcome {
            // Nobody may be there to hear it; then the session was dropped.
            let _ = to_owner.send(Err(failure)).await;
        }
    }

    /// Comes back after the connection was lost; with nothing when all had arrived before.
    async fn come_back(&mut self, lost: Failure) -> Result<Option<Client>, Failure> {
        let Some(back) = &mut self.way_back else { return Err(lost) };
        let have = self.promise.have();
        let deadline = Instant::now() + back.grace + LONGER_THAN_GRACE;
        tracing::warn!("{lost}; connecting again, to go on from where the backup is");
        let mut pause = COME_BACK_AFTER.0;
        let mut why = lost;
        let given_up = loop {
            if back.left == 0 {
                break format!("the connection was lost {MAX_RESUMES} times");
            }
            if Instant::now() + pause >= deadline {
                break "the server could not be reached while it holds the session".to_owned();
            }
            sleep(pause).await;
            pause = (pause * 2).min(COME_BACK_AFTER.1);
            let resume = Resume { vm: back.vm.clone(), token: back.token, have: have.clone() };
            let trying = async {
                let mut client = back.door.enter().await?;
                // It may be the further connections that break, over and over.
                client.alone = back.left <= MAX_RESUMES / 2;
                client.resume(resume).await
            };
            match trying.await {
                Ok((client, begun)) if begun == back.begun => {
                    back.left -= 1;
                    self.promise.resumed();
                    if let Some(again) = &back.again {
                        let (digests, digests_to_send) = mpsc::channel(DIGESTS_WAITING);
                        self.digests = digests_to_send;
                        // An owner that has left is seen to have.
                        let _ = again.send(Again { have, digests }).await;
                    }
                    tracing::info!("connected again; the backup goes on");
                    return Ok(Some(client));
                }
                Ok(_) => return Err(breach(&self.peer, "another instant as the same session")),
                Err(failure) => match failure.code {
                    // It may still be at the old connection, or on its way up again.
                    FailureCode::Disconnected | FailureCode::Busy => why = failure,
                    FailureCode::SessionGone => break failure.message,
                    _ => return Err(failure),
                },
            }
        };
        if self.promise.is_sent() {
            let warning = format!("all had arrived, but not the session's last word and its figures: {given_up}");
            let totals = Totals { warnings: vec![warning], ..Totals::default() };
            let _ = self.to_owner.send(Ok(Event::End(totals))).await;
            return Ok(None);
        }
        Err(Failure::new(FailureCode::SessionGone, format!("the backup's connection was lost: {why}; {given_up}")))
    }
}

/// Reads until the end, a failure, or nobody takes the events. `confirm` is notified when all has arrived.
async fn read_events(
    reader: &mut FrameReader,
    promise: &mut Promise,
    events: &mpsc::Sender<Result<Event, Failure>>,
    confirm: Option<&Notify>,
    timing: Timing,
    peer: &str,
) -> Ended {
    match try_read_events(reader, promise, events, confirm, timing, peer).await {
        Ok(()) => Ended::Done,
        Err(ended) => ended,
    }
}

async fn try_read_events(
    reader: &mut FrameReader,
    promise: &mut Promise,
    events: &mpsc::Sender<Result<Event, Failure>>,
    confirm: Option<&Notify>,
    timing: Timing,
    peer: &str,
) -> Result<(), Ended> {
    let broke = |b: Breach| breach(peer, &b);
    loop {
        // While the events were full nobody listened.
        reader.resume();
        let frame = reader.next(timing.silence).await.map_err(|error| match Failure::from(error) {
            failure if failure.code == FailureCode::Disconnected => Ended::Lost(failure),
            failure => Ended::Failed(failure),
        });
        let event = match frame? {
            None => return Err(Ended::Lost(closed(peer))),
            Some(Frame::Alive) => continue,
            Some(Frame::Data(place, bytes)) => {
                promise.place(place).map_err(broke)?;
                Event::Data { disk: place.disk, offset_bytes: place.extent.offset_bytes, bytes }
            }
            Some(Frame::Packed(place, packed)) => {
                promise.packed(place, &packed).map_err(broke)?;
                Event::Packed { disk: place.disk, offset_bytes: place.extent.offset_bytes, packed }
            }
            Some(Frame::Zero(place)) => {
                promise.place(place).map_err(broke)?;
                Event::Zero { disk: place.disk, extent: place.extent }
            }
            Some(Frame::Same(place)) => {
                promise.same(place).map_err(broke)?;
                Event::Same { disk: place.disk, extent: place.extent }
            }
            Some(Frame::Digests(_)) => return Err(breach(peer, "digests, which only a client sends").into()),
            Some(Frame::Part(..)) => return Err(breach(peer, "a part where none belongs").into()),
            Some(Frame::Control(json)) => match read_reply(&json, peer)? {
                Reply::Sent => {
                    let again = promise.is_sent_again();
                    promise.sent().map_err(broke)?;
                    if let Some(confirm) = confirm {
                        confirm.notify_one();
                    }
                    if again {
                        continue;
                    }
                    Event::Sent
                }
                Reply::End(totals) => {
                    promise.end().map_err(broke)?;
                    Event::End(totals)
                }
                Reply::Failed(failure) => return Err(failure.into()),
                other => return Err(breach(peer, &format!("{} in the middle of a session", name(&other))).into()),
            },
        };
        let last = matches!(event, Event::End(_));
        if events.send(Ok(event)).await.is_err() || last {
            return Ok(());
        }
    }
}

/// Writes acknowledgements, digests, confirmations and signs of life. Never returns: what ends a session is seen by the
/// reader, which is told the reason where a failed write is only a symptom.
async fn write_all(
    writer: &mut FrameWriter,
    (acks, unheard): (&mut mpsc::UnboundedReceiver<Ack>, &mut Option<Unheard>),
    digests: &mut mpsc::Receiver<Digests>,
    confirm: Option<&Notify>,
    timing: Timing,
) {
    let (mut open, mut digesting) = (true, true);
    loop {
        // At first, what is said again.
        if let Err(error) = writer.flush().await {
            tracing::debug!(%error, "cannot acknowledge");
            std::future::pending().await
        }
        tokio::select! {
            ack = acks.recv(), if open => match ack {
                Some(ack) => {
                    push_ack(writer, unheard, ack);
                    while !writer.is_full() && let Ok(ack) = acks.try_recv() {
                        push_ack(writer, unheard, ack);
                    }
                }
                None => open = false,
            },
            batch = digests.recv(), if digesting => match batch.as_ref().map(Encoded::digests) {
                Some(Ok(frame)) => writer.push(frame),
                Some(Err(error)) => tracing::error!(%error, "digests cannot be sent"),
                None => digesting = false,
            },
            () = notified(confirm) => push(writer, &Request::Received),
            () = sleep(timing.alive_every) => writer.push(Encoded::alive()),
        }
    }
}

async fn notified(confirm: Option<&Notify>) {
    match confirm {
        Some(confirm) => confirm.notified().await,
        None => std::future::pending().await,
    }
}

fn push_ack(writer: &mut FrameWriter, unheard: &mut Option<Unheard>, ack: Ack) {
    for extents in ack.extents.chunks(MAX_ACK_EXTENTS) {
        let part = Ack { disk: ack.disk, extents: extents.to_vec() };
        push(writer, &Request::Ack(part.clone()));
        if let Some(unheard) = unheard {
            unheard.push(part);
        }
    }
}

fn push(writer: &mut FrameWriter, request: &Request) {
    match Encoded::control(request, MAX_REQUEST_BYTES) {
        Ok(frame) => writer.push(frame),
        Err(error) => tracing::error!(%error, "an acknowledgement cannot be sent"),
    }
}
