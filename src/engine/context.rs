//! What both directions of a worker go by.

use std::sync::Arc;

use crate::route_table::{RouteTable, RoutesReader};

use super::{
    counters::{Counters, coarse_uptime},
    fallbacks::Fallbacks,
    flows::Flows,
    refusal::Refusals,
};

/// For one batch.
pub(super) struct Context<'a> {
    pub(super) routes: &'a RouteTable,
    pub(super) refusals: &'a mut Refusals,
    pub(super) counters: &'a Counters,
    pub(super) fallbacks: &'a Fallbacks,
    pub(super) flows: &'a mut Flows,
}

/// For all batches of a worker.
pub(super) struct Common {
    pub(super) routes: RoutesReader,
    pub(super) refusals: Refusals,
    pub(super) counters: Arc<Counters>,
    pub(super) fallbacks: Arc<Fallbacks>,
    pub(super) flows: Flows,
}

impl Common {
    /// For the next batch, with the routes and the time of now.
    pub(super) fn context(&mut self) -> Context<'_> {
        self.flows.set_time(coarse_uptime());
        Context {
            routes: self.routes.load(),
            refusals: &mut self.refusals,
            counters: &self.counters,
            fallbacks: &self.fallbacks,
            flows: &mut self.flows,
        }
    }
}
