//! The QEMU process behind a monitor.
//!
//! Whoever listens at a socket need not be QEMU: libvirt binds the socket and passes it on, a proxy may stand in
//! between. So a candidate counts only when it has the threads that `query-cpus-fast` names. The document: proc(5),
//! unix(7).

use std::collections::HashSet;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::libc;
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::Address;
use super::socket::Socket;

/// How often a kernel without descriptors of processes is asked.
const ALIVE_ASKED_EVERY: Duration = Duration::from_millis(50);

/// A process of this host, named so that no later one can be taken for it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Process {
    /// Process id.
    pub pid: i32,
    /// When it started, in clock ticks since the host's start (field 22 of `/proc/PID/stat`).
    pub start_time: u64,
    /// Which start of the host (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
}

impl Process {
    /// The process that has this id now.
    pub fn of_pid(pid: i32) -> Option<Process> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, field 2, may contain anything: count from its last parenthesis.
        let start_time = stat.rsplit_once(')')?.1.split_ascii_whitespace().nth(22 - 3)?.parse().ok()?;
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
        Some(Process { pid, start_time, boot_id })
    }

    /// Whether it still runs.
    pub fn is_alive(&self) -> bool {
        Self::of_pid(self.pid).as_ref() == Some(self)
    }

    /// Resolves when it has ended: its files are closed then, whether its parent has taken notice or not.
    pub async fn ended(&self) {
        let descriptor = self.descriptor();
        // The descriptor is of this process only if the process was there before it and is there after it.
        if !self.is_alive() {
            return;
        }
        // SAFETY: an `OwnedFd` keeps its descriptor open, and the same one, for as long as `AsyncFd` holds it.
        let watch = |fd| unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }.map_err(io::Error::from);
        match descriptor.and_then(watch) {
            Ok(watched) => drop(watched.readable().await),
            Err(_) => {
                while self.is_alive() {
                    tokio::time::sleep(ALIVE_ASKED_EVERY).await;
                }
            }
        }
    }

    /// pidfd_open(2).
    fn descriptor(&self) -> io::Result<OwnedFd> {
        // SAFETY: the call takes two numbers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, self.pid, 0) };
        match i32::try_from(fd) {
            // SAFETY: the kernel has just made this descriptor for us, and nobody else knows of it.
            Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

/// The ids of the virtual processors' threads, as QEMU sees them, from a reply of `query-cpus-fast`.
pub(super) fn thread_ids(cpus: &Value) -> Vec<i32> {
    let id = |cpu: &Value| i32::try_from(cpu.get("thread-id")?.as_i64()?).ok();
    cpus.as_array().map(|cpus| cpus.iter().filter_map(id).collect()).unwrap_or_default()
}

/// The QEMU at the other end, if that is certain.
pub(super) async fn behind(socket: Arc<Socket>, address: &Address, threads: Vec<i32>) -> Option<Process> {
    let address = address.clone();
    // It reads files of /proc, of every process at worst.
    tokio::task::spawn_blocking(move || {
        let candidates = match (&*socket, &address) {
            (Socket::Unix(stream), Address::Unix(path)) => {
                let listener = getsockopt(stream, PeerCredentials).ok().map(|c| c.pid()).filter(|pid| *pid > 0);
                if let Some(pid) = listener.filter(|pid| is_qemu(*pid, &threads)) {
                    return Process::of_pid(pid);
                }
                owners(&unix_inodes(path), &threads)
            }
            (Socket::Tcp(stream), _) => {
                let (ours, theirs) = (stream.local_addr().ok()?, stream.peer_addr().ok()?);
                owners(&tcp_inodes(theirs, ours), &threads)
            }
            _ => return None,
        };
        let mut certain = candidates.into_iter().filter(|pid| is_qemu(*pid, &threads));
        let pid = certain.next()?;
        if certain.next().is_some() {
            return None;
        }
        Process::of_pid(pid)
    })
    .await
    .ok()?
}

/// Whether the process has these threads; one without virtual processors is known by its program's name.
fn is_qemu(pid: i32, threads: &[i32]) -> bool {
    if threads.is_empty() {
        let name = fs::read_link(format!("/proc/{pid}/exe")).ok();
        let name = name.as_deref().and_then(Path::file_name).map(|n| n.to_string_lossy().into_owned());
        return name.is_some_and(|n| n.starts_with("qemu") || n == "kvm");
    }
    threads.iter().all(|tid| Path::new(&format!("/proc/{pid}/task/{tid}")).exists()) || {
        let own = threads_in_its_namespace(pid);
        threads.iter().all(|tid| own.contains(tid))
    }
}

/// The thread ids of a process as it sees them itself, in the innermost PID namespace.
fn threads_in_its_namespace(pid: i32) -> HashSet<i32> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return HashSet::new() };
    let own = |status: String| {
        status.lines().find_map(|l| l.strip_prefix("NSpid:"))?.split_ascii_whitespace().last()?.parse().ok()
    };
    tasks.flatten().filter_map(|t| own(fs::read_to_string(t.path().join("status")).ok()?)).collect()
}

/// The processes that hold a socket of these; where the first thread's process does, only that.
fn owners(inodes: &HashSet<u64>, threads: &[i32]) -> Vec<i32> {
    if inodes.is_empty() {
        return vec![];
    }
    let links: HashSet<String> = inodes.iter().map(|i| format!("socket:[{i}]")).collect();
    let holds = |pid: i32| {
        let fds = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
        fds.filter_map(|fd| fs::read_link(fd.path()).ok()).any(|l| l.to_str().is_some_and(|l| links.contains(l)))
    };
    if let Some(pid) = threads.first().and_then(|tid| thread_group(*tid)).filter(|pid| holds(*pid)) {
        return vec![pid];
    }
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    processes.filter_map(|p| p.file_name().to_str()?.parse().ok()).filter(|pid| holds(*pid)).collect()
}

fn thread_group(tid: i32) -> Option<i32> {
    let status = fs::read_to_string(format!("/proc/{tid}/status")).ok()?;
    status.lines().find_map(|l| l.strip_prefix("Tgid:"))?.trim().parse().ok()
}

/// Inodes of the sockets that are bound to a path: the listener, and what was accepted from it.
fn unix_inodes(path: &Path) -> HashSet<u64> {
    let Some(path) = path.to_str() else { return HashSet::new() };
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    // Num RefCount Protocol Flags Type St Inode Path
    let inode = |line: &str| {
        let mut fields = line.splitn(2, '/');
        let (fixed, rest) = (fields.next()?, fields.next()?);
        (path.strip_prefix('/') == Some(rest)).then(|| fixed.split_ascii_whitespace().nth(6)?.parse().ok())?
    };
    table.lines().filter_map(inode).collect()
}

/// Inodes of the TCP sockets of this host that are `local` and connected to `remote`.
fn tcp_inodes(local: SocketAddr, remote: SocketAddr) -> HashSet<u64> {
    let same = |a: SocketAddr, b: SocketAddr| a.port() == b.port() && a.ip().to_canonical() == b.ip().to_canonical();
    let inode = |line: &str| {
        // sl local_address rem_address st tx:rx tr:when retrnsmt uid timeout inode
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let found = same(proc_address(fields.get(1)?)?, local) && same(proc_address(fields.get(2)?)?, remote);
        found.then(|| fields.get(9)?.parse().ok())?
    };
    let tables = ["/proc/net/tcp", "/proc/net/tcp6"].map(|t| fs::read_to_string(t).unwrap_or_default());
    tables.iter().flat_map(|t| t.lines().skip(1)).filter_map(inode).filter(|i| *i != 0).collect()
}

/// `0100007F:1F90`: words of the address in the host's byte order, the port as a number.
fn proc_address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let mut bytes = vec![];
    for at in (0..address.len()).step_by(8) {
        bytes.extend(u32::from_str_radix(address.get(at..at + 8)?, 16).ok()?.to_ne_bytes());
    }
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        _ => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?)),
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn we_find_ourselves() {
        let me = std::process::id() as i32;
        let process = Process::of_pid(me).unwrap();
        assert!(process.is_alive());
        assert!(!Process { start_time: process.start_time + 1, ..process }.is_alive());
        assert_eq!(Process::of_pid(i32::MAX), None);
        assert_eq!(thread_group(me), Some(me));
        assert!(threads_in_its_namespace(me).contains(&me));
    }

    #[test]
    fn addresses_of_proc() {
        if cfg!(target_endian = "little") {
            assert_eq!(proc_address("0100007F:1F90"), Some("127.0.0.1:8080".parse().unwrap()));
            assert_eq!(proc_address("00000000000000000000000001000000:0001"), Some("[::1]:1".parse().unwrap()));
        }
        for bad in ["", ":", "01:1", "0100007F", "0100007F:10000", "0100007Fé:1"] {
            assert_eq!(proc_address(bad), None, "{bad}");
        }
    }
}
