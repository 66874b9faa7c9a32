//! What only etcd can do to a registry: servers that stop, hang, restart, compact, or refuse.

#[path = "lab/certificates.rs"]
mod certificates;
#[path = "lab/etcd.rs"]
mod etcd_server;
#[path = "lab/proxy.rs"]
mod proxy;

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use etcd_client::{Client, Txn, TxnOp};
use flannel::registry::{
    Error, Event, Registry, Watch,
    etcd::{EtcdConfig, EtcdRegistry},
};
use tokio::{net::TcpListener, time::timeout};

use certificates::Authority;
use etcd_server::{EtcdOptions, EtcdServer};
use proxy::Proxy;

const PREFIX: &str = "/coreos.com/network";

/// Longer than anything here takes, so that what never comes fails the test.
const PATIENCE: Duration = Duration::from_secs(30);

/// How soon a server that has gone silent must be noticed by a watch that nothing happens on.
const SILENCE_NOTICED: Duration = Duration::from_secs(15);

const HOUR: Duration = Duration::from_secs(3_600);

fn config(endpoints: &[String]) -> EtcdConfig {
    EtcdConfig {
        endpoints: endpoints.to_vec(),
        prefix: PREFIX.to_owned(),
        ..EtcdConfig::default()
    }
}

fn connect(endpoints: &[String]) -> EtcdRegistry {
    EtcdRegistry::connect(config(endpoints)).unwrap()
}

fn with_user(server: &EtcdServer, username: &str, password: &str) -> EtcdRegistry {
    EtcdRegistry::connect(EtcdConfig {
        username: Some(username.to_owned()),
        password: Some(password.to_owned()),
        ..config(&[server.url()])
    })
    .unwrap()
}

async fn next(watch: &mut Box<dyn Watch>) -> Result<Vec<Event>, Error> {
    timeout(PATIENCE, watch.next())
        .await
        .expect("the watch tells something")
}

fn key_of(events: &[Event]) -> &str {
    match events {
        [Event::Put(record)] => &record.key,
        [Event::Delete { key }] => key,
        _ => panic!("not one event: {events:?}"),
    }
}

/// The reason of an error that must be `Unavailable`.
fn unavailable(error: Error) -> String {
    match error {
        Error::Unavailable { reason, .. } => reason,
        error => panic!("not unavailable: {error}"),
    }
}

/// The text of an error that must be `Denied`.
fn denied(error: &Error) -> String {
    assert!(matches!(error, Error::Denied { .. }), "not denied: {error}");
    error.to_string()
}

fn address(server: &EtcdServer) -> SocketAddr {
    server.url().strip_prefix("http://").unwrap().parse().unwrap()
}

// Servers that fail.

#[tokio::test]
async fn records_survive_an_etcd_restart_and_watches_end() {
    let mut server = EtcdServer::start();
    let registry = connect(&[server.url()]);
    let leased = registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();

    server.stop();
    let reason = unavailable(next(&mut watch).await.unwrap_err());
    assert!(reason.contains("connection lost"), "{reason}");
    let reason = unavailable(registry.get("subnets/a").await.unwrap_err());
    assert_eq!(reason, format!("{}: connection refused", server.url()));

    server.restart();
    let (picture, mut watch) = registry.watch("subnets/").await.unwrap();
    assert_eq!(picture, std::slice::from_ref(&leased));
    assert!(registry.refresh(leased.ttl.unwrap()).await.unwrap().is_some());
    registry.put("subnets/b", b"2").await.unwrap();
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/b");
}

#[tokio::test]
async fn a_silent_server_is_noticed_by_calls_and_by_an_idle_watch() {
    let server = EtcdServer::start();
    let registry = connect(&[server.url()]);
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();
    server.pause();
    let paused = Instant::now();
    let (ended, called) = tokio::join!(async { (next(&mut watch).await, paused.elapsed()) }, async {
        (registry.get("subnets/a").await, paused.elapsed())
    },);
    unavailable(ended.0.unwrap_err());
    assert!(ended.1 < SILENCE_NOTICED, "{:?}", ended.1);
    let reason = unavailable(called.0.unwrap_err());
    assert!(reason.ends_with("timed out after 5 s"), "{reason}");

    server.resume();
    registry.put("subnets/a", b"1").await.unwrap();
}

/// How many etcd leases there are.
fn leases(server: &EtcdServer) -> usize {
    let listed: serde_json::Value = serde_json::from_str(&server.etcdctl(&["lease", "list", "-w", "json"])).unwrap();
    listed["leases"].as_array().map_or(0, Vec::len)
}

/// A create that fails because the line is cut after its etcd lease was granted.
async fn create_cut_off(registry: &EtcdRegistry, server: &EtcdServer, proxy: &Proxy, key: &str) {
    let before = leases(server);
    let cut = async {
        while leases(server) == before {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        proxy.cut();
    };
    let (made, ()) = tokio::join!(registry.create(key, b"1", Some(HOUR)), cut);
    unavailable(made.unwrap_err());
    assert!(server.etcdctl(&["get", "--prefix", PREFIX]).is_empty());
}

#[tokio::test]
async fn a_create_that_is_cut_off_leaves_no_etcd_lease_behind() {
    let server = EtcdServer::start();
    // Slow enough that the line can be cut between the grant and the transaction.
    let proxy = Proxy::start(address(&server), Duration::from_millis(500)).await;
    let registry = connect(&[proxy.url()]);
    create_cut_off(&registry, &server, &proxy, "subnets/a").await;
    assert!(registry.create("subnets/b", b"1", Some(HOUR)).await.is_err());
    assert_eq!(leases(&server), 1, "no other is granted before it is revoked");

    proxy.mend();
    let made = registry.create("subnets/b", b"1", Some(HOUR)).await.unwrap().unwrap();
    assert_eq!(leases(&server), 1, "only the new one");
    let records = registry.list("").await.unwrap();
    assert_eq!(records, [made]);
}

#[tokio::test]
async fn a_record_made_by_a_cut_off_create_can_be_used_if_it_is_found() {
    let server = EtcdServer::start();
    let proxy = Proxy::start(address(&server), Duration::from_millis(500)).await;
    let registry = connect(&[proxy.url()]);
    create_cut_off(&registry, &server, &proxy, "subnets/a").await;
    // As if the transaction had arrived and its answer had not.
    let listed = server.etcdctl(&["lease", "list"]);
    let lease = listed.lines().last().unwrap();
    let key = format!("{PREFIX}/subnets/a");
    server.etcdctl(&["put", &format!("--lease={lease}"), &key, "1"]);

    proxy.mend();
    let found = registry.get("subnets/a").await.unwrap().unwrap();
    assert!(registry.refresh(found.ttl.unwrap()).await.unwrap().is_some());
    registry.create("subnets/b", b"1", Some(HOUR)).await.unwrap().unwrap();
    assert_eq!(registry.get("subnets/a").await.unwrap(), Some(found));
}

#[tokio::test]
async fn a_compaction_while_cut_off_leads_to_a_new_picture() {
    let server = EtcdServer::start();
    let proxy = Proxy::start(address(&server), Duration::ZERO).await;
    let (registry, other) = (connect(&[proxy.url()]), connect(&[server.url()]));
    other.put("subnets/stays", b"1").await.unwrap();
    let gone = other.create("subnets/goes", b"1", None).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();

    proxy.cut();
    let cut = Instant::now();
    assert!(other.delete(&gone).await.unwrap());
    other.put("subnets/comes", b"1").await.unwrap();
    let now = other.get("subnets/comes").await.unwrap().unwrap().revision;
    server.etcdctl(&["compaction", &now.0.to_string()]);
    unavailable(next(&mut watch).await.unwrap_err());
    assert!(cut.elapsed() < SILENCE_NOTICED, "{:?}", cut.elapsed());

    proxy.mend();
    let (picture, mut watch) = registry.watch("subnets/").await.unwrap();
    let keys: Vec<&str> = picture.iter().map(|record| record.key.as_str()).collect();
    assert_eq!(keys, ["subnets/comes", "subnets/stays"]);
    other.put("subnets/later", b"1").await.unwrap();
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/later");
}

#[tokio::test]
async fn a_compaction_between_picture_and_watch_is_told() {
    let server = EtcdServer::start();
    // So slow a line that there is a compaction in each step of beginning a watch.
    let proxy = Proxy::start(address(&server), Duration::from_millis(300)).await;
    let (registry, other) = (connect(&[proxy.url()]), connect(&[server.url()]));
    other.put("config", b"{}").await.unwrap();
    let compact = async {
        loop {
            other.put("subnets/a", b"1").await.unwrap();
            let now = other.get("subnets/a").await.unwrap().unwrap().revision;
            server.etcdctl(&["compaction", &now.0.to_string()]);
            tokio::task::yield_now().await;
        }
    };
    let begin = async {
        match registry.watch("subnets/").await {
            Ok((_, mut watch)) => next(&mut watch).await.unwrap_err(),
            Err(error) => error,
        }
    };
    tokio::select! {
        error = begin => assert!(matches!(error, Error::Compacted), "{error}"),
        () = compact => unreachable!("it does not end"),
    }
}

#[tokio::test]
async fn with_one_of_three_servers_dead_everything_works() {
    let mut servers = EtcdServer::start_cluster(3);
    let urls: Vec<String> = servers.iter().map(EtcdServer::url).collect();
    let registry = connect(&urls);
    let leased = registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();

    servers[0].kill();
    unavailable(next(&mut watch).await.unwrap_err());
    let (picture, mut watch) = registry.watch("subnets/").await.unwrap();
    assert_eq!(picture, std::slice::from_ref(&leased));
    assert!(registry.refresh(leased.ttl.unwrap()).await.unwrap().is_some());
    assert!(registry.delete(&leased).await.unwrap());
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/a");

    // One of three is no majority: the server that still runs must not keep the watch waiting.
    servers[1].kill();
    unavailable(next(&mut watch).await.unwrap_err());
    let reason = unavailable(registry.get("subnets/a").await.unwrap_err());
    assert!(urls.iter().all(|url| reason.contains(url.as_str())), "{reason}");

    servers[0].restart();
    registry.put("subnets/b", b"1").await.unwrap();
}

#[tokio::test]
async fn a_server_that_hangs_is_passed_over() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let server = EtcdServer::start();
    let registry = connect(&[format!("http://{}", silent.local_addr().unwrap()), server.url()]);
    let started = Instant::now();
    registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let started = Instant::now();
    registry.get("subnets/a").await.unwrap().unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "it is not asked again: {:?}",
        started.elapsed()
    );
}

#[tokio::test]
async fn each_endpoint_that_cannot_be_reached_has_its_own_reason() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let silent = format!("http://{}", listener.local_addr().unwrap());
    let closed = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    // Longer than a label of a name may be, so that no name server is asked.
    let nameless = format!("http://{}.example:2379", "x".repeat(64));
    let registry = connect(&[silent.clone(), format!("http://{closed}"), nameless.clone()]);
    let reason = unavailable(registry.get("config").await.unwrap_err());
    assert!(
        reason.contains(&format!("http://{closed}: connection refused")),
        "{reason}"
    );
    assert!(reason.contains(&format!("{nameless}: name not known")), "{reason}");
    assert!(reason.contains(&format!("{silent}: timed out after 5 s")), "{reason}");
}

#[tokio::test]
async fn many_calls_without_a_server_fail_together() {
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = EtcdConfig {
        username: Some("root".to_owned()),
        password: Some("secret".to_owned()),
        ..config(&[format!("http://{}", silent.local_addr().unwrap())])
    };
    let registry = EtcdRegistry::connect(config).unwrap();
    let started = Instant::now();
    let calls = (0..5)
        .map(|_| registry.clone())
        .map(|registry| async move { registry.get("config").await });
    let mut calls: tokio::task::JoinSet<_> = calls.collect();
    while let Some(outcome) = calls.join_next().await {
        let reason = unavailable(outcome.unwrap().unwrap_err());
        assert!(
            reason.contains("timed out after 5 s") && !reason.contains("secret"),
            "{reason}"
        );
    }
    assert!(
        started.elapsed() < Duration::from_secs(8),
        "one after another: {:?}",
        started.elapsed()
    );
}

// TLS.

fn tls_server(authority_directory: &std::path::Path) -> (EtcdServer, Authority) {
    let authority = Authority::new(authority_directory, "authority");
    let options = EtcdOptions::default();
    let files = authority.issue("server", &[options.address.to_string()]);
    let server = EtcdServer::start_with(options.with_tls(&files.certificate, &files.key, &authority.file));
    (server, authority)
}

/// A directory for certificates, removed at the end.
struct TempDir(std::path::PathBuf);

impl TempDir {
    fn new(name: &str) -> TempDir {
        let path = std::env::temp_dir().join(format!("flannel-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        TempDir(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // What is left behind in the place for temporary files is no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[tokio::test]
async fn tls_with_a_client_certificate_works() {
    let directory = TempDir::new("tls-works");
    let (server, authority) = tls_server(&directory.0);
    let client = authority.issue("client", &[]);
    let registry = EtcdRegistry::connect(EtcdConfig {
        ca_file: Some(authority.file.clone()),
        cert_file: Some(client.certificate),
        key_file: Some(client.key),
        // TLS files make https of an endpoint without a scheme.
        ..config(&[server.url().replace("https://", "")])
    })
    .unwrap();
    let (_, mut watch) = registry.watch("").await.unwrap();
    registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/a");
}

#[tokio::test]
async fn tls_that_does_not_fit_says_why() {
    let directory = TempDir::new("tls-fails");
    let (server, authority) = tls_server(&directory.0);
    let stranger = Authority::new(&directory.0, "stranger");
    let client = authority.issue("client", &[]);

    let unknown = EtcdConfig {
        ca_file: Some(stranger.file.clone()),
        ..config(&[server.url()])
    };
    let reason = unavailable(EtcdRegistry::connect(unknown).unwrap().get("config").await.unwrap_err());
    assert!(
        reason.contains("TLS: certificate signed by unknown authority"),
        "{reason}"
    );

    let bare = EtcdConfig {
        ca_file: Some(authority.file.clone()),
        ..config(&[server.url()])
    };
    // The server says why and closes the connection, and the close may win.
    let message = EtcdRegistry::connect(bare)
        .unwrap()
        .get("config")
        .await
        .unwrap_err()
        .to_string();
    assert!(message.contains("--etcd-certfile"), "{message}");

    let plain = connect(&[server.url().replace("https://", "http://")]);
    let reason = unavailable(plain.get("config").await.unwrap_err());
    assert!(reason.contains("does it want https"), "{reason}");

    let other_key = authority.issue("other", &[]).key;
    let mixed = EtcdConfig {
        ca_file: Some(authority.file.clone()),
        cert_file: Some(client.certificate),
        key_file: Some(other_key),
        ..config(&[server.url()])
    };
    let message = EtcdRegistry::connect(mixed).unwrap_err().to_string();
    assert!(
        message.contains("--etcd-certfile and --etcd-keyfile cannot be used"),
        "{message}"
    );

    let plain_server = EtcdServer::start();
    let url = plain_server.url().replace("http://", "https://");
    let secure = EtcdConfig {
        ca_file: Some(authority.file.clone()),
        ..config(&[url])
    };
    let reason = unavailable(EtcdRegistry::connect(secure).unwrap().get("config").await.unwrap_err());
    assert!(reason.contains("is it http where you wrote https"), "{reason}");
}

// Users and passwords.

/// A server on which root has the password "secret", and tokens live for `ttl` seconds from their last use.
fn server_with_users(ttl: u32) -> EtcdServer {
    let mut server = EtcdServer::start_with(EtcdOptions {
        arguments: vec![format!("--auth-token-ttl={ttl}")],
        ..EtcdOptions::default()
    });
    server.etcdctl(&["user", "add", "root:secret"]);
    server.etcdctl(&["auth", "enable"]);
    server.set_client_arguments(&["--user", "root:secret"]);
    server
}

#[tokio::test]
async fn a_session_outlives_its_token() {
    let mut server = server_with_users(2);
    let registry = with_user(&server, "root", "secret");
    let leased = registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();

    // Nothing tells a client that its token has run out; only time makes it so.
    tokio::time::sleep(Duration::from_secs(4)).await;
    assert!(registry.refresh(leased.ttl.unwrap()).await.unwrap().is_some());
    let replaced = registry.replace(&leased, b"2").await.unwrap().unwrap();
    assert_eq!(next(&mut watch).await.unwrap(), [Event::Put(replaced.clone())]);
    tokio::time::sleep(Duration::from_secs(4)).await;
    let (picture, _watch) = registry.watch("subnets/").await.unwrap();
    assert_eq!(picture, [replaced]);

    // A restarted server has forgotten all tokens.
    server.restart();
    assert!(registry.get("subnets/a").await.unwrap().is_some());
    // A change of users makes all tokens old.
    server.etcdctl(&["user", "add", "other:other"]);
    assert!(registry.get("subnets/a").await.unwrap().is_some());
}

#[tokio::test]
async fn a_password_that_is_replaced_in_its_file_is_used_without_a_restart() {
    let server = server_with_users(300);
    let directory = TempDir::new("password");
    let file = directory.0.join("password");
    let add_user = |password: &str| {
        server.etcdctl(&["user", "add", &format!("flannel:{password}")]);
        server.etcdctl(&["user", "grant-role", "flannel", "root"]);
    };
    add_user("old");
    std::fs::write(&file, "old\n").unwrap();
    let registry = EtcdRegistry::connect(EtcdConfig {
        username: Some("flannel".to_owned()),
        password_file: Some(file.clone()),
        ..config(&[server.url()])
    })
    .unwrap();
    registry.put("config", b"{}").await.unwrap();

    server.etcdctl(&["user", "delete", "flannel"]);
    add_user("new");
    denied(&registry.get("config").await.unwrap_err());
    std::fs::write(&file, "new\n").unwrap();
    assert!(registry.get("config").await.unwrap().is_some());
}

#[tokio::test]
async fn a_wrong_or_missing_password_is_denied_and_names_the_flags() {
    let server = server_with_users(300);
    let message = denied(&with_user(&server, "root", "guessed").get("config").await.unwrap_err());
    assert!(message.contains("--etcd-username and --etcd-password"), "{message}");
    assert!(!message.contains("guessed"), "{message}");
    let message = denied(&connect(&[server.url()]).get("config").await.unwrap_err());
    assert!(
        message.contains("give --etcd-username and --etcd-password"),
        "{message}"
    );
}

#[tokio::test]
async fn a_role_on_the_prefix_is_all_that_is_needed() {
    let server = server_with_users(300);
    server.etcdctl(&["role", "add", "flannel"]);
    server.etcdctl(&[
        "role",
        "grant-permission",
        "--prefix=true",
        "flannel",
        "readwrite",
        PREFIX,
    ]);
    server.etcdctl(&["user", "add", "flannel:flannel"]);
    server.etcdctl(&["user", "grant-role", "flannel", "flannel"]);
    server.etcdctl(&["user", "add", "stranger:stranger"]);

    let registry = with_user(&server, "flannel", "flannel");
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();
    let leased = registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/a");
    assert!(registry.refresh(leased.ttl.unwrap()).await.unwrap().is_some());
    assert!(registry.time_left(leased.ttl.unwrap()).await.unwrap().is_some());
    assert!(registry.delete(&leased).await.unwrap());
    assert_eq!(
        registry.similar_configs().await,
        [] as [String; 0],
        "it may not look elsewhere"
    );

    let stranger = with_user(&server, "stranger", "stranger");
    let message = denied(&stranger.get("config").await.unwrap_err());
    assert!(
        message.contains("/coreos.com/network/config: permission denied"),
        "{message}"
    );
    assert!(matches!(
        stranger.watch("subnets/").await.err(),
        Some(Error::Denied { .. })
    ));
}

#[tokio::test]
async fn a_password_for_a_server_without_users_does_no_harm_and_serves_once_it_has_some() {
    let server = EtcdServer::start();
    let registry = with_user(&server, "root", "secret");
    registry.put("config", b"{}").await.unwrap();
    server.etcdctl(&["user", "add", "root:secret"]);
    server.etcdctl(&["auth", "enable"]);
    assert!(registry.get("config").await.unwrap().is_some());
}

// Keys.

#[tokio::test]
async fn a_configuration_without_leading_slash_takes_its_network_with_it() {
    let server = EtcdServer::start();
    let registry = connect(&[server.url()]);
    assert!(registry.get("config").await.unwrap().is_none());
    assert_eq!(registry.full_key("config"), "/coreos.com/network/config");

    server.etcdctl(&["put", "coreos.com/network/config", "{}"]);
    let config = registry.get("config").await.unwrap().unwrap();
    assert_eq!((config.key.as_str(), &config.value[..]), ("config", &b"{}"[..]));
    assert_eq!(registry.full_key("config"), "coreos.com/network/config");
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();
    registry.create("subnets/a", b"1", None).await.unwrap().unwrap();
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/a");
    assert_eq!(
        server
            .etcdctl(&["get", "--print-value-only", "coreos.com/network/subnets/a"])
            .trim(),
        "1"
    );
}

#[tokio::test]
async fn no_etcd_lease_is_left_behind() {
    let server = EtcdServer::start();
    let registry = connect(&[server.url()]);
    let leases = || server.etcdctl(&["lease", "list"]).lines().count() - 1;
    let leased = registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    assert_eq!(leases(), 1);
    assert_eq!(registry.create("subnets/a", b"2", Some(HOUR)).await.unwrap(), None);
    assert_eq!(leases(), 1, "of the creation that lost");
    assert!(registry.delete(&leased).await.unwrap());
    assert_eq!(leases(), 0, "of the record that was deleted");
}

#[tokio::test]
async fn a_record_whose_etcd_lease_was_revoked_is_gone() {
    let server = EtcdServer::start();
    let registry = connect(&[server.url()]);
    let leased = registry.create("subnets/a", b"1", Some(HOUR)).await.unwrap().unwrap();
    let (_, mut watch) = registry.watch("subnets/").await.unwrap();
    server.etcdctl(&["lease", "revoke", &format!("{:x}", leased.ttl.unwrap().0)]);
    assert_eq!(
        next(&mut watch).await.unwrap(),
        [Event::Delete {
            key: "subnets/a".to_owned()
        }]
    );
    assert_eq!(registry.refresh(leased.ttl.unwrap()).await.unwrap(), None);
    assert_eq!(registry.time_left(leased.ttl.unwrap()).await.unwrap(), None);
    assert_eq!(registry.replace(&leased, b"2").await.unwrap(), None);
}

#[tokio::test]
async fn thousands_of_leases_are_listed_in_a_few_goes_at_one_revision() {
    let server = EtcdServer::start();
    let registry = connect(&[server.url()]);
    registry.put("config", b"{}").await.unwrap();
    registry.get("config").await.unwrap().unwrap();
    fill(&server, 0..5_000).await;
    let before = ranges(&server);
    assert_eq!(registry.list("subnets/").await.unwrap().len(), 5_000);
    // 128, and then twice as many each time.
    let goes = ranges(&server) - before;
    assert!((2..=6).contains(&goes), "{goes}");

    fill(&server, 5_000..12_000).await;
    let before = ranges(&server);
    let (picture, mut watch) = registry.watch("subnets/").await.unwrap();
    assert_eq!(picture.len(), 12_000);
    assert!(picture.is_sorted_by(|one, next| one.key < next.key));
    let goes = ranges(&server) - before;
    assert!((2..=12).contains(&goes), "{goes}");
    registry.put("subnets/last", b"1").await.unwrap();
    assert_eq!(key_of(&next(&mut watch).await.unwrap()), "subnets/last");
}

/// Writes leases of 600 bytes, as many to a transaction as etcd takes.
async fn fill(server: &EtcdServer, numbers: std::ops::Range<u32>) {
    let mut client = Client::connect([server.url()], None).await.unwrap();
    let numbers: Vec<u32> = numbers.collect();
    for chunk in numbers.chunks(128) {
        let put = |number| TxnOp::put(format!("{PREFIX}/subnets/{number:05}"), vec![b'x'; 600], None);
        client
            .txn(Txn::new().and_then(chunk.iter().map(put).collect::<Vec<_>>()))
            .await
            .unwrap();
    }
}

/// How many range requests the server has answered.
fn ranges(server: &EtcdServer) -> u64 {
    let mut stream = TcpStream::connect(address(server)).unwrap();
    stream.write_all(b"GET /metrics HTTP/1.0\r\n\r\n").unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    let ours = |line: &&str| {
        line.starts_with("grpc_server_handled_total") && line.contains("\"OK\"") && line.contains("\"Range\"")
    };
    text.lines()
        .find(ours)
        .unwrap()
        .rsplit(' ')
        .next()
        .unwrap()
        .parse()
        .unwrap()
}
