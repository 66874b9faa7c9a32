//! What went wrong between us and an etcd server, in words for people.

use std::{error::Error as StdError, io};

use rustls::{CertificateError, InvalidMessage};
use tonic::{Code, ConnectError, Status};

/// For a server that answers [`Fault::NoLeader`].
pub(super) const NO_LEADER: &str = "its cluster has no leader (are more than half of its members up?)";

const CLOSED: &str = "the server closed the connection";

/// What a failed call means for what to do next.
#[derive(Debug)]
pub(super) enum Fault {
    /// The server cannot be talked to; another may be better.
    Unreachable {
        reason: String,
        /// Whether the server may have carried out the call all the same.
        maybe_done: bool,
    },
    /// The connection ended while the server had the call; whether it has carried it out is not known.
    Broken { reason: String },
    /// The server has no leader and has done nothing: there is an election, or it is cut off from the others.
    NoLeader,
    /// The token that stands for user and password is missing or no longer good; a new one may be.
    StaleToken { reason: String },
    /// The server refuses this client.
    Denied { reason: String },
    /// The revision asked for is no longer kept.
    Compacted,
    /// The etcd lease that was to be used does not exist.
    NoLease,
    /// The cluster has no users, so it takes no password.
    AuthNotEnabled,
    /// The server understood and said no, for another reason.
    Refused { reason: String },
}

impl Fault {
    pub(super) fn timed_out(patience: std::time::Duration) -> Fault {
        Fault::Unreachable {
            reason: format!("timed out after {} s", patience.as_secs()),
            maybe_done: true,
        }
    }
}

impl From<etcd_client::Error> for Fault {
    fn from(error: etcd_client::Error) -> Fault {
        match error {
            etcd_client::Error::GRpcStatus(status) => Fault::from(status),
            etcd_client::Error::TransportError(error) => Fault::from(error),
            // The client's own word for a time to live of 0, which is etcd's for "no such lease".
            etcd_client::Error::LeaseKeepAliveError(reason) if reason == "lease not found" => Fault::NoLease,
            etcd_client::Error::LeaseKeepAliveError(reason) | etcd_client::Error::WatchError(reason) => {
                Fault::Broken { reason }
            }
            error => Fault::Refused {
                reason: error.to_string(),
            },
        }
    }
}

/// For failed connects.
impl From<tonic::transport::Error> for Fault {
    fn from(error: tonic::transport::Error) -> Fault {
        transport_fault(&error, unreached)
    }
}

impl From<Status> for Fault {
    fn from(status: Status) -> Fault {
        if let Some(source) = status.source() {
            // The connection may have to be made anew for a call, and then the call was not sent if that fails.
            let unsent = chain(source).any(|error| error.is::<ConnectError>());
            return transport_fault(source, if unsent { unreached } else { broken });
        }
        // etcd's texts are part of its interface (api/v3rpc/rpctypes/error.go); codes alone do not tell these apart.
        let message = status.message();
        let reason = message.to_owned();
        match (status.code(), message.strip_prefix("etcdserver: ").unwrap_or(message)) {
            (_, "invalid auth token" | "revision of auth store is old") => Fault::StaleToken { reason },
            (_, "authentication failed, invalid user ID or password") => Fault::Denied {
                reason: "wrong user name or password: check --etcd-username and --etcd-password".to_owned(),
            },
            // Either we have no password, or this connection is from before the cluster had users.
            (_, "user name is empty") => Fault::StaleToken {
                reason: "it wants a user name and password: give --etcd-username and --etcd-password".to_owned(),
            },
            (_, "authentication is not enabled") => Fault::AuthNotEnabled,
            (Code::PermissionDenied, _) => Fault::Denied {
                reason: "permission denied: the role of --etcd-username must be granted readwrite on --etcd-prefix \
                         (etcdctl role grant-permission --prefix=true)"
                    .to_owned(),
            },
            (Code::Unauthenticated, _) => Fault::Denied { reason },
            (_, "mvcc: database space exceeded") => Fault::Refused {
                reason: "etcd is full: compact and defragment it, then etcdctl alarm disarm".to_owned(),
            },
            (_, "no leader") => Fault::NoLeader,
            (_, "mvcc: required revision has been compacted") => Fault::Compacted,
            (_, "requested lease not found") => Fault::NoLease,
            // Leader changed, timed out inside, stopped, a proxy's word, a stream that just ended.
            (Code::Unavailable | Code::Cancelled | Code::DeadlineExceeded | Code::Unknown | Code::Internal, _) => {
                Fault::Unreachable {
                    reason,
                    maybe_done: true,
                }
            }
            _ => Fault::Refused { reason },
        }
    }
}

fn unreached(reason: String) -> Fault {
    let reason = if reason == CLOSED {
        format!("{CLOSED} at once: is it http where you wrote https?")
    } else {
        reason
    };
    Fault::Unreachable {
        reason,
        maybe_done: false,
    }
}

fn broken(cause: String) -> Fault {
    let reason = format!("connection lost ({cause})");
    Fault::Broken { reason }
}

/// The fault behind an error of the connection; `fault` makes it, unless the cause says that we are refused.
fn transport_fault(error: &(dyn StdError + 'static), fault: fn(String) -> Fault) -> Fault {
    for cause in chain(error) {
        let tls = cause.downcast_ref::<rustls::Error>();
        let io = cause.downcast_ref::<io::Error>();
        // An `io::Error` does not show what it wraps as its source.
        let tls = tls.or_else(|| io.and_then(|io| io.get_ref()).and_then(|inner| inner.downcast_ref()));
        if let Some(tls) = tls {
            return tls_fault(tls, fault);
        }
        if cause.to_string().starts_with("dns error") {
            return fault(format!("name not known ({})", innermost(cause)));
        }
        if let Some(reason) = io.and_then(|io| io_reason(io.kind())) {
            return fault(reason.to_owned());
        }
    }
    let reason = innermost(error);
    // Once HTTP/2 runs over it, all that is left of a TLS error is its text. A server of TLS 1.3 looks at the client's
    // certificate only then.
    match reason.strip_prefix("received fatal alert: ") {
        Some(alert) => alert_fault(alert, fault),
        None => fault(reason),
    }
}

fn io_reason(kind: io::ErrorKind) -> Option<&'static str> {
    Some(match kind {
        io::ErrorKind::ConnectionRefused => "connection refused",
        io::ErrorKind::HostUnreachable => "no route to host",
        io::ErrorKind::NetworkUnreachable => "network unreachable",
        io::ErrorKind::TimedOut => "timed out",
        io::ErrorKind::PermissionDenied => "not permitted by this host's firewall",
        io::ErrorKind::ConnectionReset
        | io::ErrorKind::ConnectionAborted
        | io::ErrorKind::BrokenPipe
        | io::ErrorKind::UnexpectedEof => CLOSED,
        _ => return None,
    })
}

fn tls_fault(error: &rustls::Error, fault: fn(String) -> Fault) -> Fault {
    let reason = match error {
        rustls::Error::AlertReceived(alert) => return alert_fault(&format!("{alert:?}"), fault),
        rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer) => {
            "TLS: certificate signed by unknown authority: is --etcd-cafile the one that signed it?".to_owned()
        }
        rustls::Error::InvalidCertificate(error) => format!("TLS: the server's {error}"),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            "TLS: the server does not speak TLS: is it http?".to_owned()
        }
        error => format!("TLS: {error}"),
    };
    fault(reason)
}

/// The fault behind a TLS alert of the server, by its name in rustls (RFC 8446 section 6.2 in camel case).
fn alert_fault(alert: &str, fault: fn(String) -> Fault) -> Fault {
    const ON_CLIENT_CERTIFICATE: [&str; 8] = [
        "BadCertificate",
        "UnsupportedCertificate",
        "CertificateRevoked",
        "CertificateExpired",
        "CertificateUnknown",
        "UnknownCA",
        "AccessDenied",
        "CertificateRequired",
    ];
    if ON_CLIENT_CERTIFICATE.contains(&alert) {
        let reason = format!(
            "TLS: the server does not accept the client's certificate ({alert}): check --etcd-certfile and --etcd-keyfile"
        );
        Fault::Denied { reason }
    } else {
        fault(format!("TLS: the server gave up ({alert})"))
    }
}

/// The text of the cause at the end of the chain; it is the one that says something.
pub(super) fn innermost(error: &(dyn StdError + 'static)) -> String {
    chain(error).last().map_or_else(String::new, ToString::to_string)
}

fn chain<'a>(error: &'a (dyn StdError + 'static)) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error: &&'a (dyn StdError + 'static)| (*error).source())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_password_names_the_flags() {
        let status = Status::invalid_argument("etcdserver: authentication failed, invalid user ID or password");
        let Fault::Denied { reason } = Fault::from(status) else {
            panic!("not denied")
        };
        assert!(reason.contains("--etcd-password"), "{reason}");
    }

    #[test]
    fn an_old_token_is_told_from_a_refusal() {
        assert!(matches!(
            Fault::from(Status::unauthenticated("etcdserver: invalid auth token")),
            Fault::StaleToken { .. }
        ));
        assert!(matches!(
            Fault::from(Status::permission_denied("etcdserver: permission denied")),
            Fault::Denied { .. }
        ));
    }

    #[test]
    fn a_missing_leader_is_told_from_one_that_changed_meanwhile() {
        let missing = Fault::from(Status::unavailable("etcdserver: no leader"));
        assert!(matches!(missing, Fault::NoLeader), "{missing:?}");
        let changed = Fault::from(Status::unavailable("etcdserver: leader changed"));
        assert!(
            matches!(changed, Fault::Unreachable { maybe_done: true, .. }),
            "{changed:?}"
        );
    }

    #[test]
    fn causes_inside_an_io_error_are_found() {
        let unknown = rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let error = io::Error::new(io::ErrorKind::InvalidData, unknown);
        let Fault::Unreachable { reason, .. } = transport_fault(&error, unreached) else {
            panic!("not unreachable")
        };
        assert!(
            reason.starts_with("TLS: certificate signed by unknown authority"),
            "{reason}"
        );
    }
}
