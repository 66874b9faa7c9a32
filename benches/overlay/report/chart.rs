//! A bar chart of the ratios, as SVG: wires side by side, metrics one under another, a bar for each peer.

use super::super::{
    metric::{Better, Metric},
    peer::REFERENCE,
    statistics::Summary,
    wire::Wire,
};
use super::{Results, times};
use std::fmt::Write;

/// The whole width, in pixels: what a README has on a screen.
const WIDTH: f64 = 880.0;

/// Where the panels begin: left of it are the metrics' names.
const PANELS: f64 = 216.0;

/// Around everything.
const MARGIN: f64 = 16.0;

/// Between two panels.
const GAP: f64 = 14.0;

/// Right of the longest bar: room for its value.
const VALUE: f64 = 36.0;

/// Title, machine, legend and the panels' names.
const HEAD: f64 = 118.0;

/// A bar, and the space between two metrics.
const BAR: f64 = 11.0;
const SPACE: f64 = 8.0;

/// The heading of a group of metrics.
const GROUP: f64 = 26.0;

/// The longest bar: a ratio above is cut off, and marked.
const MOST: f64 = 3.0;

/// Colours that carry names to the style sheet; one for each peer but the reference, then from the start again.
const COLOURS: usize = 6;

/// Light, and dark where the reader's screen is; a renderer that knows no media queries shows the light one whole.
/// The colours of the bars differ in lightness, too; a bar's value has an edge that keeps the grid off it.
const STYLE: &str = "\
text{font-family:system-ui,-apple-system,'Segoe UI','Liberation Sans',sans-serif;font-size:12px;fill:#1f2328}
.title{font-size:16px;font-weight:600}.head{font-weight:600}.small{font-size:11px;fill:#59636e}.value{font-size:10px}
.bar{font-size:10px;stroke:#ffffff;stroke-width:3px;paint-order:stroke}
.back{fill:#ffffff}.grid{stroke:#d1d9e0}.one{stroke:#1f2328;stroke-width:1.5}.range{stroke:#1f2328;stroke-opacity:.55}
.c0{fill:#9aa4ae}.c1{fill:#0969da}.c2{fill:#bf8700}.c3{fill:#8250df}.c4{fill:#1a7f37}.c5{fill:#cf222e}
@media (prefers-color-scheme:dark){text{fill:#e6edf3}.bar{stroke:#0d1117}.small{fill:#9198a1}.back{fill:#0d1117}.grid{stroke:#3d444d}
.one,.range{stroke:#e6edf3}.c0{fill:#6e7681}.c1{fill:#4493f8}.c2{fill:#d29922}.c3{fill:#ab7df8}.c4{fill:#3fb950}.c5{fill:#f85149}}";

/// The chart; `None` when there is no ratio to show.
pub(crate) fn chart(results: &Results) -> Option<String> {
    let groups = [(Better::More, "more is better"), (Better::Less, "less is better")]
        .map(|(better, heading)| (heading, metrics(results, better)));
    let chart = Chart {
        results,
        peers: results
            .peers
            .iter()
            .map(|peer| peer.name.as_str())
            .filter(|name| *name != REFERENCE)
            .collect(),
        panel: (WIDTH - PANELS - MARGIN) / results.wires.len().max(1) as f64 - GAP,
        out: String::new(),
    };
    let any = groups.iter().any(|(_, metrics)| !metrics.is_empty());
    any.then(|| chart.draw(&groups))
}

/// The metrics of that kind for which some peer has a ratio on some wire.
fn metrics(results: &Results, better: Better) -> Vec<Metric> {
    let has_ratio = |metric: &Metric| {
        let mut figures = results.wires.iter().flat_map(|wire| {
            results
                .peers
                .iter()
                .filter_map(|peer| results.figure(*wire, &peer.name, *metric))
        });
        figures.any(|figure| figure.ratio.is_some())
    };
    let metrics = Metric::ALL.into_iter().filter(|metric| metric.better() == better);
    metrics.filter(has_ratio).collect()
}

struct Chart<'a> {
    results: &'a Results,
    /// Those that have bars.
    peers: Vec<&'a str>,
    /// The width of a panel.
    panel: f64,
    out: String,
}

impl Chart<'_> {
    fn draw(mut self, groups: &[(&str, Vec<Metric>)]) -> String {
        let rows = groups.iter().filter(|(_, metrics)| !metrics.is_empty());
        let height = rows.fold(HEAD, |height, (_, metrics)| {
            height + GROUP + metrics.len() as f64 * self.row()
        });
        self.put(format_args!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{total}" viewBox="0 0 {WIDTH} {total}" role="img">"#,
            total = height + MARGIN
        ));
        self.put(format_args!("<title>{}</title>", escape(&title(self.results))));
        self.put(format_args!("<style>{STYLE}</style>"));
        self.put(format_args!(
            r#"<rect class="back" width="100%" height="100%" rx="6"/>"#
        ));
        self.head();
        self.grid(height);
        let mut y = HEAD;
        for (heading, metrics) in groups.iter().filter(|(_, metrics)| !metrics.is_empty()) {
            self.text(MARGIN, y + 17.0, "head", heading);
            y += GROUP;
            for metric in metrics {
                self.metric(*metric, y);
                y += self.row();
            }
        }
        self.put(format_args!("</svg>"));
        self.out
    }

    /// The height of one metric.
    fn row(&self) -> f64 {
        self.peers.len() as f64 * BAR + SPACE
    }

    fn head(&mut self) {
        let results = self.results;
        self.text(MARGIN, 30.0, "title", &title(results));
        let rounds = if results.rounds == 1 {
            "1 round"
        } else {
            &format!("medians of {} rounds", results.rounds)
        };
        self.text(
            MARGIN,
            49.0,
            "small",
            &format!("{}; {rounds}", results.machine.describe()),
        );
        let mut x = MARGIN;
        for (index, peer) in self.peers.clone().into_iter().enumerate() {
            self.put(format_args!(
                r#"<rect class="c{}" x="{x}" y="64" width="12" height="12"/>"#,
                index % COLOURS
            ));
            self.text(x + 17.0, 74.5, "", peer);
            // There is no measuring of text here: 7 pixels a character, which is more than most take.
            x += 34.0 + 7.0 * peer.chars().count() as f64;
        }
        for (x, wire) in self.panels() {
            self.text(x, 101.0, "head", wire.name());
        }
    }

    /// The panels' left edges.
    fn panels(&self) -> Vec<(f64, Wire)> {
        let width = self.panel + GAP;
        let wires = self.results.wires.iter().enumerate();
        wires
            .map(|(index, wire)| (PANELS + index as f64 * width, *wire))
            .collect()
    }

    /// Pixels of a ratio of 1.
    fn scale(&self) -> f64 {
        (self.panel - VALUE) / MOST
    }

    fn grid(&mut self, bottom: f64) {
        for (left, _) in self.panels() {
            for (ratio, class) in [(0.0, "grid"), (1.0, "one"), (2.0, "grid"), (3.0, "grid")] {
                let x = left + ratio * self.scale();
                self.put(format_args!(
                    r#"<line class="{class}" x1="{x:.1}" y1="{HEAD}" x2="{x:.1}" y2="{bottom}"/>"#
                ));
                self.put(format_args!(
                    r#"<text class="value" x="{x:.1}" y="{:.1}" text-anchor="middle">{ratio}</text>"#,
                    HEAD - 4.0
                ));
            }
        }
    }

    fn metric(&mut self, metric: Metric, y: f64) {
        let middle = y + self.peers.len() as f64 * BAR / 2.0 + 4.0;
        self.text(MARGIN, middle, "", metric.title());
        for (left, wire) in self.panels() {
            for (index, peer) in self.peers.clone().into_iter().enumerate() {
                let figure = self.results.figure(wire, peer, metric);
                if let Some(ratio) = figure.and_then(|figure| figure.ratio) {
                    self.bar((left, y + index as f64 * BAR), index % COLOURS, ratio);
                }
            }
        }
    }

    /// A bar as long as the median, a thin line from the lowest to the highest, and the median in figures.
    fn bar(&mut self, (x, y): (f64, f64), colour: usize, ratio: Summary) {
        let scale = self.scale();
        let at = |ratio: f64| x + ratio.min(MOST) * scale;
        let end = at(ratio.median);
        self.put(format_args!(
            r#"<rect class="c{colour}" x="{x:.1}" y="{y:.1}" width="{:.1}" height="{}"/>"#,
            end - x,
            BAR - 1.5
        ));
        let middle = y + BAR / 2.0 - 0.75;
        if ratio.max > ratio.min {
            self.put(format_args!(
                r#"<line class="range" x1="{:.1}" y1="{middle:.1}" x2="{:.1}" y2="{middle:.1}"/>"#,
                at(ratio.min),
                at(ratio.max)
            ));
        }
        let cut = if ratio.median > MOST { "›" } else { "" };
        let value = format!("{}{cut}", times(ratio.median));
        self.text(at(ratio.max.max(ratio.median)) + 3.0, y + BAR - 2.5, "bar", &value);
    }

    fn text(&mut self, x: f64, y: f64, class: &str, text: &str) {
        let text = escape(text);
        self.put(format_args!(
            r#"<text class="{class}" x="{x:.1}" y="{y:.1}">{text}</text>"#
        ));
    }

    fn put(&mut self, line: std::fmt::Arguments<'_>) {
        // Writing to a string cannot fail.
        let _ = writeln!(self.out, "{line}");
    }
}

fn title(results: &Results) -> String {
    let pinned = if results.pinned { ", one processor per host" } else { "" };
    format!("Ratio to {REFERENCE} (the line at 1){pinned}")
}

/// For text between tags.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
#[allow(unused, reason = "cargo builds benchmarks with cfg(test), but without tests")]
mod tests {
    use super::super::example;
    use super::*;

    #[test]
    fn each_ratio_has_a_bar_of_its_length() {
        let results = example::results();
        let svg = chart(&results).unwrap();
        // Two peers, two wires, two metrics with a ratio; in the legend one for each peer.
        assert_eq!(svg.matches(r#"class="c0""#).count(), 5, "{svg}");
        assert_eq!(svg.matches(r#"class="c1""#).count(), 5, "{svg}");
        let panel = (WIDTH - PANELS - MARGIN) / 2.0 - GAP;
        let width = 1.5 * (panel - VALUE) / MOST;
        assert!(svg.contains(&format!(r#"width="{width:.1}""#)), "{width:.1} in {svg}");
        assert!(svg.contains(">1.50</text>"), "{svg}");
    }

    #[test]
    fn ratio_beyond_the_edge_is_cut_off_and_says_so() {
        let mut results = example::results();
        for sample in results.samples.iter_mut().filter(|sample| sample.peer == "flanneld") {
            sample.values.insert(Metric::Tcp1, 1_000.0);
        }
        let svg = chart(&results).unwrap();
        assert!(svg.contains("›</text>"), "{svg}");
        let ends = svg.match_indices(" x=\"").map(|(at, start)| &svg[at + start.len()..]);
        let xs = ends.filter_map(|rest| rest.split('"').next()?.parse::<f64>().ok());
        assert!(xs.max_by(f64::total_cmp).unwrap() < WIDTH, "{svg}");
    }

    #[test]
    fn names_cannot_break_the_markup() {
        let mut results = example::results();
        results.machine.processor = "<Fast & cheap>".to_owned();
        let svg = chart(&results).unwrap();
        assert!(
            svg.contains("&lt;Fast &amp; cheap&gt;") && !svg.contains("<Fast"),
            "{svg}"
        );
    }

    #[test]
    fn without_a_reference_there_is_no_chart() {
        let mut results = example::results();
        results.samples.retain(|sample| sample.peer != REFERENCE);
        assert_eq!(chart(&results), None);
    }
}
