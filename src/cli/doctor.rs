//! `flanneld doctor`: what is wrong on this host, and what to do about it.

use std::{
    io::{self, Write},
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

use clap::Args;
use regex::Regex;
use serde_json::json;

use super::{
    RegistryArgs,
    run_args::{public_ip, regex},
};
use crate::{
    doctor::{self, Check, Group, Options, State},
    kernel::external::Wish,
    observe::socket,
};

/// `flanneld doctor`.
#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// For programs: a list of objects with `check`, `state` (`ok`, `warn`, `fail`), `what` and `remedy`
    #[arg(long)]
    json: bool,
    /// Ask all other hosts, not only the first 50
    #[arg(long)]
    all_peers: bool,
    /// The subnet file of the daemon
    #[arg(
        long,
        env = "FLANNELD_SUBNET_FILE",
        value_name = "FILE",
        default_value = "/run/flannel/subnet.env"
    )]
    subnet_file: PathBuf,
    /// The daemon's status socket, where it was given another one than that beside its subnet file
    #[arg(long, env = "FLANNELD_STATUS_SOCKET", value_name = "PATH")]
    status_socket: Option<PathBuf>,
    /// As the daemon was given it
    #[arg(long, env = "FLANNELD_IFACE", value_name = "NAME|IP", value_delimiter = ',')]
    iface: Vec<String>,
    /// As the daemon was given it
    #[arg(long, env = "FLANNELD_IFACE_REGEX", value_name = "REGEX", value_parser = regex)]
    iface_regex: Vec<Regex>,
    /// As the daemon was given it
    #[arg(long, env = "FLANNELD_IFACE_CAN_REACH", value_name = "IP")]
    iface_can_reach: Option<IpAddr>,
    /// As the daemon was given it
    #[arg(long, env = "FLANNELD_PUBLIC_IP", value_name = "IP", value_parser = public_ip)]
    public_ip: Option<Ipv4Addr>,
}

impl DoctorArgs {
    fn options(&self, registry: &RegistryArgs) -> Options {
        let socket = self.status_socket.clone();
        Options {
            registry: registry.open().map_err(|error| error.to_string()),
            etcd: registry.registry_dir.is_none().then(|| registry.etcd_config()),
            status_socket: socket.unwrap_or_else(|| socket::beside(&self.subnet_file)),
            subnet_file: self.subnet_file.clone(),
            external: Wish {
                interfaces: self.iface.clone(),
                patterns: self.iface_regex.clone(),
                can_reach: self.iface_can_reach,
                public_ip: self.public_ip,
            },
            all_peers: self.all_peers,
        }
    }
}

/// Examines this host and says on `out` what was found: whether anything is wrong.
///
/// # Errors
/// The answer could not be written, or there are no threads to look with.
pub fn run(args: &DoctorArgs, registry: &RegistryArgs, out: &mut impl Write) -> io::Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let checks = runtime.block_on(async {
        // Connecting to etcd needs the runtime already.
        doctor::examine(&args.options(registry)).await
    });
    // Does not wait for a name server or a daemon that does not answer.
    runtime.shutdown_background();
    let text = if args.json { to_json(&checks) } else { render(&checks) };
    out.write_all(text.as_bytes())?;
    Ok(checks.iter().any(|check| check.state == State::Fail))
}

/// For programs.
fn to_json(checks: &[Check]) -> String {
    let list: Vec<_> = checks
        .iter()
        .map(|check| {
            json!({
                "check": check.full_name(),
                "state": check.state,
                "what": check.what,
                "remedy": check.remedy,
            })
        })
        .collect();
    // Strings and lists of them have a JSON form.
    serde_json::to_string_pretty(&list).unwrap_or_default() + "\n"
}

/// For people: a line for each check, then what to do.
fn render(checks: &[Check]) -> String {
    let width = checks.iter().map(|check| check.name.len()).max().unwrap_or_default();
    let mut lines = Vec::new();
    let mut group: Option<Group> = None;
    for check in checks {
        if group != Some(check.group) {
            group = Some(check.group);
            lines.push(check.group.title().to_owned());
        }
        lines.push(format!(
            "  {:<4}  {:<width$}  {}",
            word(check.state),
            check.name,
            check.what
        ));
    }
    lines.push(String::new());
    let mut found: Vec<&Check> = checks.iter().filter(|check| check.state > State::Ok).collect();
    // What is wrong before what is only odd; the order of the groups, which build on one another, stays.
    found.sort_by_key(|check| std::cmp::Reverse(check.state));
    if found.is_empty() {
        lines.push("Nothing is wrong.".to_owned());
    }
    for check in found {
        lines.push(format!("{} {}: {}", word(check.state), check.full_name(), check.what));
        lines.extend(check.remedy.iter().map(|remedy| format!("     -> {remedy}")));
    }
    lines.join("\n") + "\n"
}

fn word(state: State) -> &'static str {
    match state {
        State::Ok => "ok",
        State::Warn => "WARN",
        State::Fail => "FAIL",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(group: Group, name: &str, state: State, what: &str, remedy: Option<&str>) -> Check {
        Check {
            group,
            name: name.to_owned(),
            state,
            what: what.to_owned(),
            remedy: remedy.map(str::to_owned),
        }
    }

    fn checks() -> Vec<Check> {
        vec![
            check(Group::Registry, "etcd", State::Ok, "it answers", None),
            check(Group::Lease, "lease", State::Warn, "could not look: why", None),
            check(Group::Peers, "192.0.2.2", State::Fail, "it is down", Some("start it")),
        ]
    }

    #[test]
    fn each_check_has_a_line_and_findings_follow_with_what_is_wrong_first() {
        let expected = "\
Registry
  ok    etcd       it answers
Lease
  WARN  lease      could not look: why
Peers
  FAIL  192.0.2.2  it is down

FAIL peers/192.0.2.2: it is down
     -> start it
WARN lease/lease: could not look: why
";
        assert_eq!(render(&checks()), expected);
        assert!(render(&checks()[..1]).ends_with("\n\nNothing is wrong.\n"));
    }

    #[test]
    fn programs_get_a_list() {
        let list: serde_json::Value = serde_json::from_str(&to_json(&checks())).unwrap();
        assert_eq!(
            list[2],
            json!({"check": "peers/192.0.2.2", "state": "fail", "what": "it is down", "remedy": "start it"})
        );
        assert_eq!(list[0]["remedy"], serde_json::Value::Null);
    }
}
