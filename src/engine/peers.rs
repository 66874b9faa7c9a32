//! Numbers for peers, under which the workers count.

use std::{collections::HashMap, net::IpAddr};

use crate::route_table::PeerId;

/// Gives each underlay address a number and never takes it back, so that what is counted stays its own.
#[derive(Debug, Default)]
pub struct PeerIds {
    ids: HashMap<IpAddr, PeerId>,
}

impl PeerIds {
    /// The number of the peer at `address`: [`PeerId::OTHERS`] when all have been given out.
    pub fn id(&mut self, address: IpAddr) -> PeerId {
        let next = self.ids.len() + 1;
        match self.ids.get(&address) {
            Some(id) => *id,
            // Not remembered when there is none left: the addresses of a lifetime have no bound.
            None => PeerId::new(next).map_or(PeerId::OTHERS, |id| *self.ids.entry(address).or_insert(id)),
        }
    }

    /// The address that has each number.
    pub fn addresses(&self) -> HashMap<PeerId, IpAddr> {
        self.ids.iter().map(|(address, id)| (*id, *address)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_keeps_its_number_and_shares_it_with_none() {
        let mut ids = PeerIds::default();
        let addresses: Vec<IpAddr> = (0..100u8).map(|number| [192, 0, 2, number].into()).collect();
        let first: Vec<PeerId> = addresses.iter().map(|address| ids.id(*address)).collect();
        let again: Vec<PeerId> = addresses.iter().map(|address| ids.id(*address)).collect();
        assert_eq!(first, again);
        let numbers: Vec<usize> = first.iter().map(|id| id.index()).collect();
        assert_eq!(numbers, (1..=100).collect::<Vec<_>>());
        assert_eq!(ids.addresses()[&first[7]], addresses[7]);
    }

    #[test]
    fn addresses_beyond_the_last_number_share_one() {
        let mut ids = PeerIds::default();
        for number in 1..PeerId::COUNT {
            ids.id((number as u128).to_be_bytes().into());
        }
        assert_eq!(ids.id([192, 0, 2, 1].into()), PeerId::OTHERS);
        assert_eq!(ids.id([192, 0, 2, 2].into()), PeerId::OTHERS);
        assert_eq!(ids.id(1u128.to_be_bytes().into()).index(), 1);
    }
}
