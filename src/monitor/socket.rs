//! The byte stream below a monitor: a unix socket, or TCP.

use std::io::{self, IoSlice};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use tokio::io::Interest;
use tokio::net::{TcpStream, UnixStream};
use tokio::time::{Instant, sleep, timeout_at};

use super::{Address, MonitorError};

/// A connected stream. Reading and writing take `&self`: one task reads, one writes.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Socket {
    /// Connects, within `limit`.
    pub(super) async fn connect(address: &Address, limit: Duration) -> Result<Socket, MonitorError> {
        let deadline = Instant::now() + limit;
        let attempt = async {
            match address {
                Address::Unix(path) => loop {
                    match UnixStream::connect(path).await {
                        // QEMU's backlog is one: more clients than that are waiting already.
                        Err(e) if e.kind() == io::ErrorKind::WouldBlock => sleep(Duration::from_millis(20)).await,
                        done => break done.map(Socket::Unix),
                    }
                },
                Address::Tcp(host, port) => {
                    let stream = TcpStream::connect((host.as_str(), *port)).await?;
                    stream.set_nodelay(true)?;
                    Ok(Socket::Tcp(stream))
                }
            }
        };
        let address = address.clone();
        match timeout_at(deadline, attempt).await {
            Ok(Ok(socket)) => Ok(socket),
            Ok(Err(source)) => Err(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    MonitorError::NoSocket { address, source }
                }
                io::ErrorKind::PermissionDenied => MonitorError::Permission { address, source },
                _ => MonitorError::Unreachable { address, source },
            }),
            Err(_) if matches!(address, Address::Unix(_)) => Err(MonitorError::Taken { address, waited: limit }),
            Err(_) => Err(MonitorError::Unreachable { address, source: io::ErrorKind::TimedOut.into() }),
        }
    }

    /// Reads what is there, waiting for at least one byte; 0 is the end.
    pub(super) async fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Socket::Unix(s) => {
                    s.readable().await?;
                    s.try_read(buffer)
                }
                Socket::Tcp(s) => {
                    s.readable().await?;
                    s.try_read(buffer)
                }
            };
            match result {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                done => return done,
            }
        }
    }

    /// Writes some of the bytes, waiting until at least one fits.
    async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let result = match self {
                Socket::Unix(s) => {
                    s.writable().await?;
                    s.try_write(bytes)
                }
                Socket::Tcp(s) => {
                    s.writable().await?;
                    s.try_write(bytes)
                }
            };
            match result {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                done => return done,
            }
        }
    }

    /// Sends the first of the bytes together with a descriptor (SCM_RIGHTS, unix(7)); gives how many were sent.
    /// On an error nothing was sent.
    pub(super) async fn write_first(&self, bytes: &[u8], fd: &OwnedFd) -> io::Result<usize> {
        let Socket::Unix(stream) = self else { return Err(io::ErrorKind::Unsupported.into()) };
        loop {
            stream.writable().await?;
            let sent = stream.try_io(Interest::WRITABLE, || {
                let fds = [fd.as_raw_fd()];
                let rights = [ControlMessage::ScmRights(&fds)];
                let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
                sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(bytes)], &rights, flags, None).map_err(io::Error::from)
            });
            match sent {
                Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
                done => return done,
            }
        }
    }

    /// Writes all of the bytes.
    pub(super) async fn write_all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write(bytes).await? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                n => bytes = &bytes[n..],
            }
        }
        Ok(())
    }

    /// Whether descriptors can be passed.
    pub(super) fn can_pass_fds(&self) -> bool {
        matches!(self, Socket::Unix(_))
    }
}

/// A copy of a caller's descriptor, so that the caller may go away while it is on its way.
pub(super) fn copy_of(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    fd.try_clone_to_owned()
}
