//! Puts the rules in place and keeps them there.

use std::{convert::Infallible, future::pending, path::Path};

use tokio::{sync::oneshot, time::sleep};
use tracing::{debug, info, warn};

use super::{
    Error, Family, Options, Rules, host,
    iptables::{self, Iptables, Variant},
    nftables::{self, Nftables},
};
use crate::{lease::record::Subnets, network::Network, observe::outage::Outage};

/// The program that puts rules in place.
#[derive(Debug)]
pub struct Mechanism(Option<Program>);

#[derive(Debug)]
enum Program {
    Iptables(Iptables),
    Nftables(Nftables),
}

impl Mechanism {
    /// Takes what the network's configuration says, or the other one where that is not installed. Without either, forwarded
    /// packets are left to whoever else has rules for them.
    ///
    /// # Errors
    /// [`Error::NoTool`] when it is needed.
    pub async fn choose(options: &Options, network: &Network) -> Result<Mechanism, Error> {
        if !options.masquerade && !options.forward {
            return Ok(Mechanism(None));
        }
        let iptables = Iptables::of_host().await.map(Program::Iptables);
        let nftables = Nftables::find().map(Program::Nftables);
        let (first, second) = if network.enable_nftables() {
            (nftables, iptables)
        } else {
            (iptables, nftables)
        };
        if first.is_none()
            && let Some(second) = &second
        {
            let (has, lacks) = match second {
                Program::Iptables(_) => ("iptables", "EnableNFTables is set, and nft is not installed"),
                Program::Nftables(_) => ("nftables", "EnableNFTables is not set, and iptables is not installed"),
            };
            warn!("{lacks}: the traffic rules go to {has}");
        }
        let chosen = first.or(second);
        if chosen.is_none() {
            if options.masquerade {
                return Err(Error::NoTool);
            }
            warn!(
                "neither iptables nor nft is installed: no rule lets the overlay's packets pass. Nothing else may drop them \
                 either; --iptables-forward-rules=false says that this is as it should be"
            );
        }
        Ok(Mechanism(chosen))
    }
}

/// A program for rules: says what is there, and changes it in one transaction.
pub(super) trait Tables {
    /// What is there of ours in one family. Equal ones need no looking after.
    type Picture: PartialEq;

    /// What is there now.
    async fn look(&self, family: Family) -> Result<Self::Picture, Error>;

    /// Makes `rules` of it.
    async fn put(&self, picture: &Self::Picture, rules: &Rules) -> Result<(), Error>;

    /// Whether it can be what `rules` look like once they are there.
    fn is_complete(picture: &Self::Picture, rules: &Rules) -> bool;

    /// What drops forwarded packets of IPv4 whatever our rules accept.
    async fn obstacle(&self) -> Result<Option<Obstacle>, Error>;
}

impl Tables for Iptables {
    type Picture = iptables::Picture;

    async fn look(&self, family: Family) -> Result<Self::Picture, Error> {
        self.look(family).await
    }

    async fn put(&self, picture: &Self::Picture, rules: &Rules) -> Result<(), Error> {
        self.put(picture, rules).await
    }

    fn is_complete(picture: &Self::Picture, rules: &Rules) -> bool {
        picture.is_complete(rules)
    }

    async fn obstacle(&self) -> Result<Option<Obstacle>, Error> {
        if self.is(Variant::Nft) {
            obstacle(Some(iptables::NFT_FORWARD), true).await
        } else {
            obstacle(None, false).await
        }
    }
}

impl Tables for Nftables {
    type Picture = nftables::Picture;

    async fn look(&self, family: Family) -> Result<Self::Picture, Error> {
        self.look(family).await
    }

    async fn put(&self, picture: &Self::Picture, rules: &Rules) -> Result<(), Error> {
        self.put(picture, rules).await
    }

    fn is_complete(picture: &Self::Picture, rules: &Rules) -> bool {
        picture.is_complete(rules)
    }

    async fn obstacle(&self) -> Result<Option<Obstacle>, Error> {
        obstacle(None, true).await
    }
}

/// A chain of someone else whose policy is to drop. The kernel asks each chain at its place, and one that drops is enough.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Obstacle {
    chain: String,
    remedy: &'static str,
}

/// Looks for one besides our own chain in nftables, and in the tables of legacy iptables if those are not ours.
async fn obstacle(ours: Option<&str>, in_legacy: bool) -> Result<Option<Obstacle>, Error> {
    if let Some(nftables) = Nftables::find()
        && let Some(chain) = nftables.dropping_chain(ours).await?
    {
        return Ok(Some(Obstacle {
            remedy: if chain == iptables::NFT_FORWARD {
                "`iptables-nft -P FORWARD ACCEPT`; for Docker, from version 28 on, \"ip-forward-no-drop\": true in its daemon.json"
            } else {
                "`nft chain FAMILY TABLE CHAIN '{ policy accept; }'`"
            },
            chain: format!("{chain} of nftables"),
        }));
    }
    if in_legacy
        && let Some(legacy) = Iptables::variant(Variant::Legacy)
        && legacy.drops_forwarded().await?
    {
        return Ok(Some(Obstacle {
            chain: "FORWARD of iptables-legacy".to_owned(),
            remedy: "`iptables-legacy -P FORWARD ACCEPT`",
        }));
    }
    Ok(None)
}

/// Keeps this host's rules in place.
#[derive(Debug)]
pub struct Keeper {
    options: Options,
    mechanism: Mechanism,
    rules: [Rules; 2],
}

impl Keeper {
    /// For this host's subnets in the network.
    pub fn new(options: Options, mechanism: Mechanism, network: &Network, subnets: &Subnets) -> Keeper {
        Keeper {
            options,
            mechanism,
            rules: Rules::of(&options, network, subnets),
        }
    }

    /// Puts the rules in place, takes away those of earlier runs, and keeps it so for as long as this is awaited.
    ///
    /// `in_place` is told when packets may come: the rules are there, or those that are missing only let pass what other rules
    /// may let pass as well. What fails is tried again. `repaired` is called each time when rules that others had changed are
    /// back.
    pub async fn keep(self, in_place: oneshot::Sender<()>, repaired: impl Fn()) -> Infallible {
        let Keeper {
            options,
            mechanism,
            rules,
        } = self;
        let iptables = matches!(mechanism.0, Some(Program::Iptables(_)));
        for warning in host::warnings(Path::new(host::SYSCTLS), &rules, options.masquerade, iptables) {
            warn!("{warning}");
        }
        match mechanism.0 {
            None => {
                sweep(None).await;
                // Nobody listens any more when the daemon ends.
                let _ = in_place.send(());
                pending().await
            }
            Some(Program::Iptables(tool)) => {
                info!("traffic rules by {}", tool.describe());
                let sweep = async { sweep(Some(&Program::Iptables(tool.clone()))).await };
                keep_with(&tool, &options, rules, sweep, in_place, repaired).await
            }
            Some(Program::Nftables(tool)) => {
                info!("traffic rules by nftables");
                let sweep = async { sweep(Some(&Program::Nftables(tool.clone()))).await };
                keep_with(&tool, &options, rules, sweep, in_place, repaired).await
            }
        }
    }
}

/// One family's rules, and what they look like.
struct Kept<P> {
    rules: Rules,
    settled: Option<P>,
    outage: Outage,
}

impl<P: PartialEq> Kept<P> {
    /// Whether others had changed them.
    async fn ensure<T: Tables<Picture = P>>(&mut self, tool: &T) -> Result<bool, Error> {
        let family = self.rules.family;
        let found = tool.look(family).await?;
        if self.settled.as_ref() == Some(&found) {
            return Ok(false);
        }
        let before = self.settled.take();
        tool.put(&found, &self.rules).await?;
        // How the program writes our rules is up to it: what it says now is what is to stay.
        let now = tool.look(family).await?;
        if !T::is_complete(&now, &self.rules) {
            return Err(Error::NotThere(family));
        }
        if before.is_some() {
            warn!(
                "another program has changed or removed the {} traffic rules: they are back",
                family.name()
            );
        }
        self.settled = Some(now);
        Ok(before.is_some())
    }
}

async fn keep_with<T: Tables>(
    tool: &T,
    options: &Options,
    rules: [Rules; 2],
    sweep: impl Future<Output = ()>,
    in_place: oneshot::Sender<()>,
    repaired: impl Fn(),
) -> Infallible {
    let mut kept: Vec<Kept<T::Picture>> = Vec::new();
    for rules in rules {
        if rules.is_empty() {
            // An earlier run may have had some.
            remove(tool, rules.family).await;
        } else {
            let outage = Outage::of(match rules.family {
                Family::V4 => "putting the IPv4 traffic rules in place",
                Family::V6 => "putting the IPv6 traffic rules in place",
            });
            kept.push(Kept {
                rules,
                settled: None,
                outage,
            });
        }
    }
    let mut first = Some((sweep, in_place));
    let mut obstacle_said = None;
    loop {
        let mut pause = options.resync;
        for kept in &mut kept {
            match kept.ensure(tool).await {
                Ok(were_changed) => {
                    kept.outage.over();
                    if were_changed {
                        repaired();
                    }
                }
                Err(error) => pause = pause.min(kept.outage.failed(&crate::observe::chain(&error))),
            }
        }
        // Without the rules for it, packets would leave the overlay with addresses that nobody out there can answer to.
        let may_begin = !options.masquerade || kept.iter().all(|kept| kept.settled.is_some());
        if may_begin && let Some((sweep, in_place)) = first.take() {
            // Only now: at no moment are there neither the old rules nor the new ones.
            sweep.await;
            let _ = in_place.send(());
        }
        if options.forward {
            // Docker, whose chain it mostly is, starts after us.
            let obstacle = tool.obstacle().await.unwrap_or_else(|error| {
                debug!("cannot look for chains that drop what is forwarded: {error}");
                None
            });
            if let Some(Obstacle { chain, remedy }) = &obstacle
                && obstacle_said != obstacle
            {
                warn!(
                    "the policy of the chain {chain} is to drop what is forwarded, and no other chain's rules, such as flanneld's, can save a \
                     packet from that. Unless rules of its own accept the overlay's packets, set its policy to accept: {remedy}"
                );
            }
            obstacle_said = obstacle;
        }
        sleep(pause).await;
    }
}

/// Takes away what an earlier run has left where this one, with its rules by `used`, does not look after it.
async fn sweep(used: Option<&Program>) {
    let mut unused = Vec::new();
    match used {
        Some(Program::Iptables(tool)) => unused.extend(Iptables::variant(tool.other())),
        _ => {
            unused.extend(Iptables::of_host().await);
            unused.extend(
                [Variant::Nft, Variant::Legacy]
                    .into_iter()
                    .filter_map(Iptables::variant),
            );
        }
    }
    for tool in unused {
        for family in Family::ALL {
            remove(&tool, family).await;
        }
    }
    if !matches!(used, Some(Program::Nftables(_)))
        && let Some(tool) = Nftables::find()
    {
        for family in Family::ALL {
            remove(&tool, family).await;
        }
    }
}

/// Removes all of ours in one family.
async fn remove(tool: &impl Tables, family: Family) {
    let picture = match tool.look(family).await {
        Ok(picture) => picture,
        // A kernel without IPv6, for one, has no such rules.
        Err(error) => {
            return debug!(
                "cannot look for {} traffic rules of an earlier run: {error}",
                family.name()
            );
        }
    };
    if let Err(error) = tool.put(&picture, &Rules::none(family)).await {
        warn!(
            "cannot remove the {} traffic rules of an earlier run: {error}",
            family.name()
        );
    }
}
