//! A start while the registry is away, refuses this host or takes no records: from what was last known, until the registry serves and
//! can be asked whether it is still so.

use std::time::Duration;

use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::{Error, Settings, configuration};
use crate::{
    lease::{
        acquire::Own,
        remembered::{Origin, Remembered},
    },
    network::{self, CONFIG_KEY, LoadError, Network, Parsed},
    observe::board::Board,
    registry::Registry,
};

/// How long a registry that does not serve this host is waited for before the start goes on from what was last known. A healthy one answers in milliseconds,
/// and packets wait all the while. Nothing is lost when one that is slow, or elects a leader, answers a moment later: what it
/// says then is what was remembered, or is put right.
pub(super) const PATIENCE: Duration = Duration::from_secs(1);

/// How often the registry is asked whether the configuration is still the same, until it answers: as often as it is asked for
/// everything else.
const RETRY: Duration = Duration::from_secs(5);

/// What a run begins with.
pub(super) struct Beginning {
    pub(super) network: Network,
    /// Its text.
    pub(super) config: String,
    /// What is of use while the registry does not serve this host.
    pub(super) remembered: Option<Remembered>,
    /// Whether the configuration is the registry's, not what was remembered.
    pub(super) configured: bool,
}

/// The lease that a run begins with.
pub(super) enum Leased {
    /// From the registry.
    Taken(Own),
    /// The registry gives none.
    Remembered(Remembered),
}

/// Reads the configuration; from the memory if there is one and the registry does not give it.
pub(super) async fn begin(settings: &Settings, registry: &dyn Registry) -> Result<Beginning, Error> {
    let remembered = settings.memory.read(&Origin::of(registry)).unwrap_or_else(|useless| {
        warn!("without the registry there is no start from what was last known: {useless}");
        None
    });
    let understood = remembered.and_then(|remembered| match Network::parse(&remembered.config) {
        Ok(Parsed { network, .. }) if remembered.own.lease.subnets.fit(&network) => Some((remembered, network)),
        _ => {
            warn!("without the registry there is no start from what was last known: it does not fit together");
            None
        }
    });
    if let Some((remembered, network)) = &understood
        && timeout(PATIENCE, answer(registry)).await.is_err()
    {
        return Ok(Beginning {
            network: network.clone(),
            config: remembered.config.clone(),
            remembered: Some(remembered.clone()),
            configured: false,
        });
    }
    let (network, config) = configuration(registry).await?;
    let still = understood.filter(|(_, remembered)| *remembered == network);
    Ok(Beginning {
        network,
        config,
        remembered: still.map(|(remembered, _)| remembered),
        configured: true,
    })
}

/// Waits until the registry says what its configuration is, or that there is none. One that refuses this host may just be getting other
/// keys.
async fn answer(registry: &dyn Registry) {
    // Shorter than the pauses of an outage that is told: this is over in a moment.
    const PAUSE: Duration = Duration::from_millis(200);
    while registry.get(CONFIG_KEY).await.is_err() {
        sleep(PAUSE).await;
    }
}

/// A run that has begun without the registry.
pub(super) struct Unverified {
    /// Whether the configuration is still the same.
    pub(super) configured: bool,
    /// Whether the registry has confirmed the lease.
    pub(super) leased: bool,
}

impl Unverified {
    /// Says so, on the board too. `configured`: whether the configuration was the registry's.
    pub(super) fn begin(registry: &dyn Registry, remembered: &Remembered, configured: bool, board: &Board) -> Self {
        let not = if configured {
            "take this host's claim or lease"
        } else {
            "answer this host's requests"
        };
        let text = format!(
            "started from the leases as they were {:.0?} ago, because {} did not {not} within {:.0?}",
            remembered.age,
            registry.describe(),
            PATIENCE
        );
        warn!(
            "{text}: subnet {}, {} peers. Packets flow; other hosts' changes are seen, and this host's lease is renewed, once it \
             answers",
            remembered.own.lease.subnets.to_cidrs(),
            remembered.peers.len()
        );
        board.degraded(Some(text));
        Self {
            configured,
            leased: false,
        }
    }

    /// Whether all is verified; says so.
    pub(super) fn is_over(&self, board: &Board) -> bool {
        let over = self.configured && self.leased;
        if over {
            board.degraded(None);
            info!("the registry answers: configuration and lease are as they were remembered");
        }
        over
    }
}

/// Waits until the registry has said that the configuration is the one that this run began with.
///
/// # Errors
/// It is another one.
pub(super) async fn still_configured(registry: &dyn Registry, network: &Network) -> Result<(), Error> {
    loop {
        match network::load(registry).await {
            Ok(parsed) if parsed.network == *network => return Ok(()),
            Ok(_) => return Err(Error::Reconfigured),
            // For the operator to mend; a daemon that runs needs it no more.
            Err(wrong @ (LoadError::Missing { .. } | LoadError::Invalid { .. })) => {
                warn!("{wrong}; going on with the one that was remembered");
                return Ok(());
            }
            // Of that the watch of the leases tells.
            Err(LoadError::Registry(_)) => sleep(RETRY).await,
        }
    }
}
