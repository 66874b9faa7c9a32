//! What both directions of a worker go by.

use crate::route_table::RouteTable;

use super::{counters::Counters, fallbacks::Fallbacks, refusal::Refusals};

/// For one batch.
pub(super) struct Context<'a> {
    pub(super) routes: &'a RouteTable,
    pub(super) refusals: &'a mut Refusals,
    pub(super) counters: &'a Counters,
    pub(super) fallbacks: &'a Fallbacks,
}
