//! The connection to QEMU's export, and the handshake under a deadline.
//!
//! blkio connects to a path, blocks without a limit, and hides its socket. So it never talks to QEMU directly: it connects to
//! a private socket of ours, and [`relay`] passes the handshake's few messages (with their descriptors) on to QEMU. That
//! gives a deadline for the handshake, a stream from anywhere (also one whose path is gone), and a socket to watch: when
//! QEMU dies or deletes the export, it hangs up. After the handshake nothing goes over it any more.
//!
//! ```text
//! blkio (reader thread) ── private socket ── relay (connecting thread) ── QEMU        handshake
//! blkio ── shared memory, eventfds ── QEMU;   reader thread polls QEMU's socket       afterwards
//! ```

use std::io::{self, IoSlice, IoSliceMut, PipeReader, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, UnixAddr, connect, getsockopt,
    recvmsg, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::stat::Mode;
use nix::sys::time::{TimeVal, TimeValLike};

/// More than any message of the handshake is long.
const MESSAGE_BYTES: usize = 4096;
/// Most descriptors that come with one message (blkio sends one).
const MESSAGE_FDS: usize = 8;

/// How the handshake's relay came to its end.
pub(super) enum RelayEnd {
    /// blkio says that it is done, well or not. Its end of the private socket, if it came so far.
    Done(Option<UnixStream>),
    /// The time is up.
    TimedOut,
    /// QEMU hung up.
    HungUp,
    /// A system call failed.
    Failed(io::Error),
}

/// Connects to `path` before `deadline`. A listener that does not accept (a stopped QEMU, or one that serves another reader)
/// takes connections until its backlog is full, and then makes them wait: `EAGAIN` when the time is up.
pub(super) fn dial(path: &Path, deadline: Instant) -> io::Result<UnixStream> {
    let address = UnixAddr::new(path)?;
    let fd = socket(AddressFamily::Unix, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    set_send_timeout(&fd, deadline)?;
    connect(fd.as_raw_fd(), &address)?;
    Ok(fd.into())
}

/// Bounds every later send (and connect) on this socket.
fn set_send_timeout(fd: &impl AsFd, deadline: Instant) -> io::Result<()> {
    let millis = i64::try_from(left(deadline).as_millis()).unwrap_or(i64::MAX).max(1);
    Ok(setsockopt(fd, sockopt::SendTimeout, &TimeVal::milliseconds(millis))?)
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

/// A listening socket that only we can reach: its path is gone as soon as it is bound.
pub(super) struct PrivateSocket {
    listener: UnixListener,
    handle: OwnedFd,
}

impl PrivateSocket {
    pub(super) fn new() -> io::Result<PrivateSocket> {
        let name = format!("livebackup-{:016x}", getrandom::u64().map_err(io::Error::other)?);
        let path = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&path)?;
        let handle = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty());
        std::fs::remove_file(&path)?;
        listener.set_nonblocking(true)?;
        Ok(PrivateSocket { listener, handle: handle? })
    }

    /// A path that leads to it while `self` lives.
    pub(super) fn path(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.handle.as_raw_fd()).into()
    }

    /// The waiting connection of this process; others (who won a race for the path) are turned away.
    fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.listener.accept() {
            Ok((stream, _)) => {
                let who = getsockopt(&stream, sockopt::PeerCredentials)?;
                Ok((who.pid() as u32 == std::process::id()).then_some(stream))
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(e) => Err(e),
        }
    }
}

/// Passes messages between the one connection to `private` and `qemu`, until `done` hangs up or the time is over. When
/// this returns, the private connection is shut unless it is returned, so blkio cannot wait for ever.
pub(super) fn relay(private: PrivateSocket, qemu: &UnixStream, done: &PipeReader, deadline: Instant) -> RelayEnd {
    let mut inner = None;
    let end = pump(&private, &mut inner, qemu, done, deadline).unwrap_or_else(RelayEnd::Failed);
    match (end, inner) {
        (RelayEnd::Done(_), inner) => RelayEnd::Done(inner),
        (end, inner) => {
            if let Some(inner) = inner {
                let _ = inner.shutdown(std::net::Shutdown::Both);
            }
            end
        }
    }
}

fn pump(
    private: &PrivateSocket,
    inner: &mut Option<UnixStream>,
    qemu: &UnixStream,
    done: &PipeReader,
    deadline: Instant,
) -> io::Result<RelayEnd> {
    set_send_timeout(qemu, deadline)?;
    loop {
        let left = left(deadline);
        if left.is_zero() {
            return Ok(RelayEnd::TimedOut);
        }
        let near = inner.as_ref().map_or(private.listener.as_fd(), |stream| stream.as_fd());
        // Until blkio is there nobody could take what QEMU says (a peer that speaks unasked is heard later).
        let far = if inner.is_some() { qemu.as_fd() } else { near };
        let [near_ready, qemu_ready, done_ready] = wait([near, far, done.as_fd()], Some(left))?;
        if done_ready {
            return Ok(RelayEnd::Done(None));
        }
        let Some(stream) = inner else {
            if near_ready {
                *inner = private.accept()?;
            }
            continue;
        };
        let (from_blkio, from_qemu) = match (near_ready, qemu_ready) {
            (true, _) => (forward(stream, qemu, true)?, Passed::On),
            (_, true) => (Passed::On, forward(qemu, stream, false)?),
            _ => continue,
        };
        match (from_blkio, from_qemu) {
            // blkio gave up; why, it says through `done`.
            (Passed::SourceEnded, _) | (_, Passed::TargetEnded) => return Ok(RelayEnd::Done(None)),
            (Passed::TargetEnded, _) | (_, Passed::SourceEnded) => return Ok(RelayEnd::HungUp),
            (Passed::On, Passed::On) => {}
        }
    }
}

/// Waits until one of them has something to say (input, or an end); which ones.
pub(super) fn wait<const N: usize>(fds: [BorrowedFd<'_>; N], timeout: Option<Duration>) -> io::Result<[bool; N]> {
    // Rounded up: a wait that ends too early by a fraction of a millisecond would spin.
    let timeout = match timeout {
        Some(t) => PollTimeout::try_from(t + Duration::from_millis(1)).unwrap_or(PollTimeout::MAX),
        None => PollTimeout::NONE,
    };
    let mut polled = fds.map(|fd| PollFd::new(fd, PollFlags::POLLIN));
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => Ok(polled.map(|fd| fd.any().unwrap_or(true))),
        Err(e) => Err(e.into()),
    }
}

/// Tells QEMU that we are leaving, and waits until it has closed its end (true) or the time is over.
pub(super) fn leave(mut qemu: &UnixStream, deadline: Instant) -> io::Result<bool> {
    let _ = qemu.shutdown(std::net::Shutdown::Write);
    loop {
        let left = left(deadline);
        if left.is_zero() {
            return Ok(false);
        }
        // What an ill-mannered peer still has to say is dropped.
        if wait([qemu.as_fd()], Some(left))? == [true] && !matches!(qemu.read(&mut [0; 512]), Ok(1..)) {
            return Ok(true);
        }
    }
}

/// What became of a message.
enum Passed {
    On,
    SourceEnded,
    TargetEnded,
}

/// Passes on what one receive brings.
fn forward(from: &UnixStream, to: &UnixStream, with_fds: bool) -> io::Result<Passed> {
    let mut data = [0; MESSAGE_BYTES];
    let mut space = cmsg_space!([std::os::fd::RawFd; MESSAGE_FDS]);
    let mut fds = Vec::new();
    let len = {
        let mut iov = [IoSliceMut::new(&mut data)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC | MsgFlags::MSG_DONTWAIT;
        // QEMU has no business sending descriptors: without room for them the kernel closes them.
        let control = with_fds.then_some(space.as_mut_slice());
        let message = match recvmsg::<()>(from.as_raw_fd(), &mut iov, control, flags) {
            Ok(message) => message,
            Err(Errno::EAGAIN | Errno::EINTR) => return Ok(Passed::On),
            Err(Errno::ECONNRESET) => return Ok(Passed::SourceEnded),
            Err(e) => return Err(e.into()),
        };
        if with_fds {
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(raw) = control {
                    // SAFETY: the kernel has just made these descriptors for us, and nobody else knows them.
                    fds.extend(raw.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
        }
        message.bytes
    };
    let mut rest = &data[..len];
    let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let mut control = if raw.is_empty() { &rights[..0] } else { &rights[..] };
    while !rest.is_empty() {
        match sendmsg::<()>(to.as_raw_fd(), &[IoSlice::new(rest)], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(sent) => rest = &rest[sent..],
            Err(Errno::EINTR) => continue,
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Ok(Passed::TargetEnded),
            Err(e) => return Err(e.into()),
        }
        control = &[];
    }
    Ok(if len > 0 { Passed::On } else { Passed::SourceEnded })
}
