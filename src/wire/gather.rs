//! The receiving end of a [trunk](super::trunk): connections whose parts are put together to one stream again.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{Buf, Bytes};
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::frame::{FrameError, decode_control};
use super::link::LinkError;
use super::message::{Failure, Reply};
use super::reader::{Frame, FrameReader};
use super::trunk::WINDOW_PARTS;
use super::writer::FrameWriter;

/// A connection to read parts from; the writer is kept, since dropping it says that the client is gone.
pub(super) type Half = (FrameReader, Option<FrameWriter>);

/// Why there is a connection less.
#[derive(Debug)]
pub(super) enum Missed {
    /// It did not join: nobody misses it.
    Absent(Failure),
    /// It was lost when it may have joined already: then parts are missing.
    Lost(Failure),
}

type Part = (u64, Bytes);

/// The stream. Dropping it closes the connections, and gives those up that are not there yet.
pub(super) struct Gather {
    peer: String,
    lines: Vec<Arriving>,
    /// The number of the next part.
    next: u64,
    /// What is left of the one before.
    now: Bytes,
    _tasks: JoinSet<()>,
}

/// What has arrived over one connection.
struct Arriving {
    parts: mpsc::Receiver<Result<Part, LinkError>>,
    first: Option<Part>,
    ended: bool,
}

impl Gather {
    /// From a connection, and those that `more` gives when they are there. Must be called within a tokio runtime.
    pub fn new<F>(first: FrameReader, peer: &str, silence: Duration, more: impl Iterator<Item = F>) -> Self
    where
        F: Future<Output = Result<Half, Missed>> + Send + 'static,
    {
        let (mut lines, mut tasks) = (vec![], JoinSet::new());
        let mut line = || {
            let (to_stream, parts) = mpsc::channel(WINDOW_PARTS);
            lines.push(Arriving { parts, first: None, ended: false });
            to_stream
        };
        let to_stream = line();
        let peer = peer.to_owned();
        tasks.spawn(read((first, None), to_stream, peer.clone(), silence));
        for opening in more {
            let (to_stream, peer) = (line(), peer.clone());
            tasks.spawn(async move {
                match opening.await {
                    Ok(half) => read(half, to_stream, peer, silence).await,
                    Err(Missed::Absent(failure)) => tracing::warn!("one connection less for this session: {failure}"),
                    Err(Missed::Lost(failure)) => {
                        // A stream that is gone asks for no reasons.
                        let _ = to_stream.send(Err(lost(failure, peer))).await;
                    }
                }
            });
        }
        Self { peer, lines, next: 0, now: Bytes::new(), _tasks: tasks }
    }

    /// The next part, unless there are no more.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        let disorder = || LinkError::Frame { peer: self.peer.clone(), source: FrameError::Disorder };
        let mut waiting = false;
        for line in &mut self.lines {
            while line.first.is_none() && !line.ended {
                match line.parts.poll_recv(cx) {
                    // The connection is about to end in good order.
                    Poll::Ready(Some(Ok((_, bytes)))) if bytes.is_empty() => {}
                    Poll::Ready(Some(Ok(part))) => line.first = Some(part),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(io::Error::other(error))),
                    Poll::Ready(None) => line.ended = true,
                    Poll::Pending => {
                        waiting = true;
                        break;
                    }
                }
            }
            if let Some((number, bytes)) = line.first.take_if(|(number, _)| *number <= self.next) {
                if number < self.next {
                    return Poll::Ready(Err(io::Error::other(disorder())));
                }
                self.next += 1;
                return Poll::Ready(Ok(Some(bytes)));
            }
        }
        match (waiting, self.lines.iter().any(|line| line.first.is_some())) {
            (true, _) => Poll::Pending,
            (false, false) => Poll::Ready(Ok(None)),
            // Nobody can bring what is missing.
            (false, true) => Poll::Ready(Err(io::Error::other(disorder()))),
        }
    }
}

impl AsyncRead for Gather {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let me = self.get_mut();
        if me.now.is_empty() {
            match std::task::ready!(me.poll_part(cx))? {
                Some(bytes) => me.now = bytes,
                None => return Poll::Ready(Ok(())),
            }
        }
        let n = me.now.len().min(into.remaining());
        into.put_slice(&me.now[..n]);
        me.now.advance(n);
        Poll::Ready(Ok(()))
    }
}

/// Reads a connection's parts to its end, not further ahead than there is room.
async fn read(half: Half, to_stream: mpsc::Sender<Result<Part, LinkError>>, peer: String, silence: Duration) {
    let (mut reader, _writer) = half;
    let mut ended = false;
    loop {
        // While there was no room nobody listened.
        reader.resume();
        let part = match reader.next(silence).await {
            Ok(Some(Frame::Alive)) => continue,
            Ok(Some(Frame::Part(number, bytes))) if !ended => {
                ended = bytes.is_empty();
                Ok((number, bytes))
            }
            Ok(None) if ended => return,
            Ok(None) => Err(LinkError::Cut { peer: peer.clone() }),
            Ok(Some(Frame::Control(json))) => Err(told(&json, &peer)),
            Ok(Some(_)) => Err(LinkError::Frame { peer: peer.clone(), source: FrameError::Disorder }),
            Err(error) => Err(error),
        };
        let last = part.is_err();
        if to_stream.send(part).await.is_err() || last {
            return;
        }
    }
}

fn lost(failure: Failure, peer: String) -> LinkError {
    LinkError::Io { peer, source: io::Error::other(failure) }
}

/// A server's word on why it closes a connection that joined.
fn told(json: &[u8], peer: &str) -> LinkError {
    match decode_control(json) {
        Ok(Reply::Failed(failure)) => lost(failure, peer.to_owned()),
        _ => LinkError::Frame { peer: peer.to_owned(), source: FrameError::Disorder },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::{Encoded, MAX_REPLY_BYTES};
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const LONG: Duration = Duration::from_secs(60);

    /// A connection over which these frames come, then nothing more.
    async fn line(frames: Vec<Encoded>) -> FrameReader {
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| [frame.head(), frame.body()].concat()).collect();
        let (mut near, far) = tokio::io::duplex(4096);
        tokio::spawn(async move {
            let _ = near.write_all(&bytes).await;
        });
        FrameReader::new(Box::new(far), "peer".into(), MAX_REPLY_BYTES, LONG)
    }

    /// All that comes over these connections together.
    async fn read_all(lines: Vec<Vec<Encoded>>) -> io::Result<Vec<u8>> {
        let mut readers = vec![];
        for frames in lines {
            readers.push(line(frames).await);
        }
        let more = readers.split_off(1).into_iter().map(|reader| async move { Ok((reader, None)) });
        let mut stream = Gather::new(readers.remove(0), "peer", LONG, more);
        let mut bytes = vec![];
        stream.read_to_end(&mut bytes).await.map(|_| bytes)
    }

    fn part(number: u64, bytes: &[u8]) -> Encoded {
        Encoded::part(number, bytes.to_vec().into()).unwrap()
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(60) })]

        #[test]
        fn parts_come_together_however_they_were_spread(
            parts in prop::collection::vec((1usize..3000, 0usize..4, any::<bool>()), 0..200),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let mut lines = vec![vec![]; 4];
                let mut sent = vec![];
                for (number, (len, line, alive)) in parts.iter().enumerate() {
                    let bytes: Vec<u8> = (0..*len).map(|i| (i * 31 + number) as u8).collect();
                    if *alive {
                        lines[*line].push(Encoded::alive());
                    }
                    lines[*line].push(part(number as u64, &bytes));
                    sent.extend(bytes);
                }
                lines.iter_mut().for_each(|line| line.push(part(parts.len() as u64, b"")));
                assert!(read_all(lines).await.unwrap() == sent);
            });
        }
    }

    #[tokio::test]
    async fn what_does_not_fit_together_is_an_error() {
        let end = |number| part(number, b"");
        let bad = [
            // Twice, a gap, backwards, from the middle.
            vec![vec![part(0, b"a"), part(0, b"a")], vec![end(0)]],
            vec![vec![part(0, b"a"), end(3)], vec![part(2, b"b"), end(3)]],
            vec![vec![part(1, b"a"), part(0, b"b"), end(2)], vec![end(2)]],
            vec![vec![part(1, b"a"), end(2)], vec![end(2)]],
            vec![vec![part(0, b"a"), end(2)], vec![part(0, b"a"), part(1, b"b"), end(2)]],
            // A connection that ends without saying so, and one that goes on after it.
            vec![vec![part(0, b"a"), end(1)], vec![]],
            vec![vec![part(0, b"a"), end(1), part(1, b"b")], vec![end(1)]],
            // What does not belong there.
            vec![vec![part(0, b"a"), Encoded::control(&Reply::Sent, 100).unwrap()], vec![end(1)]],
            vec![vec![part(0, b"a"), end(1)], vec![Encoded::data(0, 0, vec![1].into()).unwrap()]],
        ];
        for (n, lines) in bad.into_iter().enumerate() {
            let error = read_all(lines).await.unwrap_err();
            let error: LinkError = error.downcast().unwrap();
            assert_eq!(matches!(error, LinkError::Cut { .. }), n == 5, "{n}: {error}");
        }
    }

    #[tokio::test]
    async fn a_fast_connection_waits_for_a_slow_one() {
        let (mut near, far) = tokio::io::duplex(4096);
        let (slow_near, slow) = tokio::io::duplex(4096);
        let [far, slow] = [far, slow].map(|end| FrameReader::new(Box::new(end), "peer".into(), MAX_REPLY_BYTES, LONG));
        let more = [async move { Ok((slow, None)) }].into_iter();
        let mut stream = Gather::new(far, "peer", LONG, more);
        // Part 0 is on the slow one. The other takes so many parts of those behind it, and then no more.
        let sent = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let counter = sent.clone();
        let writing = tokio::spawn(async move {
            for number in 1..300 {
                let frame = part(number, &[1; 4096]);
                near.write_all(&[frame.head(), frame.body()].concat()).await.unwrap();
                counter.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            }
            let end = part(300, b"");
            near.write_all(end.head()).await.unwrap();
        });
        let mut byte = [0];
        let waiting = tokio::time::timeout(Duration::from_millis(200), stream.read_exact(&mut byte)).await;
        assert!(waiting.is_err(), "nothing is in order yet");
        // One may be in the stream's hand, one in the reader's, one in the pipe, one half out.
        let ahead = sent.load(std::sync::atomic::Ordering::SeqCst);
        assert!(ahead <= WINDOW_PARTS + 4, "{ahead}");
        let (first, end) = (part(0, &[0; 4096]), part(300, b""));
        let mut slow_near = slow_near;
        slow_near.write_all(&[first.head(), first.body(), end.head()].concat()).await.unwrap();
        drop(slow_near);
        let mut bytes = vec![];
        stream.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes.len(), 300 * 4096);
        assert!(bytes[..4096] == [0; 4096] && bytes[4096..].iter().all(|byte| *byte == 1));
        writing.await.unwrap();
    }
}
