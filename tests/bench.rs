//! The benchmark of the overlay (`benches/overlay`): its own unit tests, and a short run of it with the real daemon. Needs root.

mod lab;
#[allow(dead_code, reason = "its main function, and what only that uses")]
#[path = "../benches/overlay/main.rs"]
mod overlay;

use clap::Parser;
use flannel::lab::{Interrupt, wait_until};
use lab::{PATIENCE, is_left};
use nix::{sys::signal::Signal, unistd::Pid};
use overlay::{
    agent::{self, Launcher},
    error::BenchError,
    plan::{Durations, Options, Output, Plan},
    report,
};
use serde_json::Value;
use std::{
    env, fs,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

/// Long enough for every part to be passed through; what comes out is of no interest here.
const BRIEF: Durations = Durations {
    ping: Duration::from_millis(50),
    tcp: 1,
    full_speed: Duration::from_millis(50),
    probe: Duration::from_millis(50),
    probes: 3,
    ping_loaded: Duration::from_millis(50),
};

/// Runs in this process share the names of their labs, and so take turns.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The id of the lab of each slot.
fn lab_id() -> String {
    format!("fl{}-bench", std::process::id())
}

/// What these arguments of the benchmark ask for, but brief; this program is its own load generator.
fn plan(arguments: &[&str]) -> Plan {
    let launcher = Launcher {
        program: env::current_exe().unwrap(),
        arguments: ["--exact", "a_load_generator_without_a_socket_says_so", "--nocapture"]
            .map(Into::into)
            .to_vec(),
    };
    let options = Options::try_parse_from([&["bench"], arguments].concat()).unwrap();
    Plan {
        durations: BRIEF,
        ..options.plan(launcher).unwrap()
    }
}

/// The benchmark starts this program in its hosts, where this test is the load generator.
#[test]
fn a_load_generator_without_a_socket_says_so() {
    match (env::var_os(agent::SOCKET_VARIABLE), agent::main()) {
        (Some(_), outcome) => outcome.unwrap(),
        (None, outcome) => {
            let error = outcome.unwrap_err().to_string();
            assert!(error.contains("only the benchmark starts an agent"), "{error}");
        }
    }
}

#[test]
fn short_run_writes_its_results_and_leaves_nothing() {
    let _turn = turn();
    let plan = plan(&[
        "--rounds=1",
        "--wires=wire",
        "--only=ping,tcp1,udp64,ping-loaded",
        "--variant=broken=--frobnicate",
    ]);

    let results = overlay::run(&plan, vec!["--rounds=1".to_owned()], &Interrupt::default(), |line| {
        println!("{line}")
    })
    .unwrap();

    assert!(!is_left(&lab_id()));
    // On a busy machine every brief probe may lose more than 1 %, which is said, but no failure of the benchmark.
    let errors: Vec<_> = results
        .errors()
        .filter(|error| !error.contains("more than 1 % was lost"))
        .collect();
    assert!(
        errors.len() == 1 && errors[0].contains("broken") && errors[0].contains("--frobnicate"),
        "{errors:?}"
    );

    let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("bench-{}", std::process::id()));
    let output = Output {
        dir: dir.join("made"),
        name: "short".to_owned(),
    };
    let written = report::write(&results, &output).unwrap();
    let [json, markdown, svg] = &written
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect::<Vec<_>>()[..]
    else {
        panic!("{written:?}")
    };
    fs::remove_dir_all(dir).unwrap();
    assert_json(&serde_json::from_str(json).unwrap());
    assert_tables(markdown);
    assert_well_formed(svg);
}

fn assert_json(document: &Value) {
    let summary = &document["summary"]["wire"];
    for peer in ["bare", "vxlan", "flanneld"] {
        for metric in ["tcp1", "cpu-per-gb", "ping-p50", "ping-p99", "loaded-p50", "loaded-p99"] {
            let figure = &summary[peer][metric];
            assert!(
                figure["value"]["median"].as_f64().unwrap() > 0.0,
                "{peer} {metric}: {summary:#}"
            );
            assert_eq!(
                figure["ratio"].is_null(),
                peer == "vxlan",
                "{peer} {metric}: {summary:#}"
            );
        }
    }
    assert!(
        summary["flanneld"]["memory"]["value"]["max"].as_f64().unwrap() > 1.0,
        "{summary:#}"
    );
    assert_eq!(summary["broken"], Value::Object(serde_json::Map::new()));
    let samples = document["samples"].as_array().unwrap();
    let names: Vec<_> = samples.iter().map(|sample| sample["peer"].as_str().unwrap()).collect();
    assert_eq!(names, ["bare", "vxlan", "flanneld", "broken"]);
    for sample in &samples[..3] {
        assert!(
            sample["offers"]["udp64"]["full_speed"]["delivered"].as_f64().unwrap() > 0.0,
            "{sample:#}"
        );
    }
    let said = samples[2]["said"].to_string();
    assert!(said.contains("flannel0 is up"), "{said}");
    assert!(document["machine"]["kernel"].as_str().unwrap().contains('.'));
}

/// All lines of a table have as many columns.
fn assert_tables(markdown: &str) {
    let columns: Vec<_> = markdown
        .lines()
        .filter(|line| line.starts_with('|'))
        .map(|line| line.matches('|').count())
        .collect();
    assert!(
        columns.len() > 5 && columns.iter().all(|count| *count == 7),
        "{markdown}"
    );
}

/// Each element is closed, in the opposite order, and no text has markup in it.
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg.trim();
    assert!(rest.starts_with("<svg "), "{svg}");
    while let Some((text, markup)) = rest.split_once('<') {
        let is_entity = |rest: &str| ["amp;", "lt;", "gt;"].iter().any(|entity| rest.starts_with(entity));
        assert!(!text.contains('>') && text.split('&').skip(1).all(is_entity), "{text}");
        let (tag, after) = markup.split_once('>').expect(svg);
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "{svg}");
        } else if !tag.ends_with('/') {
            open.push(tag.split(' ').next().unwrap());
        }
        rest = after;
    }
    assert!(open.is_empty() && rest.is_empty(), "{open:?}");
}

#[test]
fn interrupted_run_leaves_nothing() {
    let _turn = turn();
    let plan = plan(&[
        "--rounds=1",
        "--wires=wire",
        "--only=tcp1,ping-loaded",
        "--peers=flanneld",
    ]);
    let interrupt = Interrupt::install().unwrap();
    // The log of the stream is there once it is being measured.
    let running = PathBuf::from("/tmp").join(lab_id()).join("iperf3.json");
    let killer = thread::spawn(move || {
        wait_until(PATIENCE, "the run to be under way", || running.exists()).unwrap();
        nix::sys::signal::kill(Pid::this(), Signal::SIGINT).unwrap();
    });

    let outcome = overlay::run(&plan, Vec::new(), &interrupt, |line| println!("{line}"));

    killer.join().unwrap();
    assert!(
        matches!(outcome, Err(BenchError::Interrupted(Signal::SIGINT))),
        "{outcome:?}"
    );
    assert!(!is_left(&lab_id()));
}
