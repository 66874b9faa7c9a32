//! What people and machines see of a running daemon.
//!
//! | file | what |
//! | --- | --- |
//! | [`board`] | where the daemon writes what it is doing |
//! | [`status`] | one moment of it, as a value |
//! | [`socket`] | gives that to `flanneld status` |
//! | [`health`] | the health port: `/healthz`, `/readyz`, and `/metrics` |
//! | `limit` | its bounds |
//! | [`metrics`] | the same for Prometheus |
//! | [`registry`] | watches how the registry answers |
//! | [`outage`] | how the daemon speaks of trouble that lasts |
//! | [`lines`] | and of trouble that thousands have |

pub mod board;
pub mod health;
mod limit;
pub mod lines;
pub mod metrics;
pub mod outage;
pub mod registry;
pub mod socket;
pub mod status;

use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt,
    layer::SubscriberExt,
    util::SubscriberInitExt,
};

/// Sends logs to standard error. `verbosity` is the original's `-v`: 0 tells what happens, 1 to 4 also why (debug), from 5
/// on everything (trace). The libraries below are heard from 5 on only, and then their warnings up to 8.
pub fn log_to_stderr(verbosity: u8) {
    let own = match verbosity {
        0 => LevelFilter::INFO,
        1..=4 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let libraries = match verbosity {
        0..=4 => LevelFilter::OFF,
        5..=8 => LevelFilter::WARN,
        _ => LevelFilter::DEBUG,
    };
    let lines = fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false);
    let chosen = Targets::new()
        .with_default(libraries)
        .with_target(env!("CARGO_CRATE_NAME"), own);
    // Fails only when a subscriber is set already; that one then serves.
    let _ = tracing_subscriber::registry().with(chosen).with(lines).try_init();
}

/// An error and what caused it, in one line: `tried this: because of that`.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let text = error.to_string();
        // Some libraries repeat their cause in their own text.
        if !line.ends_with(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        cause = error.source();
    }
    line.replace('\n', " ")
}
