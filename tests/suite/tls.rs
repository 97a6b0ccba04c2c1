//! The service across a network: certificates, grants, revocation, unix sockets. Real sockets, real certificates, real TLS
//! at both ends. VMs that cannot be reached are enough to be listed; one test has a real QEMU.

#![allow(clippy::unwrap_used)]

use crate::common::*;
use crate::tls_common::*;
use livebackup::pki::{Authority, Purpose};
use livebackup::wire::message::{Failure, FailureCode, Reply, Request};
use livebackup::wire::tls::Connector;
use livebackup::wire::{Address, Client, Timing};

const GRANTS: &str = r#"
    [[client]]
    name = "backup1"
    vms = ["vm1", "vm3"]

    [[client]]
    name = "watcher"
    vms = ["*"]
    may = ["list"]
"#;

async fn list(server: &Server, bundle: &str) -> Result<Vec<String>, Failure> {
    let connector = Connector::open(&server.pki.bundle(bundle)).unwrap();
    list_with(server, &connector).await
}

async fn list_with(server: &Server, connector: &Connector) -> Result<Vec<String>, Failure> {
    let mut client = Client::connect_tls(&server.address, connector, Timing::default()).await?;
    match client.request(Request::List).await? {
        Reply::List { vms } => Ok(vms.into_iter().map(|entry| entry.vm).collect()),
        other => panic!("{other:?}"),
    }
}

#[track_caller]
fn assert_denied(outcome: Result<Vec<String>, Failure>, words: &str) {
    let failure = outcome.unwrap_err();
    assert_eq!(failure.code, FailureCode::Denied, "{failure}");
    assert!(failure.message.contains(words), "{failure}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_gets_what_it_was_granted_and_hears_of_nothing_else() {
    let server = Server::start(GRANTS).await;
    assert_eq!(list(&server, "backup1").await.unwrap(), ["vm1", "vm3"]);
    assert_eq!(list(&server, "watcher").await.unwrap(), ["vm1", "vm2", "vm3"]);
    let connector = Connector::open(&server.pki.bundle("backup1")).unwrap();
    let mut client = Client::connect_tls(&server.address, &connector, Timing::default()).await.unwrap();
    let unknown = client.request(Request::Disks { vm: "vm2".into() }).await.unwrap_err();
    let nothing = client.request(Request::Disks { vm: "nothing".into() }).await.unwrap_err();
    assert_eq!((unknown.code, nothing.code), (FailureCode::UnknownVm, FailureCode::UnknownVm));
    assert_eq!(unknown.message.replace("vm2", "nothing"), nothing.message, "a VM that is not granted is not there");
    assert!(unknown.message.contains("vm1, vm3"), "{unknown}");
    let Reply::Status { vms } = client.request(Request::Status { vm: None }).await.unwrap() else { panic!() };
    assert_eq!(vms.len(), 2);
    let denied = client.request(Request::Detach { vm: "vm1".into(), all: false }).await.unwrap_err();
    assert_eq!(denied.code, FailureCode::Denied, "{denied}");

    // Known to the authority, unknown to the configuration.
    assert_denied(list(&server, "stranger").await, "stranger");
    let connector = Connector::open(&server.pki.bundle("watcher")).unwrap();
    let watcher = Client::connect_tls(&server.address, &connector, Timing::default()).await.unwrap();
    let begin = livebackup::wire::message::Begin { vm: "vm1".into(), chunk_bytes: 65536, ..Default::default() };
    assert_eq!(watcher.begin(begin).await.unwrap_err().code, FailureCode::Denied);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_cannot_prove_its_name_is_told_why() {
    let server = Server::start(GRANTS).await;
    let pki = &server.pki;

    let expired = pki.made("expired", |params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "backup1");
        params.not_after = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    assert_denied(list_with(&server, &Connector::open(&expired).unwrap()).await, "has expired");

    let early = pki.made("early", |params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "backup1");
        params.not_before = time::OffsetDateTime::now_utc() + time::Duration::days(1);
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    });
    assert_denied(list_with(&server, &Connector::open(&early).unwrap()).await, "the server");

    // The same name from another authority; the client believes the server's, so that only the server objects.
    let other = Pki::new();
    other.client("backup1");
    std::fs::copy(pki.dir.path().join("ca.pem"), other.bundle("backup1").join("ca.pem")).unwrap();
    std::fs::remove_file(other.bundle("backup1").join("crl.pem")).unwrap();
    let foreign = Connector::open(&other.bundle("backup1")).unwrap();
    assert_denied(list_with(&server, &foreign).await, "does not know the authority");

    // A server's certificate is no client's, by our own check and by the server's.
    let refused = Connector::open(&pki.bundle("vmhost")).unwrap_err().to_string();
    assert!(refused.contains("--client"), "{refused}");
    let other_purpose = pki.made("purpose", |params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "backup1");
        params.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::CodeSigning];
    });
    // It is a server's for `Connector`, so rustls is asked to show it all the same.
    let said = handshake(&server, Some(&other_purpose)).await.unwrap_err();
    assert!(said.contains("UnsupportedCertificate"), "{said}");

    let said = handshake(&server, None).await.unwrap_err();
    assert!(said.contains("CertificateRequired"), "{said}");
    handshake(&server, Some(&pki.bundle("backup1"))).await.expect("the same way in, with a good certificate");

    assert_eq!(list(&server, "backup1").await.unwrap().len(), 2, "the others are still served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_that_was_revoked_opens_nothing_from_then_on() {
    let server = Server::start(GRANTS).await;
    assert_eq!(list(&server, "backup1").await.unwrap().len(), 2);
    Authority::open(server.pki.dir.path()).unwrap().revoke("backup1").unwrap();
    assert_eq!(list(&server, "backup1").await.unwrap().len(), 2, "the server has the old list");
    std::fs::copy(server.pki.dir.path().join("crl.pem"), server.crl()).unwrap();
    assert_denied(list(&server, "backup1").await, "was revoked");
    assert_eq!(list(&server, "watcher").await.unwrap().len(), 3);

    // A list that cannot be read lets nobody in, and one that can lets them in again.
    let good = std::fs::read(server.crl()).unwrap();
    std::fs::write(server.crl(), "broken").unwrap();
    list(&server, "watcher").await.unwrap_err();
    list(&server, "watcher").await.unwrap_err();
    std::fs::write(server.crl(), good).unwrap();
    assert_eq!(list(&server, "watcher").await.unwrap().len(), 3);
    assert_denied(list(&server, "backup1").await, "was revoked");
    Authority::open(server.pki.dir.path()).unwrap().issue("backup1", &Purpose::Client, 5, false).unwrap();
    assert_eq!(list(&server, "backup1").await.unwrap().len(), 2, "a new certificate of that name is good");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_cannot_prove_its_name_gets_nothing() {
    let server = Server::start(GRANTS).await;
    let pki = &server.pki;
    let replace = |from: std::path::PathBuf| {
        for file in ["key.pem", "cert.pem"] {
            std::fs::copy(from.join(file), server.tls_dir().join(file)).unwrap();
        }
    };
    // The server reads its certificate again when it changes: each of these is live at once.
    let issue = |name: &str, hosts: &[&str]| {
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        Authority::open(pki.dir.path()).unwrap().issue(name, &Purpose::Server(hosts), 5, false).unwrap();
        pki.bundle(name)
    };
    replace(issue("elsewhere", &["elsewhere.example", "192.0.2.1"]));
    assert_denied(list(&server, "backup1").await, "for other names");
    replace(pki.made("old", |params| {
        params.distinguished_name.push(rcgen::DnType::CommonName, "old");
        params.subject_alt_names = vec![rcgen::SanType::IpAddress("127.0.0.1".parse().unwrap())];
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
        params.not_after = time::OffsetDateTime::now_utc() - time::Duration::minutes(1);
    }));
    assert_denied(list(&server, "backup1").await, "has expired");
    let other = Pki::new();
    let authority = Authority::open(other.dir.path()).unwrap();
    authority.issue("rogue", &Purpose::Server(vec!["127.0.0.1".into()]), 5, false).unwrap();
    replace(authority.bundle("rogue"));
    assert_denied(list(&server, "backup1").await, "not signed by the authority");
    replace(issue("mended", &["127.0.0.1"]));
    assert_eq!(list(&server, "backup1").await.unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_and_without_tls_the_ends_say_what_the_other_speaks() {
    let server = Server::start(GRANTS).await;
    let plain = Client::connect(&Address::Tcp(server.address.clone())).await.unwrap_err();
    assert!(plain.message.contains("TLS") && plain.message.contains("--tls"), "{plain}");
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let answering = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let stream = livebackup::wire::Stream::tcp(socket).unwrap();
        let nothing = |_| async { Err(Failure::new(FailureCode::Internal, "nothing is answered")) };
        livebackup::wire::serve_connection(stream, Timing::default(), nothing).await
    });
    let connector = Connector::open(&server.pki.bundle("backup1")).unwrap();
    let refused = Client::connect_tls(&address, &connector, Timing::default()).await.unwrap_err();
    assert!(refused.message.contains("does it speak TLS"), "{refused}");
    assert_eq!(refused.code, FailureCode::Disconnected, "it may be the line: who comes back tries again");
    let said = answering.await.unwrap().unwrap_err();
    assert!(said.message.contains("a TLS client"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_dawdles_in_the_handshake_is_dropped() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let pki = Pki::new();
    pki.server("vmhost", &["127.0.0.1"]);
    let files = livebackup::wire::tls::TlsFiles::in_dir(&pki.bundle("vmhost"));
    let acceptor = livebackup::wire::tls::Acceptor::new(files).unwrap();
    for sent in [&b""[..], b"\x16\x03\x01\x00\xff\x01"] {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut slow = tokio::net::TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        slow.write_all(sent).await.unwrap();
        let (socket, _) = listener.accept().await.unwrap();
        let limit = std::time::Duration::from_millis(50);
        let refused = acceptor.accept(socket, limit).await.map(drop).unwrap_err();
        assert!(refused.message.contains("no TLS handshake"), "{refused}");
        // Closed by the server: the end, or a reset.
        let _ = slow.read_to_end(&mut vec![]).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_is_for_its_owner_and_its_group() {
    let server = Server::start(&format!("{GRANTS}# unix")).await;
    let socket = server.dir.path().join("serve.sock");
    let mode = |path: &std::path::Path| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    };
    assert_eq!(mode(&socket), 0o600);
    let mut client = Client::connect(&Address::Unix(socket.clone())).await.unwrap();
    let Reply::List { vms } = client.request(Request::List).await.unwrap() else { panic!() };
    assert_eq!(vms.len(), 3, "all of them, without a certificate");
    server.stop().await;
    assert!(!socket.exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_backs_up_and_restores_over_tls() {
    let mut qemu = Qemu::with_raw_disk(Version::V10, 8 << 20);
    for i in 0..20 {
        qemu.write(i * 300_000 / 512 * 512, 4096, i as u8 + 1);
    }
    let server = Server::start(
        &format!("{GRANTS}\n[[vm]]\nname = \"real\"\nmonitor = \"qmp:{}\"\n", qemu.socket().display())
            .replace("\"vm3\"]", "\"vm3\", \"real\"]"),
    )
    .await;
    let dir = server.dir.path();
    let bundle = server.pki.bundle("backup1");
    let source = format!("livebackup://{}/real", server.address);
    let program = |arguments: &str| {
        let mut command = livebackup();
        command.args(arguments.split_whitespace()).current_dir(dir).env("XDG_CONFIG_HOME", dir);
        command
    };
    let (at, stop) = (source.clone(), bundle.display().to_string());
    tokio::task::block_in_place(|| {
        run(program("init repo").env("LIVEBACKUP_TLS", "nowhere"));
        wait_until("the VM to be attached", || {
            let ended = program(&format!("--tls {stop} status {at} --json")).output().unwrap();
            String::from_utf8_lossy(&ended.stdout).contains("qemu_version\":\"")
        });
        run(program(&format!("backup {source} repo")).env("LIVEBACKUP_TLS", &bundle));
        qemu.write(1 << 20, 65536, 0xee);
        let said = run(&mut program(&format!("--tls {} backup {source} repo", bundle.display())));
        assert!(said.contains("incremental of real"), "{said}");
        run(&mut program("restore repo real out"));
    });
    let image = std::fs::read(qemu.path("disk0.raw")).unwrap();
    assert!(std::fs::read(dir.join("out/vd0.raw")).unwrap() == image, "the restored disk is the guest's");

    let denied = program(&format!("--tls {} detach {source}", bundle.display())).output().unwrap();
    assert_eq!(denied.status.code(), Some(8), "{}", String::from_utf8_lossy(&denied.stderr));
    let far = program("disks livebackup://192.0.2.1:7870/vm").output().unwrap();
    let said = String::from_utf8_lossy(&far.stderr).into_owned();
    assert!(far.status.code() == Some(2) && said.contains("--tls") && said.contains("pki issue"), "{said}");
}
