//! A service in this process with certificates of its own, and certificates that no authority of ours would make.

#![allow(dead_code, clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use livebackup::pki::{Authority, Purpose};
use livebackup::server::{Config, serve};
use livebackup::vm::VmOptions;
use livebackup::wire::message::Failure;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// Two clients that may do everything with the VMs of this name.
pub fn two_clients(vms: &str) -> String {
    ["backup1", "watcher"].map(|name| format!("[[client]]\nname = \"{name}\"\nvms = [\"{vms}\"]\n")).concat()
}

/// An authority.
pub struct Pki {
    pub dir: tempfile::TempDir,
}

impl Pki {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Authority::init(dir.path(), "test", 100).unwrap();
        Self { dir }
    }

    pub fn bundle(&self, name: &str) -> PathBuf {
        self.dir.path().join("bundle").join(name)
    }

    pub fn client(&self, name: &str) {
        Authority::open(self.dir.path()).unwrap().issue(name, &Purpose::Client, 50, false).unwrap();
    }

    pub fn server(&self, name: &str, hosts: &[&str]) {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        Authority::open(self.dir.path()).unwrap().issue(name, &Purpose::Server(hosts), 50, false).unwrap();
    }

    /// A bundle with whatever certificate, signed by the authority.
    pub fn made(&self, name: &str, change: impl FnOnce(&mut rcgen::CertificateParams)) -> PathBuf {
        let read = |file: &str| std::fs::read_to_string(self.dir.path().join(file)).unwrap();
        let ca_key = rcgen::KeyPair::from_pem(&read("ca.key")).unwrap();
        let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca.pem"), ca_key).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        change(&mut params);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &issuer).unwrap();
        let dir = self.bundle(name);
        std::fs::create_dir_all(&dir).unwrap();
        std::fs::write(dir.join("cert.pem"), certificate.pem()).unwrap();
        livebackup::durable::write_file(
            &dir.join("key.pem"),
            key.serialize_pem().as_bytes(),
            livebackup::durable::Replace::Yes,
        )
        .unwrap();
        std::fs::write(dir.join("ca.pem"), read("ca.pem")).unwrap();
        dir
    }
}

/// A running service with TLS; with `# unix` in its configuration, on a unix socket too.
pub struct Server {
    pub dir: tempfile::TempDir,
    pub pki: Pki,
    pub address: String,
    stop: watch::Sender<bool>,
    serving: JoinHandle<Result<(), Failure>>,
}

/// A port that was free a moment ago.
fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

impl Server {
    /// Starts a service of three VMs that cannot be reached, and whatever else `more` configures. It has certificates for
    /// the server, for `backup1`, `watcher` and `stranger`.
    pub async fn start(more: &str) -> Self {
        let pki = Pki::new();
        pki.server("vmhost", &["127.0.0.1"]);
        ["backup1", "watcher", "stranger"].iter().for_each(|name| pki.client(name));
        let dir = tempfile::tempdir().unwrap();
        let tls = dir.path().join("tls");
        std::fs::create_dir(&tls).unwrap();
        for file in std::fs::read_dir(pki.bundle("vmhost")).unwrap().map(Result::unwrap) {
            std::fs::copy(file.path(), tls.join(file.file_name())).unwrap();
        }
        // Another process may take the port in between: then another is tried.
        for _ in 0..20 {
            let address = format!("127.0.0.1:{}", free_port());
            let unix = if more.contains("# unix") {
                format!(", \"unix:{}/serve.sock\"", dir.path().display())
            } else {
                String::new()
            };
            let mut text = format!("listen = [\"{address}\"{unix}]\n[tls]\ndir = \"{}\"\n{more}\n", tls.display());
            for vm in ["vm1", "vm2", "vm3"] {
                text += &format!("[[vm]]\nname = \"{vm}\"\nmonitor = \"qmp:{}/{vm}.qmp\"\n", dir.path().display());
            }
            let path = dir.path().join("serve.toml");
            std::fs::write(&path, text).unwrap();
            let (stop, stopped) = watch::channel(false);
            let options = VmOptions { state: dir.path().join("state"), ..VmOptions::default() };
            let serving = tokio::spawn(serve(Config::read(&path).unwrap(), options, stopped));
            while !serving.is_finished() {
                if tokio::net::TcpStream::connect(&address).await.is_ok() {
                    return Self { dir, pki, address, stop, serving };
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            let error = serving.await.unwrap().unwrap_err();
            assert!(error.message.contains("cannot listen"), "{error}");
        }
        panic!("no port is free");
    }

    pub fn tls_dir(&self) -> PathBuf {
        self.dir.path().join("tls")
    }

    pub fn crl(&self) -> PathBuf {
        self.tls_dir().join("crl.pem")
    }

    /// Ends the service and waits for it.
    pub async fn stop(self) {
        self.stop.send(true).unwrap();
        self.serving.await.unwrap().unwrap();
    }
}

/// A handshake by rustls alone, with the certificate of a bundle or none, and the server's word on it.
pub async fn handshake(server: &Server, bundle: Option<&Path>) -> Result<(), String> {
    let mut stream = socket(server, bundle).await?;
    // The server's first word comes after the client's certificate was looked at.
    stream.write_all(b"LIVEBACKUP\r\n\x00\x1a\n\xff\x01\x00\x01\x00").await.map_err(|e| format!("{e:?}"))?;
    stream.read_exact(&mut [0; 16]).await.map(drop).map_err(|e| format!("{e:?}"))
}

/// A connection by rustls alone, with the certificate of a bundle or none.
pub async fn socket(
    server: &Server,
    bundle: Option<&Path>,
) -> Result<tokio_rustls::client::TlsStream<tokio::net::TcpStream>, String> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = rustls::RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(server.pki.dir.path().join("ca.pem")).unwrap()).unwrap();
    let config = rustls::ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let config = config.with_root_certificates(roots);
    let config = match bundle {
        None => config.with_no_client_auth(),
        Some(dir) => {
            let chain = vec![CertificateDer::from_pem_file(dir.join("cert.pem")).unwrap()];
            let key = PrivateKeyDer::from_pem_file(dir.join("key.pem")).unwrap();
            config.with_client_auth_cert(chain, key).unwrap()
        }
    };
    let socket = tokio::net::TcpStream::connect(&server.address).await.unwrap();
    let name = ServerName::try_from("127.0.0.1").unwrap();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    connector.connect(name, socket).await.map_err(|e| format!("{e:?}"))
}
