//! What the kernel has refused while the engine runs. All workers go by it, and each refusal is said once.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use tracing::warn;

use super::shared::{ArcSwap, AtomicBool};
use crate::offload::{GsoKind, Merge};

/// How long a peer whose route refuses segmented messages gets single ones before it is tried again: the route may have
/// changed.
const SEGMENTING_PAUSE: Duration = Duration::from_secs(60);

/// Peers and until when they get single datagrams.
type Refusing = Vec<(SocketAddr, Instant)>;

/// Shared by the workers of an engine.
#[derive(Debug, Default)]
pub struct Fallbacks {
    tun_tcp: AtomicBool,
    tun_udp: AtomicBool,
    /// Whether `refusing` is worth a look.
    any_refusing: AtomicBool,
    refusing: ArcSwap<Refusing>,
}

impl Fallbacks {
    /// What is left of `merge`.
    #[inline]
    pub fn limit(&self, merge: Merge) -> Merge {
        Merge {
            tcp: merge.tcp && !self.tun_tcp.load(Relaxed),
            udp: merge.udp && !self.tun_udp.load(Relaxed),
        }
    }

    /// The device has refused a superpacket of this kind.
    pub(super) fn device_refuses(&self, kind: GsoKind, error: &std::io::Error) {
        let (refused, protocol) = match kind {
            GsoKind::UdpL4 => (&self.tun_udp, "UDP"),
            _ => (&self.tun_tcp, "TCP"),
        };
        if !refused.swap(true, Relaxed) {
            warn!("the TUN device refuses superpackets of {protocol} ({error}): writing packet by packet");
        }
    }

    /// Whether a segmented message to `peer` was refused lately.
    #[inline]
    pub fn is_refusing(&self, peer: SocketAddr) -> bool {
        self.any_refusing.load(Relaxed) && self.has_refused(peer)
    }

    /// How many peers get single datagrams.
    pub fn refusing_peers(&self) -> usize {
        let now = Instant::now();
        self.refusing.load().iter().filter(|(_, until)| now < *until).count()
    }

    #[cold]
    fn has_refused(&self, peer: SocketAddr) -> bool {
        let now = Instant::now();
        let refusing = self.refusing.load();
        refusing.iter().any(|(refused, until)| *refused == peer && now < *until)
    }

    /// The way to `peer` has refused a segmented message.
    pub(super) fn route_refuses(&self, peer: SocketAddr, error: &std::io::Error) {
        if self.has_refused(peer) {
            return;
        }
        warn!("the way to {peer} refuses segmented messages ({error}): sending single datagrams for now");
        let now = Instant::now();
        self.refusing.rcu(|refusing| {
            let others = refusing
                .iter()
                .filter(|(refused, until)| *refused != peer && now < *until);
            let all: Refusing = others.copied().chain([(peer, now + SEGMENTING_PAUSE)]).collect();
            Arc::new(all)
        });
        self.any_refusing.store(true, Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn a_kind_that_the_device_refuses_is_merged_no_more() {
        let fallbacks = Fallbacks::default();
        assert_eq!(fallbacks.limit(Merge::ALL), Merge::ALL);
        fallbacks.device_refuses(GsoKind::UdpL4, &io::ErrorKind::InvalidInput.into());
        assert_eq!(fallbacks.limit(Merge::ALL), Merge { tcp: true, udp: false });
        fallbacks.device_refuses(GsoKind::TcpV6, &io::ErrorKind::InvalidInput.into());
        assert_eq!(fallbacks.limit(Merge::ALL), Merge::NOTHING);
    }

    #[test]
    fn a_peer_that_refuses_is_remembered_and_others_are_not() {
        let fallbacks = Fallbacks::default();
        let peer = |number: u8| SocketAddr::from(([192, 0, 2, number], 8285));
        assert!(!fallbacks.is_refusing(peer(1)));
        for number in [1, 2, 1] {
            fallbacks.route_refuses(peer(number), &io::ErrorKind::InvalidInput.into());
        }
        assert!(fallbacks.is_refusing(peer(1)) && fallbacks.is_refusing(peer(2)));
        assert!(!fallbacks.is_refusing(peer(3)));
        assert_eq!(fallbacks.refusing_peers(), 2);
    }
}
