//! What the demo is doing just now, on standard error: a spinner on a terminal, plain lines elsewhere.

use indicatif::ProgressBar;
use std::{
    cell::Cell,
    io::{IsTerminal, Write, stderr},
    time::{Duration, Instant},
};

/// On a terminal each word on how far a step is replaces the last one; elsewhere each is a line, so they must be rarer.
const LINE_EVERY: Duration = Duration::from_millis(500);

/// One step of the demo, from its start until [`Step::done`]; a step that is dropped earlier is shown as failed.
pub(super) struct Step {
    what: String,
    start: Instant,
    last_line: Cell<Instant>,
    bar: Option<ProgressBar>,
    finished: bool,
}

impl Step {
    /// Shows that `what` begins.
    pub(super) fn start(what: impl Into<String>) -> Step {
        let what = what.into();
        let bar = stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner().with_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let start = Instant::now();
        Step {
            what,
            start,
            last_line: Cell::new(start),
            bar,
            finished: false,
        }
    }

    /// Shows how far the step is.
    pub(super) fn tell(&self, how_far: &str) {
        match &self.bar {
            Some(bar) => bar.set_message(format!("{}: {how_far}", self.what)),
            None if self.last_line.get().elapsed() < LINE_EVERY => {}
            None => {
                self.last_line.set(Instant::now());
                print_line(&format!("demo:   {how_far}"));
            }
        }
    }

    /// Shows that the step is over, and what came of it.
    pub(super) fn done(mut self, outcome: &str) {
        self.finish("✓", outcome);
    }

    fn finish(&mut self, mark: &str, outcome: &str) {
        self.finished = true;
        let line = format!("{}: {outcome} ({:.1} s)", self.what, self.start.elapsed().as_secs_f32());
        match &self.bar {
            Some(bar) => {
                // Gone, and not merely finished: a finished bar leaves the cursor behind it on its line.
                bar.finish_and_clear();
                print_line(&format!("{mark} {line}"));
            }
            None => print_line(&format!("demo: {line}")),
        }
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.finish("✗", "not finished");
        }
    }
}

fn print_line(text: &str) {
    // A reader that has gone away is no reason to stop, and still less to panic, with a lab to be removed.
    let _ = writeln!(stderr(), "{text}");
}
