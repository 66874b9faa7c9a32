//! What others had changed in the kernel and was put right, counted.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
};

use crate::{
    kernel::entries::Operation,
    network::BackendKind,
    observe::{
        board::Report,
        status::{Backend, BackendReport},
    },
};

/// How often, by what it was. Clones share the count.
#[derive(Debug, Clone, Default)]
pub(super) struct Repairs(Arc<Mutex<BTreeMap<String, u64>>>);

impl Repairs {
    pub(super) fn count(&self, what: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what.to_owned()).or_default() += 1;
    }

    /// Goes on from what another process has counted.
    pub(super) fn count_from(&self, before: &BTreeMap<String, u64>) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        for (what, count) in before {
            *counts.entry(what.clone()).or_default() += count;
        }
    }

    pub(super) fn count_operation(&self, operation: &Operation) {
        self.count(match operation {
            Operation::PutRoute(_) | Operation::RemoveRoute(_) | Operation::RemoveFoundRoute(_) => "route",
            Operation::PutNeighbour(_) | Operation::RemoveNeighbour(_) => "neighbour",
            Operation::PutFdb(_) | Operation::RemoveFdb(_) => "fdb",
        });
    }

    pub(super) fn counts(&self) -> BTreeMap<String, u64> {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.clone()
    }

    /// What a backend tells that leaves the packets to the kernel.
    pub(super) fn report(&self, kind: BackendKind, device: Option<String>, mtu: u32) -> Report {
        let repairs = self.clone();
        Arc::new(move || BackendReport {
            backend: Backend {
                kind: kind.name().to_owned(),
                device: device.clone(),
                mtu,
                repairs: repairs.counts(),
                engine: None,
            },
            traffic: None,
        })
    }
}
