//! What threads share without locks is made of these. Named in one place, so that the model of it (`tests/publication_model.rs`)
//! can put others there, between whose steps it lets other threads run.

pub(super) use std::sync::{
    OnceLock,
    atomic::{AtomicBool, AtomicU64},
};

pub(super) use arc_swap::ArcSwap;
