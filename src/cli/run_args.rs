//! The daemon's own flags.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use clap::{ArgAction, ArgMatches, Args};
use regex::Regex;

use super::{
    Place,
    go_flags::{BOOL, boolean},
};
use crate::{
    backend::udp::{self, IoMode, TunMode},
    daemon::Settings,
    kernel::external::Wish,
    lease::remembered::{self, Memory},
    observe::socket,
    registry::Registry,
    rules,
    sandbox::Sandbox,
};

/// The longest life of a lease in minutes: a day, of which the margin must leave something.
const LEASE_MINUTES: u64 = 24 * 60;

/// More workers than this only take turns: a host has fewer queues on its network card.
const MOST_WORKERS: usize = 64;

const RULES: &str = "Traffic rules (by iptables; by nftables when the network has EnableNFTables)";

const INTERFACE: &str = "Interface (default: the one of the default route)";

/// What `flanneld` without a subcommand is told.
#[derive(Debug, Clone, Args)]
pub struct RunArgs {
    /// The interface to the other hosts, by name or address; repeat it: the first that is there counts
    #[arg(
        long,
        env = "FLANNELD_IFACE",
        value_name = "NAME|IP",
        value_delimiter = ',',
        help_heading = INTERFACE
    )]
    pub iface: Vec<String>,

    /// The same by a regular expression on addresses, then names; repeatable, tried after --iface
    #[arg(
        long,
        env = "FLANNELD_IFACE_REGEX",
        value_name = "REGEX",
        value_parser = regex,
        help_heading = INTERFACE
    )]
    pub iface_regex: Vec<Regex>,

    /// The interface, and the address on it, that packets to this address leave by
    #[arg(
        long,
        env = "FLANNELD_IFACE_CAN_REACH",
        value_name = "IP",
        help_heading = INTERFACE
    )]
    pub iface_can_reach: Option<IpAddr>,

    /// The address at which the other hosts reach this one, if it is not the interface's
    #[arg(
        long,
        env = "FLANNELD_PUBLIC_IP",
        value_name = "IP",
        value_parser = public_ip,
        help_heading = INTERFACE
    )]
    pub public_ip: Option<Ipv4Addr>,

    /// The same for IPv6
    #[arg(
        long,
        env = "FLANNELD_PUBLIC_IPV6",
        value_name = "IP",
        help_heading = INTERFACE
    )]
    pub public_ipv6: Option<Ipv6Addr>,

    /// Where to write this host's subnet and MTU for Docker and others
    #[arg(
        long,
        env = "FLANNELD_SUBNET_FILE",
        value_name = "FILE",
        default_value = "/run/flannel/subnet.env",
        help_heading = "Subnet"
    )]
    pub subnet_file: PathBuf,

    /// Where to remember configuration and leases, for a start while etcd is away (default: beside the subnet file, as in
    /// /run/flannel/subnet.state)
    #[arg(long, env = "FLANNELD_STATE_FILE", value_name = "FILE", help_heading = "Subnet")]
    pub state_file: Option<PathBuf>,

    /// Renew the lease this many minutes before it runs out, 1 to 1439
    #[arg(
        long,
        env = "FLANNELD_SUBNET_LEASE_RENEW_MARGIN",
        value_name = "MINUTES",
        default_value = "60",
        value_parser = renew_margin,
        help_heading = "Subnet"
    )]
    pub subnet_lease_renew_margin: Duration,

    /// Masquerade what leaves the overlay network
    #[arg(
        long,
        env = "FLANNELD_IP_MASQ",
        value_name = BOOL,
        default_value = "false",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = RULES
    )]
    pub ip_masq: bool,

    /// Masquerade without random ports
    #[arg(
        long,
        env = "FLANNELD_IP_MASQ_FULLY_RANDOM_DISABLE",
        value_name = BOOL,
        default_value = "false",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = RULES
    )]
    pub ip_masq_fully_random_disable: bool,

    /// Look after the rules each so many seconds
    #[arg(
        long,
        env = "FLANNELD_IPTABLES_RESYNC",
        value_name = "SECONDS",
        default_value = "5",
        value_parser = seconds,
        help_heading = RULES
    )]
    pub iptables_resync: Duration,

    /// Let forwarded packets of the overlay network pass
    #[arg(
        long,
        env = "FLANNELD_IPTABLES_FORWARD_RULES",
        value_name = BOOL,
        default_value = "true",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = RULES
    )]
    pub iptables_forward_rules: bool,

    /// Drop packets to addresses of this host's subnet that no container has
    #[arg(
        long,
        env = "FLANNELD_IP_BLACKHOLE_ROUTE",
        value_name = BOOL,
        default_value = "false",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = RULES
    )]
    pub ip_blackhole_route: bool,

    /// Where /healthz and /readyz listen
    #[arg(
        long,
        env = "FLANNELD_HEALTHZ_IP",
        value_name = "IP",
        default_value = "0.0.0.0",
        help_heading = "Health"
    )]
    pub healthz_ip: IpAddr,

    /// Their port; 0 turns them off
    #[arg(
        long,
        env = "FLANNELD_HEALTHZ_PORT",
        value_name = "PORT",
        default_value = "0",
        help_heading = "Health"
    )]
    pub healthz_port: u16,

    /// Where `flanneld status` finds the daemon (default: beside the subnet file, as in /run/flannel/subnet.sock)
    #[arg(long, env = "FLANNELD_STATUS_SOCKET", value_name = "PATH", help_heading = "Health")]
    pub status_socket: Option<PathBuf>,

    /// Whether to give up, once set up, all of root's rights that are not needed: on or off
    #[arg(
        long,
        env = "FLANNELD_SANDBOX",
        value_name = "on|off",
        default_value = "on",
        value_parser = on_or_off,
        action = ArgAction::Set,
        help_heading = "Security"
    )]
    pub sandbox: bool,

    /// Go on in the place of the daemon that runs on this host, which then ends: no packet is lost. Without one, start as always
    #[arg(
        long,
        env = "FLANNELD_HANDOVER",
        value_name = BOOL,
        default_value = "false",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = "Restart"
    )]
    pub handover: bool,

    /// How many threads carry packets, up to 64; 0: as many as the CPUs call for
    #[arg(
        long,
        env = "FLANNELD_WORKERS",
        value_name = "N",
        default_value = "0",
        value_parser = workers,
        help_heading = "udp backend"
    )]
    pub workers: Workers,

    /// Let the kernel hand over and take packets in bulk; without, each goes by itself
    #[arg(
        long,
        env = "FLANNELD_OFFLOAD",
        value_name = BOOL,
        default_value = "true",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = "udp backend"
    )]
    pub offload: bool,

    /// The same as --offload=false
    #[arg(
        long,
        env = "FLANNELD_NO_OFFLOAD",
        value_name = BOOL,
        default_value = "false",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = "udp backend"
    )]
    pub no_offload: bool,

    /// How to open the TUN device: auto, with whatever the kernel can do; plain, one queue through tun-tap
    #[arg(
        long,
        env = "FLANNELD_TUN",
        value_name = "HOW",
        default_value = "auto",
        value_parser = tun,
        help_heading = "udp backend"
    )]
    pub tun: TunMode,

    /// How to move packets: mmsg, with system calls for batches; uring, with io_uring; auto, with what is best here
    #[arg(
        long,
        env = "FLANNELD_IO",
        value_name = "HOW",
        default_value = "auto",
        value_parser = io,
        help_heading = "udp backend"
    )]
    pub io: IoMode,

    /// Keep each worker on a CPU of its own
    #[arg(
        long,
        env = "FLANNELD_PIN",
        value_name = BOOL,
        default_value = "false",
        value_parser = boolean,
        action = ArgAction::Set,
        help_heading = "udp backend"
    )]
    pub pin: bool,

    /// How long a worker looks for packets before it sleeps: lower latency for a CPU's time; 0: it sleeps at once
    #[arg(
        long,
        env = "FLANNELD_BUSY_POLL",
        value_name = "MICROSECONDS",
        default_value = "0",
        value_parser = microseconds,
        help_heading = "udp backend"
    )]
    pub busy_poll: Duration,
}

impl RunArgs {
    /// The files that the daemon writes.
    pub(super) fn written(&self) -> Vec<PathBuf> {
        vec![self.subnet_file.clone(), self.socket(), self.state()]
    }

    fn socket(&self) -> PathBuf {
        let named = self.status_socket.clone();
        named.unwrap_or_else(|| socket::beside(&self.subnet_file))
    }

    fn state(&self) -> PathBuf {
        let named = self.state_file.clone();
        named.unwrap_or_else(|| remembered::beside(&self.subnet_file))
    }

    /// What the daemon is to do with `registry`, confined by `sandbox`.
    pub fn settings(self, registry: Arc<dyn Registry>, sandbox: Sandbox) -> Settings {
        let (status_socket, state_file) = (self.socket(), self.state());
        Settings {
            registry,
            external: Wish {
                interfaces: self.iface,
                patterns: self.iface_regex,
                can_reach: self.iface_can_reach,
                public_ip: self.public_ip,
            },
            public_ipv6: self.public_ipv6,
            status_socket,
            memory: Memory::new(state_file),
            subnet_file: self.subnet_file,
            renew_margin: self.subnet_lease_renew_margin,
            health: (self.healthz_port != 0).then(|| SocketAddr::new(self.healthz_ip, self.healthz_port)),
            blackhole_route: self.ip_blackhole_route,
            rules: rules::Options {
                masquerade: self.ip_masq,
                fully_random: !self.ip_masq_fully_random_disable,
                forward: self.iptables_forward_rules,
                resync: self.iptables_resync,
            },
            udp: udp::Options {
                workers: self.workers,
                offload: self.offload,
                tun: self.tun,
                io: self.io,
                pin: self.pin,
                busy_poll: self.busy_poll,
            },
            handover: self.handover,
            sandbox,
        }
    }

    /// Turns offloads off where `--no-offload` says so. The command line wins over the environment.
    ///
    /// # Errors
    /// For people, on one line: when both flags are given at the same place and contradict each other.
    pub(super) fn settle(&mut self, matches: &ArgMatches) -> Result<(), String> {
        if !self.no_offload || !self.offload {
            return Ok(());
        }
        let offload = Place::of("offload", matches);
        let no_offload = Place::of("no_offload", matches);
        if offload == no_offload {
            let flags = match offload {
                Place::CommandLine => "--offload=true and --no-offload",
                _ => "FLANNELD_OFFLOAD and FLANNELD_NO_OFFLOAD",
            };
            return Err(format!("{flags} contradict each other: give one of them"));
        }
        self.offload = offload > no_offload;
        Ok(())
    }
}

/// How many threads carry packets; `None`: as many as the CPUs call for. (A name of its own, since clap takes an `Option`
/// that it sees for a flag that may be left out.)
pub type Workers = Option<NonZeroUsize>;

fn tun(text: &str) -> Result<TunMode, String> {
    match text {
        "auto" => Ok(TunMode::Auto),
        "plain" => Ok(TunMode::Plain),
        _ => Err("write auto or plain".to_owned()),
    }
}

fn io(text: &str) -> Result<IoMode, String> {
    match text {
        "auto" => Ok(IoMode::Auto),
        "mmsg" => Ok(IoMode::Mmsg),
        "uring" => Ok(IoMode::Uring),
        _ => Err("write auto, mmsg or uring".to_owned()),
    }
}

fn on_or_off(text: &str) -> Result<bool, String> {
    match text {
        "on" => Ok(true),
        "off" => Ok(false),
        _ => Err("write on or off".to_owned()),
    }
}

/// An address that packets can be sent to.
pub(super) fn public_ip(text: &str) -> Result<Ipv4Addr, String> {
    let address: Ipv4Addr = text.parse().map_err(|_| "give an IPv4 address".to_owned())?;
    if address.is_unspecified() || address.is_multicast() || address.is_broadcast() {
        return Err("give the address of one host, as the others reach it".to_owned());
    }
    Ok(address)
}

/// A pattern for `--iface-regex`.
pub(super) fn regex(text: &str) -> Result<Regex, String> {
    // The crate draws a picture of several lines, and the last one says what is wrong: `error: unclosed group`.
    Regex::new(text).map_err(|error| {
        let picture = error.to_string();
        let reason = picture.lines().last().unwrap_or_default();
        reason.trim_start_matches("error: ").to_owned()
    })
}

fn renew_margin(text: &str) -> Result<Duration, String> {
    let minutes = text.parse().ok().filter(|minutes| (1..LEASE_MINUTES).contains(minutes));
    let minutes = minutes.ok_or_else(|| format!("give minutes from 1 to {}", LEASE_MINUTES - 1))?;
    Ok(Duration::from_secs(minutes * 60))
}

fn seconds(text: &str) -> Result<Duration, String> {
    // A day: whoever wants to wait longer does not want it at all.
    const MOST: u64 = 86_400;
    let seconds = text.parse().ok().filter(|seconds| (1..=MOST).contains(seconds));
    seconds
        .map(Duration::from_secs)
        .ok_or_else(|| format!("give seconds from 1 to {MOST}, without a unit"))
}

fn microseconds(text: &str) -> Result<Duration, String> {
    // A second, thousands of times what a wake-up takes: whoever wants more wants workers that never sleep.
    const MOST: u64 = 1_000_000;
    let microseconds = text.parse().ok().filter(|microseconds| *microseconds <= MOST);
    microseconds
        .map(Duration::from_micros)
        .ok_or_else(|| format!("give microseconds from 0 to {MOST}, without a unit"))
}

fn workers(text: &str) -> Result<Workers, String> {
    let workers = text.parse().ok().filter(|workers| *workers <= MOST_WORKERS);
    workers
        .map(NonZeroUsize::new)
        .ok_or_else(|| format!("give a number from 0 to {MOST_WORKERS}"))
}
