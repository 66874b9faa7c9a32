//! A table for each wire: a metric a line, a peer a column.

use super::super::{metric::Metric, peer::REFERENCE, wire::Wire};
use super::{Figure, Results, times};
use comfy_table::{CellAlignment, Table, presets};
use std::fmt::Write;

/// How many lines of a peer's log are shown; all of them are in the JSON.
const MOST_SAID: usize = 4;

/// For standard output.
pub(crate) fn text(results: &Results) -> String {
    let mut out = String::new();
    for wire in &results.wires {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(header(results).map(|name| name.to_uppercase()));
        table.add_rows(rows(results, *wire));
        for column in table.column_iter_mut().skip(2) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        // Writing to a string cannot fail, here as below.
        let _ = writeln!(out, "{}: {}\n\n{}\n", wire.name(), wire.meaning(), table.trim_fmt());
    }
    for line in notes(results) {
        let _ = writeln!(out, "{line}");
    }
    out
}

/// For the README.
pub(crate) fn markdown(results: &Results) -> String {
    let mut out = String::new();
    for wire in &results.wires {
        let columns = 2 + results.peers.len();
        let _ = writeln!(out, "**`{}`**: {}\n", wire.name(), wire.meaning());
        let _ = writeln!(out, "| {} |", header(results).collect::<Vec<_>>().join(" | "));
        let _ = writeln!(out, "| --- | --- |{}", " ---: |".repeat(columns - 2));
        for row in rows(results, *wire) {
            let _ = writeln!(out, "| {} |", row.join(" | "));
        }
        out.push('\n');
    }
    for line in notes(results) {
        let _ = writeln!(out, "- {line}");
    }
    out
}

fn header(results: &Results) -> impl Iterator<Item = String> {
    let peers = results.peers.iter().map(|peer| peer.name.clone());
    ["".to_owned(), "unit".to_owned()].into_iter().chain(peers)
}

/// A line for each metric that any peer has a figure of.
fn rows(results: &Results, wire: Wire) -> Vec<Vec<String>> {
    let row = |metric: Metric| {
        let figures: Vec<_> = results
            .peers
            .iter()
            .map(|peer| results.figure(wire, &peer.name, metric))
            .collect();
        figures.iter().any(Option::is_some).then(|| {
            let cells = figures
                .into_iter()
                .map(|figure| figure.map_or_else(|| "–".to_owned(), |figure| cell(metric, figure)));
            [metric.title().to_owned(), metric.unit().to_owned()]
                .into_iter()
                .chain(cells)
                .collect()
        })
    };
    Metric::ALL.into_iter().filter_map(row).collect()
}

/// `19.02 · 1.04× (1.01–1.07)`: the median, the median ratio to the reference, the extremes of the ratio; or the median alone.
fn cell(metric: Metric, figure: Figure) -> String {
    let value = metric.format(figure.value.median);
    match figure.ratio {
        Some(ratio) if ratio.rounds > 1 => {
            let [median, min, max] = [ratio.median, ratio.min, ratio.max].map(times);
            format!("{value} · {median}× ({min}–{max})")
        }
        Some(ratio) => format!("{value} · {}×", times(ratio.median)),
        None => value,
    }
}

/// How the figures came about, and what to think of them.
fn notes(results: &Results) -> Vec<String> {
    let mut notes = vec![
        results.machine.describe(),
        format!(
            "Medians of {}; × is the ratio to {REFERENCE} within each round, (lowest–highest).{}",
            counted(results.rounds as usize, "round"),
            if results.pinned {
                " Each host has one processor for itself."
            } else {
                ""
            }
        ),
        "UDP: the highest rate at a loss of at most 1 %. Overloaded: what is delivered of an offer at full speed."
            .to_owned(),
    ];
    let peers = results
        .peers
        .iter()
        .map(|peer| format!("{}: {}", peer.name, peer.meaning()));
    notes.push(format!("{}.", peers.collect::<Vec<_>>().join("; ")));
    for peer in &results.peers {
        let said = results.said(&peer.name).into_iter().take(MOST_SAID);
        notes.extend(said.map(|line| format!("{} says: {line}", peer.name)));
    }
    if let Some(noise) = results.noise() {
        notes.push(format!(
            "Processor time taken by others: median {:.1} %, at most {:.1} %; {} of {} noisy.",
            noise.share.median * 100.0,
            noise.share.max * 100.0,
            noise.noisy,
            counted(noise.share.rounds, "slot")
        ));
    }
    let failed = results.errors().count();
    if failed > 0 {
        notes.push(format!("{} failed.", counted(failed, "measurement")));
    }
    notes
}

fn counted(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::super::example;
    use super::*;

    /// The lines of the first table in Markdown.
    fn first_table(markdown: &str) -> Vec<&str> {
        let lines = markdown.lines().skip_while(|line| !line.starts_with('|'));
        lines.take_while(|line| line.starts_with('|')).collect()
    }

    #[test]
    fn ratio_and_its_extremes_stand_beside_the_value() {
        let markdown = markdown(&example::results());
        let expected = [
            "|  | unit | bare | vxlan | flanneld |",
            "| --- | --- | ---: | ---: | ---: |",
            "| TCP, 1 stream | Gbit/s | 20.00 · 2.00× (2.00–2.00) | 10.00 | 15.00 · 1.50× (1.40–1.60) |",
            "| round trip, idle, median | µs | 40 · 0.80× (0.80–0.80) | 50 | 60 · 1.20× (1.20–1.20) |",
            "| memory of the daemon | MiB | – | – | 12.5 |",
        ];
        assert_eq!(first_table(&markdown), expected, "{markdown}");
    }

    #[test]
    fn single_round_has_no_extremes() {
        let mut results = example::results();
        results.samples.retain(|sample| sample.round == 1);
        let markdown = markdown(&results);
        assert!(markdown.contains("| 10.00 | 14.00 · 1.40× |"), "{markdown}");
    }

    #[test]
    fn machine_noise_and_failures_are_told() {
        let mut results = example::results();
        results.samples[0].errors.push("it rained".to_owned());
        let text = text(&results);
        assert!(
            text.contains("Example CPU, 2 processors, Linux 6.18.0, 2026-01-02, commit abc"),
            "{text}"
        );
        assert!(text.contains("Medians of 3 rounds"), "{text}");
        assert!(
            text.contains("median 1.0 %, at most 30.0 %; 1 of 18 slots noisy"),
            "{text}"
        );
        assert!(text.contains("1 measurement failed."), "{text}");
        assert_eq!(text.matches("flanneld says: flannel0 is up: fast").count(), 1, "{text}");
    }

    #[test]
    fn each_wire_has_its_table() {
        let text = text(&example::results());
        assert!(
            text.contains("offload: superpackets") && text.contains("wire-gro: only"),
            "{text}"
        );
        assert_eq!(text.matches("FLANNELD").count(), 2, "{text}");
    }
}
