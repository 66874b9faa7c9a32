//! How many datagrams a second get through, and what happens beyond that.

use super::{
    super::{
        agent::{Counted, Offer},
        error::BenchError,
        search::{LOSS_LIMIT, Outcome, Search},
    },
    Slot,
};
use serde::Serialize;
use std::{thread, time::Duration};

/// Nothing has arrived for so long: what is still missing is lost. A queue of 1,000 packets empties in a fraction of that.
const QUIET: Duration = Duration::from_millis(30);

/// How often to look whether more has arrived.
const LOOKS: usize = 20;

/// Everything that was offered in one test.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Offers {
    /// As fast as the sender can.
    pub(super) full_speed: Outcome,
    /// The probes of the search, in their order.
    probes: Vec<Outcome>,
    /// The path carried all that the sender could offer; what that is, is the path's doing as well, when it is the sender's
    /// processor that does its work.
    all_carried: bool,
}

impl Slot<'_> {
    /// Finds the highest rate at a loss of at most [`LOSS_LIMIT`] for datagrams of so many bytes in so many flows; `None` when
    /// there is none. Also what was offered for that.
    pub(super) fn udp(&mut self, size: usize, flows: usize) -> Result<(Option<f64>, Offers), BenchError> {
        let durations = self.durations;
        let full_speed = self.offer(size, flows, None, durations.full_speed)?;
        let mut search = Search::new(full_speed, durations.probes);
        let mut probes = Vec::new();
        while let Some(rate) = search.next_rate() {
            let outcome = self.offer(size, flows, Some(rate), durations.probe)?;
            search.record(outcome);
            probes.push(outcome);
        }
        let offers = Offers {
            full_speed,
            probes,
            all_carried: full_speed.loss <= LOSS_LIMIT,
        };
        Ok((search.best(), offers))
    }

    fn offer(&mut self, size: usize, flows: usize, rate: Option<f64>, time: Duration) -> Result<Outcome, BenchError> {
        self.run += 1;
        let offer = Offer {
            from: self.hosts.a.overlay(),
            to: self.hosts.b.overlay(),
            run: self.run,
            flows,
            size,
            rate,
            seconds: time.as_secs_f64(),
        };
        let sent = self.sender.offer(offer, self.interrupt)?;
        let arrived = self.drain()?;
        let offered = sent.datagrams.max(1) as f64;
        // What a queue held back arrives after the end, and does not make the path any faster.
        let seconds = sent.seconds.max(arrived.seconds);
        Ok(Outcome {
            offered: offered / sent.seconds,
            delivered: arrived.datagrams as f64 / seconds,
            loss: 1.0 - arrived.datagrams as f64 / offered,
        })
    }

    /// What has arrived of the newest run once no more of it does. No event tells that.
    fn drain(&mut self) -> Result<Counted, BenchError> {
        let mut arrived = self.receiver.count(self.run, self.interrupt)?;
        for _ in 0..LOOKS {
            thread::sleep(QUIET);
            let now = self.receiver.count(self.run, self.interrupt)?;
            if now == arrived {
                break;
            }
            arrived = now;
        }
        Ok(arrived)
    }
}
