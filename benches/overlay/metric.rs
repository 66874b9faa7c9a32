//! What is measured, how it is written, and which way is better.

use clap::ValueEnum;
use serde::Serialize;

/// One measurement, as `--only` names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Test {
    /// UDP ping-pong on an idle machine.
    Ping,
    /// One TCP stream; also the processor time that it takes.
    Tcp1,
    /// Four TCP streams.
    Tcp4,
    /// One TCP stream each way at once.
    TcpBoth,
    /// UDP datagrams of 64 bytes, one flow.
    Udp64,
    /// UDP datagrams of 64 bytes, eight flows.
    Udp64x8,
    /// UDP datagrams of 1,400 bytes, one flow.
    Udp1400,
    /// UDP datagrams of 1,400 bytes, eight flows.
    Udp1400x8,
    /// UDP ping-pong while one TCP stream saturates the machine.
    PingLoaded,
}

/// One figure; a test yields one or more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Metric {
    /// Received, Gbit/s.
    Tcp1,
    /// Received, Gbit/s, all streams together.
    Tcp4,
    /// Received, Gbit/s, both directions together.
    TcpBoth,
    /// Processor time of the whole machine for one GB (10^9 bytes) received in [`Test::Tcp1`], seconds.
    CpuPerGb,
    /// Datagrams of 64 bytes a second at a loss of at most 1 %, thousands, one flow.
    Udp64,
    /// The same with eight flows.
    Udp64x8,
    /// The same with 1,400 bytes and one flow.
    Udp1400,
    /// The same with 1,400 bytes and eight flows.
    Udp1400x8,
    /// What is delivered of an offer at full speed, as a share of the best rate, percent.
    Overload64,
    /// The same with eight flows.
    Overload64x8,
    /// The same with 1,400 bytes and one flow.
    Overload1400,
    /// The same with 1,400 bytes and eight flows.
    Overload1400x8,
    /// Half of all round trips take no longer, µs; idle.
    PingP50,
    /// 99 % of all round trips take no longer, µs; idle.
    PingP99,
    /// As [`Metric::PingP50`], beside a saturating TCP stream.
    LoadedP50,
    /// As [`Metric::PingP99`], beside a saturating TCP stream.
    LoadedP99,
    /// The most memory that the daemon had resident, MiB; the larger of the two hosts.
    Memory,
}

/// Which way a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Better {
    /// Throughput.
    More,
    /// Time and memory.
    Less,
}

impl Metric {
    /// All, in the order of the tables.
    pub(crate) const ALL: [Metric; 17] = [
        Metric::Tcp1,
        Metric::Tcp4,
        Metric::TcpBoth,
        Metric::Udp64,
        Metric::Udp64x8,
        Metric::Udp1400,
        Metric::Udp1400x8,
        Metric::Overload64,
        Metric::Overload64x8,
        Metric::Overload1400,
        Metric::Overload1400x8,
        Metric::CpuPerGb,
        Metric::PingP50,
        Metric::PingP99,
        Metric::LoadedP50,
        Metric::LoadedP99,
        Metric::Memory,
    ];

    /// What it is, for people.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Metric::Tcp1 => "TCP, 1 stream",
            Metric::Tcp4 => "TCP, 4 streams",
            Metric::TcpBoth => "TCP, both directions at once",
            Metric::CpuPerGb => "CPU time per GB, TCP 1 stream",
            Metric::Udp64 => "UDP 64 bytes, 1 flow",
            Metric::Udp64x8 => "UDP 64 bytes, 8 flows",
            Metric::Udp1400 => "UDP 1,400 bytes, 1 flow",
            Metric::Udp1400x8 => "UDP 1,400 bytes, 8 flows",
            Metric::Overload64 => "overloaded: 64 bytes, 1 flow",
            Metric::Overload64x8 => "overloaded: 64 bytes, 8 flows",
            Metric::Overload1400 => "overloaded: 1,400 bytes, 1 flow",
            Metric::Overload1400x8 => "overloaded: 1,400 bytes, 8 flows",
            Metric::PingP50 => "round trip, idle, median",
            Metric::PingP99 => "round trip, idle, 99 %",
            Metric::LoadedP50 => "round trip beside TCP, median",
            Metric::LoadedP99 => "round trip beside TCP, 99 %",
            Metric::Memory => "memory of the daemon",
        }
    }

    /// Its unit.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Metric::Tcp1 | Metric::Tcp4 | Metric::TcpBoth => "Gbit/s",
            Metric::CpuPerGb => "s",
            Metric::Udp64 | Metric::Udp64x8 | Metric::Udp1400 | Metric::Udp1400x8 => "kpps",
            Metric::Overload64 | Metric::Overload64x8 | Metric::Overload1400 | Metric::Overload1400x8 => "% of best",
            Metric::PingP50 | Metric::PingP99 | Metric::LoadedP50 | Metric::LoadedP99 => "µs",
            Metric::Memory => "MiB",
        }
    }

    /// Which way is better.
    pub(crate) fn better(self) -> Better {
        match self {
            Metric::CpuPerGb
            | Metric::PingP50
            | Metric::PingP99
            | Metric::LoadedP50
            | Metric::LoadedP99
            | Metric::Memory => Better::Less,
            _ => Better::More,
        }
    }

    /// Whether its ratio to that of another overlay says something: a share of the own best does not, nor does the memory
    /// of a daemon where the other has none.
    pub(crate) fn has_ratio(self) -> bool {
        !matches!(self.unit(), "% of best" | "MiB")
    }

    /// `value` with as many decimals as it deserves.
    pub(crate) fn format(self, value: f64) -> String {
        let decimals = match self.unit() {
            "Gbit/s" | "s" => 2,
            "MiB" => 1,
            _ => 0,
        };
        format!("{value:.decimals$}")
    }
}
