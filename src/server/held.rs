//! Held sessions: those whose clients may come back over another connection. The states are those of `wire::resume`.
//!
//! A session is known by its token, to the client that began it and for its VM. For everybody else, and once it is over, it
//! does not exist: whoever asks for it is told that it is gone, and the log tells who asked.
//!
//! Holding costs nothing that the session does not have anyway: its fleece, under the watch of the VM, and its place in the
//! queue, so there are never more than sessions may run. Giving up is dropping the words to the session: it ends with its line
//! then. A service that ends gives all of them up.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, sleep, timeout};

use super::grants::Caller;
use crate::wire::contract::Acks;
use crate::wire::message::{Ack, Begin, Begun, Failure, FailureCode, Session};
use crate::wire::resume::{Attachment, Lasting, Line, MAX_RESUMES, Resume, Token, Word, check_have};

/// How long the old connection may take to end when its client comes back over another, and a session to go on then.
const TURNS_WITHIN: Duration = Duration::from_secs(10);

/// The sessions; clones share them.
#[derive(Clone, Debug)]
pub struct Held {
    sessions: Arc<Mutex<HashMap<Token, Entry>>>,
    /// Steps with every change.
    changes: watch::Sender<u64>,
    grace: Duration,
    /// No session is longer than this.
    longest: Duration,
}

#[derive(Debug)]
struct Entry {
    identity: String,
    client: String,
    begin: Begin,
    begun: Begun,
    to_sidecar: mpsc::UnboundedSender<Ack>,
    words: mpsc::UnboundedSender<Word>,
    acks: Arc<Acks>,
    until: Instant,
    /// How often it was resumed: the connections have numbers.
    resumes: u32,
    at: At,
}

/// Where the client is.
#[derive(Debug)]
enum At {
    /// On a connection, which is told when another takes its place.
    Attached(Option<oneshot::Sender<()>>),
    /// Nobody knows.
    Lost { since: Timestamp },
}

fn gone(why: &str) -> Failure {
    let what = format!("the session that was to be resumed is gone: {why}");
    Failure::new(FailureCode::SessionGone, what)
}

impl Held {
    /// Holds lost clients' sessions for `grace`; not at all if that is nothing.
    pub fn new(grace: Duration, longest: Duration) -> Self {
        Self { sessions: Arc::default(), changes: watch::Sender::new(0), grace, longest }
    }

    /// Whether sessions are held at all.
    pub fn holds(&self) -> bool {
        !self.grace.is_zero()
    }

    fn sessions(&self) -> MutexGuard<'_, HashMap<Token, Entry>> {
        self.sessions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn changed(&self) {
        self.changes.send_modify(|step| *step = step.wrapping_add(1));
    }

    /// Since when a VM's client is lost, if it is.
    pub fn lost_since(&self, vm: &str) -> Option<Timestamp> {
        self.sessions().values().filter(|entry| entry.begin.vm == vm).find_map(|entry| match entry.at {
            At::Lost { since } => Some(since),
            At::Attached(_) => None,
        })
    }

    /// Knows a session from now on, and attaches it to the connection of who began it.
    pub fn attach(
        &self,
        caller: &Caller,
        token: Token,
        begin: Begin,
        mut session: Session,
    ) -> Result<Attachment, Failure> {
        let Some(Lasting::Sidecar(words)) = session.lasting.take() else {
            return Err(Failure::new(FailureCode::Internal, "a session that cannot be resumed was to be held"));
        };
        let entry = Entry {
            identity: caller.identity(),
            client: caller.name().to_owned(),
            acks: Arc::new(Acks::new(&begin, &session.begun)),
            begun: session.begun.clone(),
            to_sidecar: session.acks.clone(),
            words,
            until: Instant::now() + self.longest,
            resumes: 0,
            at: At::Attached(None),
            begin,
        };
        let mut sessions = self.sessions();
        if sessions.contains_key(&token) {
            return Err(Failure::new(
                FailureCode::Protocol,
                "the token of another session cannot be used for a new one",
            ));
        }
        let entry = sessions.entry(token).or_insert(entry);
        Ok(self.attachment(token, entry, Line { events: session.events, digests: session.digests }))
    }

    /// A new connection of a session, with a task that waits for how it ends.
    fn attachment(&self, token: Token, entry: &mut Entry, line: Line) -> Attachment {
        let (replace, replaced) = oneshot::channel();
        let (over, how) = oneshot::channel();
        entry.at = At::Attached(Some(replace));
        tokio::spawn(self.clone().wait(token, entry.resumes, how));
        let Line { events, digests } = line;
        let lasting = Some(Lasting::Sidecar(entry.words.clone()));
        let session = Session { begun: entry.begun.clone(), events, acks: entry.to_sidecar.clone(), digests, lasting };
        let (begin, acks, until) = (entry.begin.clone(), entry.acks.clone(), entry.until);
        Attachment { begin, session, acks, grace: self.grace, until, replaced, over }
    }

    /// Waits for the end of a connection; holds the session if it was lost.
    async fn wait(self, token: Token, resumes: u32, how: oneshot::Receiver<()>) {
        let is_over = how.await.is_ok();
        {
            let mut sessions = self.sessions();
            let Some(entry) = sessions.get_mut(&token).filter(|entry| entry.resumes == resumes) else { return };
            if is_over || entry.words.is_closed() {
                sessions.remove(&token);
                return;
            }
            entry.at = At::Lost { since: Timestamp::now() };
            let (vm, client) = (&entry.begin.vm, &entry.client);
            let seconds = self.grace.as_secs_f64();
            tracing::warn!(vm, client, "the client of a backup was lost; its point in time is held for {seconds} s");
        }
        self.changed();
        sleep(self.grace).await;
        let mut sessions = self.sessions();
        let is_lost = |entry: &&Entry| entry.resumes == resumes && matches!(entry.at, At::Lost { .. });
        let Some(entry) = sessions.get(&token).filter(is_lost) else { return };
        tracing::warn!(vm = entry.begin.vm, client = entry.client, "the client of a backup did not come back in time");
        sessions.remove(&token);
        drop(sessions);
        self.changed();
    }

    /// The session of a token, if it is the caller's.
    fn find<'a>(
        sessions: &'a mut HashMap<Token, Entry>,
        caller: &Caller,
        vm: &str,
        token: Token,
    ) -> Result<&'a mut Entry, Failure> {
        let unknown = "its time was over, it had ended, or the server was started anew since";
        match sessions.get_mut(&token) {
            Some(entry) if entry.identity == caller.identity() && entry.begin.vm == vm => Ok(entry),
            Some(entry) => {
                let (owner, theirs) = (&entry.client, &entry.begin.vm);
                tracing::error!(
                    "{} showed the token of a session of {owner} (VM {theirs:?}) for VM {vm:?}: refused; if that is not \
                     the same machine, somebody has read its token",
                    caller.name()
                );
                Err(gone(unknown))
            }
            None => {
                tracing::warn!(vm, client = caller.name(), "a session that is not there was to be resumed: refused");
                Err(gone(unknown))
            }
        }
    }

    /// Attaches a session to another connection of its client.
    pub async fn resume(&self, caller: &Caller, resume: Resume) -> Result<Attachment, Failure> {
        let Resume { vm, token, have } = resume;
        timeout(TURNS_WITHIN, self.detached(caller, &vm, token)).await.map_err(|_| {
            Failure::new(FailureCode::Busy, "the session's other connection does not end; try again in a moment")
        })??;
        let (reply, line) = oneshot::channel();
        let attach = {
            let mut sessions = self.sessions();
            let entry = Self::find(&mut sessions, caller, &vm, token)?;
            if !matches!(entry.at, At::Lost { .. }) {
                return Err(Failure::new(FailureCode::Busy, "the session goes on over another connection already"));
            }
            if entry.resumes >= MAX_RESUMES {
                sessions.remove(&token);
                return Err(gone(&format!("it was resumed {MAX_RESUMES} times, and its connection was lost again")));
            }
            let sizes = entry.begun.disks.iter().map(|disk| disk.disk.size_bytes);
            if let Err(what) = check_have(&have, entry.begin.chunk_bytes, sizes) {
                sessions.remove(&token);
                return Err(Failure::new(FailureCode::Protocol, format!("{} sent {what}", caller.name())));
            }
            entry.resumes += 1;
            entry.acks.resumed(&have);
            let told = entry.words.send(Word::Resume { have, reply });
            if told.is_err() {
                sessions.remove(&token);
                return Err(gone("it has failed, or QEMU has ended; the server's log says why"));
            }
            // Whose connection goes now is lost like any other.
            let (_, empty) = mpsc::channel(1);
            self.attachment(token, entry, Line { events: empty, digests: None })
        };
        tracing::info!(vm, client = caller.name(), "a client is back");
        let Ok(Ok(line)) = timeout(TURNS_WITHIN, line).await else {
            return Err(gone("it ended in this moment; the server's log says why"));
        };
        let session = Session { events: line.events, digests: line.digests, ..attach.session };
        Ok(Attachment { session, ..attach })
    }

    /// Waits until a session has no connection. One that it has is ended.
    async fn detached(&self, caller: &Caller, vm: &str, token: Token) -> Result<(), Failure> {
        let mut changes = self.changes.subscribe();
        loop {
            changes.borrow_and_update();
            match &mut Self::find(&mut self.sessions(), caller, vm, token)?.at {
                At::Lost { .. } => return Ok(()),
                At::Attached(replace) => {
                    if let Some(replace) = replace.take() {
                        // A connection that is ending anyway does not hear it.
                        let _ = replace.send(());
                    }
                }
            }
            // The sender lives as long as we do.
            let _ = timeout(Duration::from_secs(1), changes.changed()).await;
        }
    }

    /// Gives a session up, for its client.
    pub fn leave(&self, caller: &Caller, vm: &str, token: Token) -> Result<(), Failure> {
        let mut sessions = self.sessions();
        Self::find(&mut sessions, caller, vm, token)?;
        if let Some(Entry { at: At::Attached(Some(replace)), .. }) = sessions.remove(&token) {
            let _ = replace.send(());
        }
        drop(sessions);
        tracing::info!(vm, client = caller.name(), "a session that could be resumed was given up");
        self.changed();
        Ok(())
    }

    /// Gives all sessions up: the service ends.
    pub fn give_up(&self) {
        self.sessions().clear();
        self.changed();
    }
}
