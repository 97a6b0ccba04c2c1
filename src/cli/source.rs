//! Source: the grammar of SOURCE, and what newcomers write instead.
//!
//! ```text
//! qmp:PATH | qmp:HOST:PORT | livebackup://HOST:PORT/VM | unix:PATH/VM | libvirt:URI/DOMAIN
//! ```
//!
//! The VM may be missing from a server's address: who needs it then says which there are.

use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use super::exit;
use crate::monitor;
use crate::wire;

/// Where a VM is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A QEMU of this host.
    Monitor(monitor::Address),
    /// A `livebackup serve`, and the VM there.
    Server(wire::Address, Option<String>),
}

/// What may begin a source.
const PREFIXES: [&str; 4] = ["qmp:", "livebackup:", "unix:", "libvirt:"];

/// Whether a text was meant as a source.
pub fn looks_like_source(text: &str) -> bool {
    PREFIXES.iter().any(|prefix| text.starts_with(prefix))
}

fn is_socket(path: &str) -> bool {
    Path::new(path).metadata().is_ok_and(|about| about.file_type().is_socket())
}

/// Reads a source.
///
/// # Errors
/// Of usage, with what to write instead.
pub fn parse(text: &str) -> anyhow::Result<Source> {
    read(text, is_socket).map_err(exit::usage)
}

/// [`parse`] with the question whether a path is a socket.
fn read(text: &str, is_socket: impl Fn(&str) -> bool) -> Result<Source, String> {
    if let Some(address) = text.strip_prefix("qmp:") {
        return address.parse().map(Source::Monitor).map_err(|e| e.to_string());
    }
    if let Some(rest) = text.strip_prefix("livebackup://") {
        let (address, vm) = rest.split_once('/').unwrap_or((rest, ""));
        let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        return match port.map(|(_, port)| port.parse::<u16>()) {
            Some(Ok(1..)) => Ok(Source::Server(wire::Address::Tcp(address.to_owned()), named(vm))),
            _ => Err(format!("{text:?} lacks a port: write livebackup://HOST:PORT/VM")),
        };
    }
    if let Some(rest) = text.strip_prefix("unix:") {
        let (path, vm) = split_socket(rest, is_socket);
        return match path.is_empty() {
            true => Err(format!("{text:?} lacks a path: write unix:PATH/VM, with the socket of `livebackup serve`")),
            false => Ok(Source::Server(wire::Address::Unix(path.into()), named(vm))),
        };
    }
    if text.starts_with("libvirt:") {
        return Err("libvirt sources are not built yet; name QEMU's own QMP socket: qmp:PATH".to_owned());
    }
    Err(advice(text, is_socket))
}

fn named(vm: &str) -> Option<String> {
    (!vm.is_empty()).then(|| vm.to_owned())
}

/// The socket's path and the VM's name. Both may have slashes: the longest path that is a socket is the path.
fn split_socket(text: &str, is_socket: impl Fn(&str) -> bool) -> (&str, &str) {
    let cuts = text.rmatch_indices('/').map(|(at, _)| (&text[..at], &text[at + 1..]));
    let found = std::iter::once((text, "")).chain(cuts).find(|(path, _)| is_socket(path));
    found.or_else(|| text.rsplit_once('/')).unwrap_or((text, ""))
}

/// What to write instead of a text without a prefix.
fn advice(text: &str, is_socket: impl Fn(&str) -> bool) -> String {
    let grammar = "a SOURCE is qmp:PATH, qmp:HOST:PORT, livebackup://HOST:PORT/VM or unix:PATH/VM";
    let path = Path::new(text);
    if text.starts_with("s3:") || path.join("config").is_file() {
        return format!("{text:?} is a repository, not a VM: the SOURCE comes first, then the REPO");
    }
    if is_socket(text) {
        return format!("{text:?} is a socket; if it is QEMU's QMP, write qmp:{text}; {grammar}");
    }
    if let Some(rest) = text.strip_prefix("livebackup:") {
        return format!("write livebackup://{}; {grammar}", rest.trim_start_matches('/'));
    }
    let is_address = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    match text.contains('/') || is_address || path.exists() {
        true => format!("{text:?} does not say what it is; do you mean qmp:{text}? {grammar}"),
        false => format!("{text:?} is no SOURCE; {grammar}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server(address: wire::Address, vm: &str) -> Source {
        Source::Server(address, named(vm))
    }

    #[test]
    fn sources() {
        let tcp = |text: &str| wire::Address::Tcp(text.to_owned());
        let unix = |text: &str| wire::Address::Unix(text.into());
        for (text, expected) in [
            ("qmp:/run/vm1.qmp", Source::Monitor(monitor::Address::Unix("/run/vm1.qmp".into()))),
            ("qmp:localhost:4444", Source::Monitor(monitor::Address::Tcp("localhost".to_owned(), 4444))),
            ("livebackup://h:7/vm1", server(tcp("h:7"), "vm1")),
            ("livebackup://[::1]:7/a/b", server(tcp("[::1]:7"), "a/b")),
            ("livebackup://h:7", server(tcp("h:7"), "")),
            ("livebackup://h:7/", server(tcp("h:7"), "")),
            ("unix:/run/lb.sock/vm1", server(unix("/run/lb.sock"), "vm1")),
            ("unix:/run/is/a/b", server(unix("/run/is"), "a/b")),
            ("unix:/run/is", server(unix("/run/is"), "")),
            ("unix:/run/is/", server(unix("/run/is"), "")),
        ] {
            assert_eq!(read(text, |path| path == "/run/is").as_ref(), Ok(&expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_source_says_what_to_write() {
        for (text, advice) in [
            ("/run/vm1.qmp", "qmp:/run/vm1.qmp"),
            ("localhost:4444", "qmp:localhost:4444"),
            ("vm1", "a SOURCE is"),
            ("livebackup://host/vm", "livebackup://HOST:PORT/VM"),
            ("livebackup://:7/vm", "livebackup://HOST:PORT/VM"),
            ("livebackup:h:7/vm", "livebackup://h:7/vm"),
            ("unix:", "unix:PATH/VM"),
            ("qmp:", "HOST:PORT"),
            ("libvirt:qemu:///system/vm", "not built yet"),
            ("s3://bucket/x", "the SOURCE comes first"),
            ("tests/fixtures/repo-v1", "the SOURCE comes first"),
            ("", "a SOURCE is"),
        ] {
            let error = read(text, |_| false).unwrap_err();
            assert!(error.contains(advice), "{text:?}: {error}");
        }
    }
}
