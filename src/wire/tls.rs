//! TLS 1.3 around a connection, with certificates at both ends; the protocol inside knows nothing of it.
//!
//! ```text
//! server: Acceptor ◄─ cert, key, ca, crl: looked at for each connection, read again when one has changed
//! client: Connector ◄─ a directory with cert.pem key.pem ca.pem (and crl.pem), as `livebackup pki issue` makes it
//! ```
//!
//! * Version 1.3 only, no resumption, no early data: each connection shows its certificate, and each is checked against the
//!   authority, its dates, its purpose, the name of the server, and the revocation list.
//! * A file that has changed and cannot be read closes the server's door until it can: a revocation list that is broken
//!   must not let anybody in.
//! * A revocation list has no use-by date here: nobody is locked out because a list is old.
//! * The end of the stream without TLS's own farewell is a plain end: every message of the protocol carries its length,
//!   and a session its end, so that nothing can be cut off unseen.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use jiff::Timestamp;
use rustls::client::WebPkiServerVerifier;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{AlertDescription, CertificateError, ClientConfig, RootCertStore, ServerConfig};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::link::Stream;
use super::message::{Failure, FailureCode};
use crate::pki::{self, About, PkiError, Role};

/// What is read from a peer that was refused, so that it gets to read why.
const FAREWELL_BYTES: u64 = 64 * 1024;
/// How long that may take.
const FAREWELL: Duration = Duration::from_secs(2);

/// The files of one end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The authority whose certificates are believed.
    pub ca: PathBuf,
    /// What was revoked.
    pub crl: Option<PathBuf>,
}

impl TlsFiles {
    /// A bundle: `cert.pem`, `key.pem`, `ca.pem`, and `crl.pem` if there is one.
    pub fn in_dir(dir: &Path) -> Self {
        let crl = dir.join(pki::CRL);
        Self {
            cert: dir.join(pki::CERT),
            key: dir.join(pki::KEY),
            ca: dir.join(pki::CA),
            crl: crl.exists().then_some(crl),
        }
    }

    fn all(&self) -> impl Iterator<Item = &PathBuf> {
        [&self.cert, &self.key, &self.ca].into_iter().chain(&self.crl)
    }

    /// What changes when a file does.
    fn stamp(&self) -> Vec<Option<(u64, u64, i64, i64)>> {
        use std::os::unix::fs::MetadataExt;
        let stamp = |path: &PathBuf| {
            let about = std::fs::metadata(path).ok()?;
            Some((about.ino(), about.size(), about.mtime(), about.mtime_nsec()))
        };
        self.all().map(stamp).collect()
    }

    fn roots(&self) -> Result<Arc<RootCertStore>, PkiError> {
        let mut roots = RootCertStore::empty();
        for certificate in pki::read_certificates(&self.ca)? {
            roots.add(certificate).map_err(|e| self.bad(&self.ca, e))?;
        }
        Ok(Arc::new(roots))
    }

    /// The certificates to show, and what the first says.
    fn own(&self) -> Result<(Vec<CertificateDer<'static>>, About), PkiError> {
        let chain = pki::read_certificates(&self.cert)?;
        let about = pki::certificate::read(&chain[0]).map_err(|what| self.bad(&self.cert, what))?;
        Ok((chain, about))
    }

    fn bad(&self, path: &Path, what: impl fmt::Display) -> PkiError {
        PkiError::Bad { path: path.to_owned(), what: what.to_string() }
    }

    fn server(&self) -> Result<(ServerConfig, About), PkiError> {
        let (chain, about) = self.own()?;
        if about.role == Role::Client {
            return Err(self.bad(&self.cert, "this is a client's certificate; a server's is made with --server HOST"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut verifier = WebPkiClientVerifier::builder_with_provider(self.roots()?, provider.clone());
        if let Some(crl) = &self.crl {
            verifier = verifier.with_crls([pki::read_crl(crl)?]).only_check_end_entity_revocation();
        }
        let verifier = verifier.build().map_err(|e| self.bad(&self.ca, e))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.bad(&self.cert, e))?;
        let config = config.with_client_cert_verifier(verifier).with_single_cert(chain, pki::read_key(&self.key)?);
        let mut config = config.map_err(|e| self.bad(&self.key, e))?;
        config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok((config, about))
    }

    fn client(&self) -> Result<(ClientConfig, About), PkiError> {
        let (chain, about) = self.own()?;
        if about.role == Role::Server {
            return Err(self.bad(&self.cert, "this is a server's certificate; a client's is made with --client"));
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut verifier = WebPkiServerVerifier::builder_with_provider(self.roots()?, provider.clone());
        if let Some(crl) = &self.crl {
            // A client's list is the one of the day on which it was made: better than none, and no more.
            verifier = verifier.with_crls([pki::read_crl(crl)?]).only_check_end_entity_revocation();
            verifier = verifier.allow_unknown_revocation_status();
        }
        let verifier = verifier.build().map_err(|e| self.bad(&self.ca, e))?;
        let config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| self.bad(&self.cert, e))?;
        let config = config.with_webpki_verifier(verifier).with_client_auth_cert(chain, pki::read_key(&self.key)?);
        let mut config = config.map_err(|e| self.bad(&self.key, e))?;
        config.resumption = rustls::client::Resumption::disabled();
        Ok((config, about))
    }
}

/// A certificate that ends soon, in words.
pub fn ends_soon(about: &About) -> Option<String> {
    let days = about.days_left(Timestamp::now());
    let renew = "make another with `livebackup pki issue --renew`";
    match days {
        ..0 => Some(format!("the certificate of {:?} ended at {:.0}: {renew}", about.name, about.ends)),
        0..pki::WARN_DAYS => Some(format!("the certificate of {:?} ends in {days} days: {renew}", about.name)),
        _ => None,
    }
}

/// The server's side.
pub struct Acceptor {
    files: TlsFiles,
    loaded: Mutex<Loaded>,
}

struct Loaded {
    stamp: Vec<Option<(u64, u64, i64, i64)>>,
    config: Result<Arc<ServerConfig>, String>,
}

impl fmt::Debug for Acceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Acceptor({})", self.files.cert.display())
    }
}

impl Acceptor {
    /// Reads the files.
    pub fn new(files: TlsFiles) -> Result<Self, PkiError> {
        let stamp = files.stamp();
        let (config, about) = files.server()?;
        if let Some(words) = ends_soon(&about) {
            tracing::warn!("{words}");
        }
        Ok(Self { files, loaded: Mutex::new(Loaded { stamp, config: Ok(Arc::new(config)) }) })
    }

    /// The configuration that the files make now.
    fn config(&self) -> Result<Arc<ServerConfig>, String> {
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        let stamp = self.files.stamp();
        if stamp != loaded.stamp {
            loaded.config = self.files.server().map(|(config, _)| Arc::new(config)).map_err(|e| e.to_string());
            loaded.stamp = stamp;
            match &loaded.config {
                Ok(_) => tracing::info!("the certificates or the revocation list have changed, and were read again"),
                Err(error) => tracing::error!("nobody is let in until this is mended: {error}"),
            }
        }
        loaded.config.clone()
    }

    /// Shakes hands with a client. Gives the stream, and what the client's certificate says.
    pub async fn accept(&self, stream: TcpStream, limit: Duration) -> Result<(Stream, About), Failure> {
        let peer = stream.peer_addr().map_or_else(|_| "a client".to_owned(), |address| address.to_string());
        let denied = |what: String| Failure::new(FailureCode::Denied, format!("{peer} was not let in: {what}"));
        let config = self.config().map_err(denied)?;
        let _ = stream.set_nodelay(true);
        let shaking = TlsAcceptor::from(config).accept(stream).into_fallible();
        let shaken = timeout(limit, shaking).await;
        let stream = match shaken {
            Err(_) => return Err(denied(format!("no TLS handshake within {} s", limit.as_secs_f64()))),
            Ok(Ok(stream)) => stream,
            Ok(Err((error, stream))) => {
                farewell(stream).await;
                return Err(denied(words(&error, Side::Server)));
            }
        };
        let chain = stream.get_ref().1.peer_certificates();
        let about = match chain.and_then(|chain| chain.first()) {
            Some(der) => pki::certificate::read(der).map_err(denied)?,
            None => return Err(denied("it has no certificate".to_owned())),
        };
        let peer = format!("{} ({peer})", about.name);
        Ok((over(stream, peer, Side::Server), about))
    }
}

/// Reads what a refused peer sent: a socket that is closed with unread bytes would take back what was sent to it.
async fn farewell(mut stream: TcpStream) {
    let reading = async {
        stream.shutdown().await?;
        let mut rest = (&mut stream).take(FAREWELL_BYTES);
        tokio::io::copy(&mut rest, &mut tokio::io::sink()).await
    };
    let _ = timeout(FAREWELL, reading).await;
}

/// The client's side.
#[derive(Clone)]
pub struct Connector {
    config: Arc<ClientConfig>,
    about: About,
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Connector({:?})", self.about.name)
    }
}

impl Connector {
    /// Reads a bundle.
    pub fn open(dir: &Path) -> Result<Self, PkiError> {
        let (config, about) = TlsFiles::in_dir(dir).client()?;
        Ok(Self { config: Arc::new(config), about })
    }

    /// What its own certificate says.
    pub fn about(&self) -> &About {
        &self.about
    }

    /// Shakes hands with the server at `HOST:PORT`.
    pub async fn connect(&self, stream: TcpStream, address: &str) -> Result<Stream, Failure> {
        let denied = |what: String| Failure::new(FailureCode::Denied, format!("no TLS with {address}: {what}"));
        let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
        let name = ServerName::try_from(host).map_err(|e| denied(e.to_string()))?;
        stream.set_nodelay(true).map_err(|e| denied(e.to_string()))?;
        let shaken = TlsConnector::from(self.config.clone()).connect(name, stream).await;
        // A connection that breaks in the handshake is no refusal: who comes back tries again.
        let stream = shaken.map_err(|error| match of_tls(&error) {
            Some(_) => denied(words(&error, Side::Client)),
            None => Failure { code: FailureCode::Disconnected, ..denied(words(&error, Side::Client)) },
        })?;
        Ok(over(stream, address.to_owned(), Side::Client))
    }
}

/// Which end we are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Server,
    Client,
}

fn over(stream: impl AsyncRead + AsyncWrite + Send + 'static, peer: String, side: Side) -> Stream {
    let (reader, writer) = tokio::io::split(stream);
    Stream { reader: Box::new(Reader { inner: reader, side }), writer: Box::new(writer), peer }
}

/// The reading half: an end is an end, and TLS's errors are in words.
struct Reader<R> {
    inner: R,
    side: Side,
}

impl<R: AsyncRead + Unpin> AsyncRead for Reader<R> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, into: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let side = self.side;
        Pin::new(&mut self.inner)
            .poll_read(cx, into)
            .map_err(|error| match of_tls(&error) {
                Some(_) => io::Error::new(io::ErrorKind::PermissionDenied, words(&error, side)),
                None => error,
            })
            .map(|read| match read {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(()),
                other => other,
            })
    }
}

fn of_tls(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref()?.downcast_ref()
}

/// What went wrong, and what to do next.
fn words(error: &io::Error, side: Side) -> String {
    use AlertDescription as Alert;
    use CertificateError as Bad;
    let (theirs, list) = match side {
        Side::Server => ("the client", "of this server's ca file"),
        Side::Client => ("the server", "in this client's ca.pem"),
    };
    let Some(tls) = of_tls(error) else {
        return match error.kind() {
            io::ErrorKind::UnexpectedEof => format!("{theirs} closed the connection: does it speak TLS there?"),
            _ => error.to_string(),
        };
    };
    match tls {
        rustls::Error::InvalidCertificate(bad) => match bad {
            Bad::Expired | Bad::ExpiredContext { .. } => format!("the certificate of {theirs} has expired"),
            Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                format!("the certificate of {theirs} is not valid yet: are the clocks right?")
            }
            Bad::Revoked => format!("the certificate of {theirs} was revoked"),
            Bad::UnknownIssuer | Bad::BadSignature => {
                format!("the certificate of {theirs} is not signed by the authority {list}")
            }
            Bad::InvalidPurpose | Bad::InvalidPurposeContext { .. } => {
                format!("the certificate of {theirs} is not for that: servers and clients have different ones")
            }
            Bad::NotValidForName | Bad::NotValidForNameContext { .. } => {
                format!("the certificate of {theirs} is for other names: {bad}; issue one with --server for this name")
            }
            other => format!("the certificate of {theirs} is not good: {other}"),
        },
        rustls::Error::NoCertificatesPresented => format!("{theirs} showed no certificate"),
        rustls::Error::AlertReceived(alert) => match alert {
            Alert::CertificateExpired => format!("{theirs} says that this end's certificate has expired"),
            Alert::CertificateRevoked => format!("{theirs} says that this end's certificate was revoked"),
            Alert::UnknownCA | Alert::DecryptError => {
                format!("{theirs} does not know the authority of this end's certificate")
            }
            Alert::UnsupportedCertificate => format!("{theirs} says that this end's certificate is not for that"),
            Alert::CertificateRequired => format!("{theirs} wants a certificate"),
            other => format!("{theirs} refused ({other:?})"),
        },
        rustls::Error::InvalidMessage(_) => format!("{theirs} does not speak TLS there"),
        other => other.to_string(),
    }
}
