//! A real etcd server for tests.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use std::{
    collections::hash_map::RandomState,
    fs,
    hash::BuildHasher,
    io::{BufRead, BufReader},
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU8, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use flannel::lab::{Lab, Segment};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// What etcd writes to its log once it has joined its cluster and answers.
const READY: &str = "ready to serve client requests";

/// How long etcd may take until then; a fraction of a second on an idle machine.
const START_PATIENCE: Duration = Duration::from_secs(30);

/// How a server is to be started.
#[derive(Debug, Clone)]
pub(crate) struct EtcdOptions {
    /// The address to listen on.
    pub(crate) address: IpAddr,
    /// The port for clients; peers use the next one.
    pub(crate) port: u16,
    /// The name of a network namespace (`/run/netns/NAME`) to run in.
    pub(crate) namespace: Option<String>,
    /// Whether clients speak TLS; the certificates are for `arguments` to name.
    pub(crate) tls: bool,
    /// More arguments for etcd.
    pub(crate) arguments: Vec<String>,
    /// More arguments for etcdctl, such as `--user root:secret`.
    pub(crate) client_arguments: Vec<String>,
    /// The peer URLs of all members, in the order of their names `m0`, `m1` ..., and which of them this one is.
    pub(crate) members: Option<(Vec<String>, usize)>,
}

impl Default for EtcdOptions {
    /// Alone, without TLS, on a loopback address of its own, so that no other server can have taken its port.
    fn default() -> EtcdOptions {
        EtcdOptions {
            address: loopback_address(),
            port: 2379,
            namespace: None,
            tls: false,
            arguments: Vec::new(),
            client_arguments: Vec::new(),
            members: None,
        }
    }
}

impl EtcdOptions {
    /// In the namespace of the lab's switch, where all hosts reach it.
    pub(crate) fn on_switch(lab: &Lab) -> EtcdOptions {
        EtcdOptions {
            address: Segment::First.switch_address().into(),
            namespace: Some(lab.switch().name().to_owned()),
            ..EtcdOptions::default()
        }
    }

    /// By TLS with this certificate, and only for clients that have one of the authority whose own is in `authority`.
    pub(crate) fn with_tls(mut self, certificate: &Path, key: &Path, authority: &Path) -> EtcdOptions {
        let flag = |name: &str, path: &Path| format!("--{name}={}", path.display());
        self.tls = true;
        self.arguments.extend([
            "--client-cert-auth".to_owned(),
            flag("cert-file", certificate),
            flag("key-file", key),
            flag("trusted-ca-file", authority),
        ]);
        self
    }

    pub(crate) fn url(&self) -> String {
        let scheme = if self.tls { "https" } else { "http" };
        format!("{scheme}://{}:{}", self.host(), self.port)
    }

    fn peer_url(&self) -> String {
        format!("http://{}:{}", self.host(), self.port + 1)
    }

    fn host(&self) -> String {
        match self.address {
            IpAddr::V4(address) => address.to_string(),
            IpAddr::V6(address) => format!("[{address}]"),
        }
    }

    /// A command that runs in the server's network namespace.
    fn command(&self, program: &str) -> Command {
        match &self.namespace {
            None => Command::new(program),
            Some(name) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net=/run/netns/{name}")).arg(program);
                command
            }
        }
    }
}

/// A running server. It is killed and its data removed when this is dropped.
#[derive(Debug)]
pub(crate) struct EtcdServer {
    options: EtcdOptions,
    data: PathBuf,
    child: Option<Child>,
    log: Arc<Mutex<Vec<String>>>,
}

impl EtcdServer {
    /// A server on loopback; ready when this returns.
    pub(crate) fn start() -> EtcdServer {
        EtcdServer::start_with(EtcdOptions::default())
    }

    /// A server as `options` say; ready when this returns.
    pub(crate) fn start_with(options: EtcdOptions) -> EtcdServer {
        let mut server = EtcdServer::new(options);
        server.restart();
        server
    }

    /// A cluster of `count` servers on loopback; ready when this returns.
    pub(crate) fn start_cluster(count: usize) -> Vec<EtcdServer> {
        EtcdServer::start_cluster_of((0..count).map(|_| EtcdOptions::default()).collect())
    }

    /// A cluster of servers as `options` say, each at an address or port of its own; ready when this returns.
    pub(crate) fn start_cluster_of(mut options: Vec<EtcdOptions>) -> Vec<EtcdServer> {
        let peers: Vec<String> = options.iter().map(EtcdOptions::peer_url).collect();
        for (number, options) in options.iter_mut().enumerate() {
            options.members = Some((peers.clone(), number));
        }
        let mut servers: Vec<EtcdServer> = options.into_iter().map(EtcdServer::new).collect();
        EtcdServer::restart_cluster(&mut servers);
        servers
    }

    /// Starts all servers of a cluster, again if they ran before; ready when this returns.
    pub(crate) fn restart_cluster(servers: &mut [EtcdServer]) {
        servers.iter_mut().for_each(EtcdServer::kill);
        // None is ready before most of them run.
        let waits: Vec<_> = servers.iter_mut().map(EtcdServer::spawn).collect();
        for (server, ready) in servers.iter().zip(waits) {
            server.wait_until_ready(&ready);
        }
    }

    /// Ends the server at once, and starts it again without any of its data; ready when this returns.
    pub(crate) fn restart_empty(&mut self) {
        self.kill();
        fs::remove_dir_all(self.data.join("etcd")).unwrap();
        self.restart();
    }

    fn new(options: EtcdOptions) -> EtcdServer {
        let data = std::env::temp_dir().join(format!("flannel-etcd-{:016x}", RandomState::new().hash_one(0)));
        fs::create_dir(&data).unwrap();
        EtcdServer {
            options,
            data,
            child: None,
            log: Arc::default(),
        }
    }

    /// The URL for clients.
    pub(crate) fn url(&self) -> String {
        self.options.url()
    }

    /// Ends the server the way an administrator does. Its data stays.
    pub(crate) fn stop(&mut self) {
        self.end(Signal::SIGTERM);
    }

    /// Ends the server at once. Its data stays.
    pub(crate) fn kill(&mut self) {
        self.end(Signal::SIGKILL);
    }

    /// Starts the server, again if it ran before, on the data that is there; ready when this returns.
    pub(crate) fn restart(&mut self) {
        self.kill();
        let ready = self.spawn();
        self.wait_until_ready(&ready);
    }

    /// Makes the server hang, connections and all.
    pub(crate) fn pause(&self) {
        self.signal(Signal::SIGSTOP);
    }

    /// Lets a paused server go on.
    pub(crate) fn resume(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// What `etcdctl` with `arguments` prints on this server.
    ///
    /// # Panics
    /// When it fails.
    pub(crate) fn etcdctl(&self, arguments: &[&str]) -> String {
        self.try_etcdctl(arguments)
            .unwrap_or_else(|said| panic!("etcdctl {arguments:?}: {said}"))
    }

    /// As [`EtcdServer::etcdctl`], where it may fail: a cluster that elects a leader refuses. What it says then.
    pub(crate) fn try_etcdctl(&self, arguments: &[&str]) -> Result<String, String> {
        let output = self
            .options
            .command("etcdctl")
            .env("ETCDCTL_API", "3")
            .arg("--endpoints")
            .arg(self.url())
            .args(&self.options.client_arguments)
            .args(arguments)
            .output()
            .unwrap();
        let (stdout, stderr) = (
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
        );
        if output.status.success() {
            Ok(stdout.into_owned())
        } else {
            Err(format!("{stderr}{stdout}"))
        }
    }

    /// Arguments that all later calls of etcdctl get, such as `--user root:secret`.
    pub(crate) fn set_client_arguments(&mut self, arguments: &[&str]) {
        self.options.client_arguments = arguments.iter().map(|argument| (*argument).to_owned()).collect();
    }

    /// Directory for files that the test needs beside the server; removed with it.
    pub(crate) fn directory(&self) -> &Path {
        &self.data
    }

    fn spawn(&mut self) -> mpsc::Receiver<()> {
        let options = &self.options;
        let (peers, number) = options.members.clone().unwrap_or_else(|| (vec![options.peer_url()], 0));
        let cluster: Vec<String> = peers
            .iter()
            .enumerate()
            .map(|(number, url)| format!("m{number}={url}"))
            .collect();
        let mut child = options
            .command("etcd")
            .args(["--name", &format!("m{number}")])
            .arg("--data-dir")
            .arg(self.data.join("etcd"))
            .args([
                "--listen-client-urls",
                &options.url(),
                "--advertise-client-urls",
                &options.url(),
            ])
            .args(["--listen-peer-urls", &options.peer_url()])
            .args(["--initial-advertise-peer-urls", &options.peer_url()])
            .args(["--initial-cluster", &cluster.join(",")])
            .args(&options.arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("etcd must be installed (Debian: etcd-server)");
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (ready, wait) = mpsc::channel();
        let log = Arc::clone(&self.log);
        thread::spawn(move || {
            for line in stderr.lines().map_while(Result::ok) {
                if line.contains(READY) {
                    // Nobody listens for a second time.
                    let _ = ready.send(());
                }
                log.lock().unwrap().push(line);
            }
        });
        self.child = Some(child);
        wait
    }

    fn wait_until_ready(&self, ready: &mpsc::Receiver<()>) {
        if ready.recv_timeout(START_PATIENCE).is_err() {
            panic!("etcd did not become ready:\n{}", self.log.lock().unwrap().join("\n"));
        }
    }

    fn signal(&self, signal: Signal) {
        let child = self.child.as_ref().expect("the server runs");
        kill(Pid::from_raw(child.id().try_into().unwrap()), signal).unwrap();
    }

    fn end(&mut self, signal: Signal) {
        if self.child.is_some() {
            self.signal(signal);
            // A paused server gets the signal when it goes on.
            self.resume();
        }
        if let Some(mut child) = self.child.take() {
            child.wait().unwrap();
        }
    }
}

impl Drop for EtcdServer {
    fn drop(&mut self) {
        self.kill();
        // What is left behind in the place for temporary files is no reason to fail.
        let _ = fs::remove_dir_all(&self.data);
    }
}

/// A loopback address that no other caller, here or in another test program, has.
fn loopback_address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let [_, _, high, low] = std::process::id().to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, high, low, NEXT.fetch_add(1, Ordering::Relaxed)))
}
