//! Telling senders, at a limited rate, that their packets went no further.

use std::{net::IpAddr, time::Instant};

use crate::{
    packet::{IcmpError, IpPacket, icmp, icmpv6},
    route_table::RouteTable,
};

use super::{
    IcmpSource,
    io::{DatagramSink, LocalSink},
    rate_limit::RateLimit,
};

pub(super) struct Refusals {
    source: IcmpSource,
    limit: RateLimit,
    reply: Box<[u8; icmpv6::MAX_ERROR_LEN]>,
}

impl Refusals {
    /// With one of `sharers` equal shares of the host's limit.
    pub(super) fn new(source: IcmpSource, sharers: usize) -> Self {
        Self {
            source,
            limit: RateLimit::icmp_share(sharers, Instant::now()),
            reply: Box::new([0; icmpv6::MAX_ERROR_LEN]),
        }
    }

    /// For a packet of this host or its containers; whether an answer went out.
    pub(super) fn answer_local(&mut self, packet: &[u8], error: IcmpError, local: &mut impl LocalSink) -> bool {
        let Some((length, to)) = self.compose(packet, error) else {
            return false;
        };
        local.send(&self.reply[..length], to).is_ok()
    }

    /// For a packet that came from a peer; whether an answer went out.
    pub(super) fn answer_remote(
        &mut self,
        packet: &[u8],
        error: IcmpError,
        routes: &RouteTable,
        peers: &mut impl DatagramSink,
    ) -> bool {
        let Some((length, to)) = self.compose(packet, error) else {
            return false;
        };
        let peer = routes.lookup(to);
        peer.is_some_and(|peer| peers.send_one(&self.reply[..length], peer.addr).is_ok())
    }

    /// The answer's length in `reply` and its receiver; `None` when there must be none.
    fn compose(&mut self, packet: &[u8], error: IcmpError) -> Option<(usize, IpAddr)> {
        let to = IpPacket::parse(packet).ok()?.src();
        let reply = &mut self.reply[..];
        let length = match to {
            IpAddr::V4(_) => icmp::error_reply(packet, error, self.source.v4, reply)?,
            IpAddr::V6(_) => icmpv6::error_reply(packet, error, self.source.v6?, reply)?,
        };
        self.limit.allow(Instant::now()).then_some((length, to))
    }
}
