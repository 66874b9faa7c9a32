//! From what the user gave on the command line to servers that can be connected to.

use std::{
    fmt, fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use rustls::{
    RootCertStore,
    pki_types::{
        CertificateDer, PrivateKeyDer,
        pem::{self, PemObject},
    },
};
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity, Uri};
use tracing::warn;

/// How often an open watch is asked for a sign of life. etcd ends connections that ask more than every 5 s
/// (`--grpc-keepalive-min-time`); with some distance to that, a silent server is noticed after this and
/// [`PING_PATIENCE`]: 13 s.
const PING_INTERVAL: Duration = Duration::from_secs(8);

/// How long the answer to such a question may take, unless the cluster is known to be slower.
const PING_PATIENCE: Duration = Duration::from_secs(5);

/// The part of a file's mode that is for all who are neither its owner nor in its group.
const EVERYONE: u32 = 0o007;

/// Where etcd listens, if the user does not say.
const DEFAULT_PORT: u16 = 2379;

/// How to reach etcd: the `--etcd-*` flags.
#[derive(Clone, Default)]
pub struct EtcdConfig {
    /// `--etcd-endpoints`: URLs of the cluster's members. Without a scheme: `https` when there is a TLS file, else `http`.
    pub endpoints: Vec<String>,
    /// `--etcd-prefix`: where the network's keys are; slashes at its ends do not matter.
    pub prefix: String,
    /// `--etcd-cafile`: PEM file with the authorities that sign the servers' certificates.
    pub ca_file: Option<PathBuf>,
    /// `--etcd-certfile`: PEM file with the client's certificate.
    pub cert_file: Option<PathBuf>,
    /// `--etcd-keyfile`: PEM file with the key of that certificate.
    pub key_file: Option<PathBuf>,
    /// `--etcd-username`.
    pub username: Option<String>,
    /// `--etcd-password`.
    pub password: Option<String>,
    /// `--etcd-password-file`: where the password is, if it is not given itself.
    pub password_file: Option<PathBuf>,
}

impl fmt::Debug for EtcdConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let EtcdConfig {
            endpoints,
            prefix,
            ca_file,
            cert_file,
            key_file,
            username,
            password: _,
            password_file,
        } = self;
        f.debug_struct("EtcdConfig")
            .field("endpoints", endpoints)
            .field("prefix", prefix)
            .field("ca_file", ca_file)
            .field("cert_file", cert_file)
            .field("key_file", key_file)
            .field("username", username)
            .field("password_file", password_file)
            .finish_non_exhaustive()
    }
}

/// What is wrong with an [`EtcdConfig`]. Nothing has been sent yet; only the user can mend it.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// There is no endpoint.
    #[error("--etcd-endpoints is empty: give at least one, such as http://127.0.0.1:2379")]
    NoEndpoint,
    /// An endpoint is not a URL of an etcd member.
    #[error("--etcd-endpoints: \"{endpoint}\" {reason}: write http://HOST:PORT or https://HOST:PORT")]
    Endpoint {
        /// As the user wrote it, but for a password in it.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// `https` without an authority to check the server against.
    #[error("{endpoint} is https and needs --etcd-cafile: the certificate of the authority that signed etcd's own")]
    NoAuthority {
        /// The first such endpoint.
        endpoint: String,
    },
    /// A client certificate without its key, or the reverse.
    #[error("{given} is given without {missing}: a client certificate needs both")]
    HalfIdentity {
        /// The flag that is given.
        given: &'static str,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// A user name without a password, or the reverse.
    #[error("{given} is given without {missing}: etcd wants both or neither")]
    HalfCredentials {
        /// The flag that is given.
        given: &'static str,
        /// The flag that is missing.
        missing: &'static str,
    },
    /// The password's file holds none.
    #[error("--etcd-password-file {} is empty: write the password on its first line", .path.display())]
    NoPassword {
        /// The file.
        path: PathBuf,
    },
    /// A file cannot be read.
    #[error("reading {flag} {} failed: {error}", .path.display())]
    Unreadable {
        /// Which flag names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A TLS file does not hold what it should.
    #[error("{flag} {} holds no usable {wanted}: {reason}", .path.display())]
    NotPem {
        /// Which flag names the file.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What it should hold.
        wanted: &'static str,
        /// Why it does not.
        reason: String,
    },
    /// Certificate and key are each readable but do not work together.
    #[error("--etcd-certfile and --etcd-keyfile cannot be used for {endpoint}: {reason}")]
    Identity {
        /// For which endpoint they were to be used.
        endpoint: String,
        /// Why not.
        reason: String,
    },
}

/// Where a member of the cluster is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Its URL, for people.
    pub url: String,
    /// Its name or address; an IPv6 address without brackets.
    pub host: String,
    /// Its port for clients.
    pub port: u16,
}

/// One member of the cluster.
#[derive(Debug)]
pub(super) struct Server {
    /// Its URL, for people.
    pub(super) url: String,
    /// Without TLS, which is made from the files for each connection.
    plain: Endpoint,
    /// For `https`.
    tls: Option<Mutex<Tls>>,
}

/// TLS by files that may be replaced at any time: certificates are renewed every few weeks, and the daemon is not to be started
/// again for that.
#[derive(Debug)]
struct Tls {
    files: TlsFiles,
    /// As the files were when they could last be used: a certificate that is there before its key is no reason to stop.
    good: Endpoint,
    /// What was last said to be wrong with them.
    wrong: Option<String>,
}

impl Server {
    /// What to connect to. `patience`: how long an answer may take.
    pub(super) fn endpoint(&self, patience: Duration) -> Endpoint {
        let endpoint = match &self.tls {
            None => self.plain.clone(),
            Some(tls) => {
                // An endpoint and a text are whole at any moment.
                let mut tls = tls.lock().unwrap_or_else(PoisonError::into_inner);
                match tls.files.endpoint(&self.url, &self.plain) {
                    Ok(endpoint) => {
                        tls.good = endpoint;
                        tls.wrong = None;
                    }
                    Err(error) => {
                        let error = error.to_string();
                        if tls.wrong.as_ref() != Some(&error) {
                            warn!("using the TLS files as they were before: {error}");
                            tls.wrong = Some(error);
                        }
                    }
                }
                tls.good.clone()
            }
        };
        endpoint.keep_alive_timeout(patience.max(PING_PATIENCE))
    }

    pub(super) fn is_secure(&self) -> bool {
        self.tls.is_some()
    }
}

/// The files that TLS is made of.
#[derive(Debug, Clone)]
struct TlsFiles {
    ca: PathBuf,
    /// Certificate and key.
    identity: Option<(PathBuf, PathBuf)>,
}

impl TlsFiles {
    /// Reads them.
    fn endpoint(&self, url: &str, plain: &Endpoint) -> Result<Endpoint, ConfigError> {
        let authority = Certificate::from_pem(certificates("--etcd-cafile", &self.ca)?);
        let mut tls = ClientTlsConfig::new().ca_certificate(authority);
        if let Some(identity) = &self.identity {
            tls = tls.identity(read_identity(identity)?);
        }
        plain.clone().tls_config(tls).map_err(|error| ConfigError::Identity {
            endpoint: url.to_owned(),
            reason: super::reason::innermost(&error),
        })
    }
}

fn read_identity((cert, key): &(PathBuf, PathBuf)) -> Result<Identity, ConfigError> {
    Ok(Identity::from_pem(
        certificates("--etcd-certfile", cert)?,
        read_pem("--etcd-keyfile", key, "private key", |pem| {
            PrivateKeyDer::from_pem_slice(pem).map(drop)
        })?,
    ))
}

/// User name and password; prints neither.
#[derive(Clone)]
pub(super) struct Credentials {
    pub(super) username: String,
    pub(super) password: String,
    /// Where the password is from: it may be replaced there at any time.
    file: Option<PathBuf>,
}

impl Credentials {
    /// The password as it is now; that of the start while the file cannot be read.
    pub(super) fn current_password(&self) -> String {
        let file = self.file.as_ref();
        file.and_then(|path| password_in(path).ok())
            .unwrap_or_else(|| self.password.clone())
    }

    /// Whether the password may be another one than before.
    pub(super) fn may_change(&self) -> bool {
        self.file.is_some()
    }
}

impl EtcdConfig {
    /// Where the members are that are to be asked.
    ///
    /// # Errors
    /// What the user must mend in the flags.
    pub fn members(&self) -> Result<Vec<Member>, ConfigError> {
        let members = self.servers()?.into_iter().map(|server| {
            let uri = server.plain.uri();
            let host = uri.host().unwrap_or_default();
            Member {
                host: host.trim_matches(['[', ']']).to_owned(),
                port: uri.port_u16().unwrap_or(DEFAULT_PORT),
                url: server.url,
            }
        });
        Ok(members.collect())
    }

    pub(super) fn servers(&self) -> Result<Vec<Server>, ConfigError> {
        // A comma in a password makes two endpoints of one, so that neither is to be quoted.
        if self.endpoints.iter().any(|endpoint| endpoint.contains('@')) {
            return Err(ConfigError::Endpoint {
                endpoint: "...@...".to_owned(),
                reason: "holds a user name, which belongs into --etcd-username and --etcd-password".to_owned(),
            });
        }
        let tls = self.tls()?;
        let servers: Vec<Server> = self
            .endpoints
            .iter()
            .map(|written| self.server(written.trim(), tls.as_ref()))
            .collect::<Result<_, _>>()?;
        if servers.is_empty() {
            Err(ConfigError::NoEndpoint)
        } else {
            Ok(servers)
        }
    }

    pub(super) fn credentials(&self) -> Result<Option<Credentials>, ConfigError> {
        // An empty value is one that is not set: that is how an environment variable is switched off in a unit file.
        let username = self.username.clone().filter(|name| !name.is_empty());
        let given = self.password.clone().filter(|password| !password.is_empty());
        let file = self.password_file.clone().filter(|_| given.is_none());
        let password = match &file {
            Some(path) => Some(read_password(path)?),
            None => given,
        };
        match (username, password) {
            (Some(username), Some(password)) => Ok(Some(Credentials {
                username,
                password,
                file,
            })),
            (None, None) => Ok(None),
            (Some(_), None) => Err(ConfigError::HalfCredentials {
                given: "--etcd-username",
                missing: "--etcd-password-file or --etcd-password",
            }),
            (None, Some(_)) => Err(ConfigError::HalfCredentials {
                given: match self.password_file {
                    Some(_) => "--etcd-password-file",
                    None => "--etcd-password",
                },
                missing: "--etcd-username",
            }),
        }
    }

    fn server(&self, written: &str, tls: Option<&TlsFiles>) -> Result<Server, ConfigError> {
        let wrong = |reason: &str| ConfigError::Endpoint {
            endpoint: written.to_owned(),
            reason: reason.to_owned(),
        };
        let scheme = match (written.contains("://"), self.has_tls_files()) {
            (true, _) => "",
            (false, true) => "https://",
            (false, false) => "http://",
        };
        let uri: Uri = format!("{scheme}{written}")
            .parse()
            .map_err(|error| wrong(&format!("is not a URL ({error})")))?;
        let secure = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(wrong("is neither http nor https")),
        };
        if uri.path_and_query().is_some_and(|path| path != "/") {
            return Err(wrong("has something after the port"));
        }
        let host = uri
            .host()
            .filter(|host| !host.is_empty())
            .ok_or_else(|| wrong("names no host"))?;
        // What stands behind the host and is no port the parser passes over in silence.
        let authority = uri.authority().map_or("", |authority| authority.as_str());
        let port = match (uri.port_u16(), authority.strip_prefix(host)) {
            (Some(port), _) => port,
            (None, Some("")) => DEFAULT_PORT,
            (None, _) => return Err(wrong("has a port that is none (1 to 65535)")),
        };
        let url = format!("{}://{host}:{port}", if secure { "https" } else { "http" });

        let plain = Endpoint::from_shared(url.clone())
            .map_err(|error| wrong(&format!("is not a URL ({error})")))?
            .http2_keep_alive_interval(PING_INTERVAL)
            // etcd takes questions on a connection without a running watch or call for an attack.
            .keep_alive_while_idle(false);
        let tls = match (secure, tls) {
            (false, _) => None,
            (true, None) => return Err(ConfigError::NoAuthority { endpoint: url }),
            (true, Some(files)) => Some(Mutex::new(Tls {
                good: files.endpoint(&url, &plain)?,
                files: files.clone(),
                wrong: None,
            })),
        };
        Ok(Server { url, plain, tls })
    }

    fn has_tls_files(&self) -> bool {
        self.ca_file.is_some() || self.cert_file.is_some() || self.key_file.is_some()
    }

    /// `None` without an authority; the files are checked in any case.
    fn tls(&self) -> Result<Option<TlsFiles>, ConfigError> {
        let identity = match (&self.cert_file, &self.key_file) {
            (Some(cert), Some(key)) => Some((cert.clone(), key.clone())),
            (None, None) => None,
            (Some(_), None) => {
                return Err(ConfigError::HalfIdentity {
                    given: "--etcd-certfile",
                    missing: "--etcd-keyfile",
                });
            }
            (None, Some(_)) => {
                return Err(ConfigError::HalfIdentity {
                    given: "--etcd-keyfile",
                    missing: "--etcd-certfile",
                });
            }
        };
        if let Some(identity) = &identity {
            read_identity(identity)?;
        }
        let Some(ca) = &self.ca_file else { return Ok(None) };
        certificates("--etcd-cafile", ca)?;
        Ok(Some(TlsFiles {
            ca: ca.clone(),
            identity,
        }))
    }
}

/// As [`password_in`], with a warning where others may read it, too.
fn read_password(path: &Path) -> Result<String, ConfigError> {
    let password = password_in(path)?;
    if fs::metadata(path).is_ok_and(|file| file.mode() & EVERYONE != 0) {
        warn!(
            "everyone on this host may read the password in {}: `chmod 600` it",
            path.display()
        );
    }
    Ok(password)
}

/// The first line of a file.
fn password_in(path: &Path) -> Result<String, ConfigError> {
    let text = fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
        flag: "--etcd-password-file",
        path: path.to_owned(),
        error,
    })?;
    let password = text.lines().next().unwrap_or_default();
    if password.is_empty() {
        return Err(ConfigError::NoPassword { path: path.to_owned() });
    }
    Ok(password.to_owned())
}

/// Reads a PEM file with at least one certificate, all of which can be used.
fn certificates(flag: &'static str, path: &Path) -> Result<Vec<u8>, ConfigError> {
    let pem = read_pem(flag, path, "certificate", |pem| {
        CertificateDer::from_pem_slice(pem).map(drop)
    })?;
    let mut store = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let added = certificate
            .map_err(|error| why_not_pem(&error))
            .and_then(|certificate| {
                // The TLS library passes over what it cannot use, and then no server's certificate is any good.
                store.add(certificate).map_err(|error| error.to_string())
            });
        added.map_err(|reason| ConfigError::NotPem {
            flag,
            path: path.to_owned(),
            wanted: "certificate",
            reason,
        })?;
    }
    Ok(pem)
}

fn read_pem(
    flag: &'static str,
    path: &Path,
    wanted: &'static str,
    check: impl FnOnce(&[u8]) -> Result<(), pem::Error>,
) -> Result<Vec<u8>, ConfigError> {
    let pem = fs::read(path).map_err(|error| ConfigError::Unreadable {
        flag,
        path: path.to_owned(),
        error,
    })?;
    check(&pem).map_err(|error| ConfigError::NotPem {
        flag,
        path: path.to_owned(),
        wanted,
        reason: why_not_pem(&error),
    })?;
    Ok(pem)
}

/// In words of our own: the library's quote what they stumble over, which may be the whole key.
fn why_not_pem(error: &pem::Error) -> String {
    match error {
        pem::Error::NoItemsFound => "there is none in PEM form",
        pem::Error::MissingSectionEnd { .. } => "it has no END line, or its line breaks are lost",
        pem::Error::IllegalSectionStart { .. } => "its BEGIN line is not as it should be",
        pem::Error::Base64Decode(_) => "what stands between BEGIN and END is not base64",
        pem::Error::SectionTooLarge => "it is too long",
        pem::Error::Io(error) => return error.to_string(),
        _ => "it is not in PEM form",
    }
    .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(endpoint: &str) -> EtcdConfig {
        EtcdConfig {
            endpoints: vec![endpoint.to_owned()],
            ..EtcdConfig::default()
        }
    }

    fn url(endpoint: &str) -> String {
        config(endpoint).servers().unwrap().remove(0).url
    }

    fn error(config: &EtcdConfig) -> String {
        match (config.servers(), config.credentials()) {
            (Err(error), _) | (_, Err(error)) => error.to_string(),
            _ => panic!("{config:?} is fine"),
        }
    }

    #[test]
    fn scheme_and_port_may_be_left_out() {
        assert_eq!(url("http://192.0.2.1:4001"), "http://192.0.2.1:4001");
        assert_eq!(url("http://192.0.2.1:4001/"), "http://192.0.2.1:4001");
        assert_eq!(url("192.0.2.1:4001"), "http://192.0.2.1:4001");
        assert_eq!(url(" etcd.example "), "http://etcd.example:2379");
        assert_eq!(url("http://[2001:db8::1]"), "http://[2001:db8::1]:2379");
    }

    #[test]
    fn what_is_no_endpoint_is_named() {
        assert!(error(&EtcdConfig::default()).contains("--etcd-endpoints is empty"));
        assert!(error(&config("ftp://192.0.2.1")).contains("neither http nor https"));
        assert!(error(&config("http://192.0.2.1/v3")).contains("after the port"));
        assert!(error(&config("http://")).contains("\"http://\""));
        for port in ["99999", "", "0x1"] {
            let endpoint = format!("http://192.0.2.1:{port}");
            assert!(error(&config(&endpoint)).contains(&endpoint), "{endpoint}");
        }
        assert!(error(&config("")).contains("\"\""));
    }

    #[test]
    fn a_password_in_an_endpoint_is_refused_and_not_repeated() {
        let error = error(&config("http://root:secret@192.0.2.1:2379"));
        assert!(
            error.contains("--etcd-password") && !error.contains("secret"),
            "{error}"
        );
    }

    #[test]
    fn no_password_is_ever_printed() {
        let config = EtcdConfig {
            password: Some("secret".to_owned()),
            ..config("192.0.2.1")
        };
        assert!(!format!("{config:?}").contains("secret"));
    }

    #[test]
    fn a_password_is_the_first_line_of_its_file_unless_one_is_given() {
        let path = std::env::temp_dir().join(format!("flannel-password-{}", std::process::id()));
        let with_file = |password: Option<&str>| EtcdConfig {
            username: Some("flannel".to_owned()),
            password: password.map(str::to_owned),
            password_file: Some(path.clone()),
            ..config("192.0.2.1")
        };
        let password = |given| with_file(given).credentials().unwrap().unwrap().password;
        assert!(error(&with_file(None)).contains("reading --etcd-password-file"));
        fs::write(&path, "se cret\nanother\n").unwrap();
        assert_eq!(password(None), "se cret");
        assert_eq!(password(Some("")), "se cret");
        assert_eq!(password(Some("given")), "given");
        fs::write(&path, "\n").unwrap();
        let message = error(&with_file(None));
        fs::remove_file(&path).unwrap();
        assert!(message.contains("is empty"), "{message}");
    }

    #[test]
    fn https_needs_an_authority() {
        assert!(error(&config("https://192.0.2.1:2379")).contains("needs --etcd-cafile"));
    }

    #[test]
    fn halves_are_named() {
        let certificate = EtcdConfig {
            cert_file: Some("/nowhere".into()),
            ..config("192.0.2.1")
        };
        assert!(error(&certificate).contains("--etcd-certfile is given without --etcd-keyfile"));
        let user = EtcdConfig {
            username: Some("root".to_owned()),
            ..config("192.0.2.1")
        };
        assert!(error(&user).contains("--etcd-username is given without --etcd-password-file"));
    }

    #[test]
    fn tls_files_that_are_missing_or_no_pem_are_named_with_their_flag() {
        let missing = EtcdConfig {
            ca_file: Some("/nowhere/ca.pem".into()),
            ..config("192.0.2.1")
        };
        assert!(
            error(&missing).contains("reading --etcd-cafile /nowhere/ca.pem failed"),
            "{}",
            error(&missing)
        );

        let path = std::env::temp_dir().join(format!("flannel-config-{}.pem", std::process::id()));
        fs::write(&path, "not PEM").unwrap();
        let no_pem = EtcdConfig {
            ca_file: Some(path.clone()),
            ..config("192.0.2.1")
        };
        let message = error(&no_pem);
        fs::remove_file(&path).unwrap();
        assert!(
            message.contains("--etcd-cafile") && message.contains("none in PEM form"),
            "{message}"
        );
    }
}
