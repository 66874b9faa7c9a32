//! What only a directory has to stand: several processes that change it, and processes that are killed while they do.

use std::{
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, Stdio},
    time::Duration,
};

use flannel::registry::{Event, Registry, file::FileRegistry};

const PREFIX: &str = "/coreos.com/network";

/// Names the directory for this program when it runs as the child of itself.
const DIRECTORY_VARIABLE: &str = "FLANNEL_TEST_REGISTRY";

/// How many keys each of two processes tries to create.
const CONTESTED: usize = 60;

struct TempDir(PathBuf);

impl TempDir {
    fn new(name: &str) -> TempDir {
        let path = std::env::temp_dir().join(format!("flannel-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        TempDir(path)
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        // What is left behind in the place for temporary files is no reason to fail.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn open(directory: &Path) -> FileRegistry {
    FileRegistry::open(directory, PREFIX).unwrap()
}

/// Runs the test `function` again in a process of its own, where [`child_directory`] tells it to be the other process.
fn child(function: &str, directory: &Path) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "--nocapture", function])
        .env(DIRECTORY_VARIABLE, directory)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let output = BufReader::new(child.stdout.take().unwrap());
    (child, output)
}

/// In a process that [`child`] started: the directory to work on.
fn child_directory() -> Option<PathBuf> {
    std::env::var_os(DIRECTORY_VARIABLE).map(PathBuf::from)
}

/// Creates what it can of the contested keys; the keys it won.
async fn contest(registry: &FileRegistry, value: &[u8]) -> Vec<String> {
    let mut won = Vec::new();
    for number in 0..CONTESTED {
        let key = format!("contested/{number:03}");
        if registry.create(&key, value, None).await.unwrap().is_some() {
            won.push(key);
        }
    }
    won
}

async fn contest_as_child(directory: &Path) {
    let registry = open(directory);
    println!("ready");
    for key in contest(&registry, b"child").await {
        println!("won {key}");
    }
}

#[tokio::test]
async fn two_processes_never_both_create_a_key() {
    if let Some(directory) = child_directory() {
        return contest_as_child(&directory).await;
    }
    let directory = TempDir::new("contest");
    let registry = open(&directory.0);
    let (mut process, output) = child("two_processes_never_both_create_a_key", &directory.0);
    let mut lines = output.lines().map(Result::unwrap);
    assert!(lines.any(|line| line.ends_with("ready")), "the child begins");

    let own = contest(&registry, b"parent").await;
    let theirs: Vec<String> = lines
        .filter_map(|line| line.strip_prefix("won ").map(str::to_owned))
        .collect();
    assert!(process.wait().unwrap().success());

    assert_eq!(own.len() + theirs.len(), CONTESTED);
    for (keys, value) in [(&own, &b"parent"[..]), (&theirs, b"child")] {
        for key in keys {
            assert_eq!(registry.get(key).await.unwrap().unwrap().value, value, "{key}");
        }
    }
}

/// Writes to the registry for as long as it lives: records that grow and shrink the state, and a counter.
async fn write_for_ever_as_child(directory: &Path) {
    let registry = open(directory);
    let counter = registry.get("counter").await.unwrap();
    let mut count: u64 = counter.map_or(0, |record| String::from_utf8(record.value).unwrap().parse().unwrap());
    println!("ready");
    loop {
        count += 1;
        let size = usize::try_from(count % 7).unwrap() * 3_000;
        registry.put("padding", "x".repeat(size).as_bytes()).await.unwrap();
        registry.put("counter", count.to_string().as_bytes()).await.unwrap();
    }
}

#[tokio::test]
async fn a_process_killed_at_any_moment_leaves_a_whole_state() {
    if let Some(directory) = child_directory() {
        return write_for_ever_as_child(&directory).await;
    }
    let directory = TempDir::new("killed");
    let registry = open(&directory.0);
    let (mut count, mut revision, mut progress) = (0, 0, 0);
    for round in 0..30_u64 {
        let (mut process, output) = child("a_process_killed_at_any_moment_leaves_a_whole_state", &directory.0);
        assert!(
            output.lines().any(|line| line.unwrap().ends_with("ready")),
            "the child begins"
        );
        // Each time at another point of its work.
        tokio::time::sleep(Duration::from_micros(round * 1_237 % 20_000)).await;
        process.kill().unwrap();
        process.wait().unwrap();

        let state = registry.list("").await.expect("the state is whole");
        let newest = state.iter().map(|record| record.revision.0).max().unwrap_or(0);
        let counted: u64 = state
            .iter()
            .find(|record| record.key == "counter")
            .map_or(0, |record| std::str::from_utf8(&record.value).unwrap().parse().unwrap());
        assert!(
            newest >= revision && counted >= count,
            "round {round}: nothing that was there is lost"
        );
        progress += u32::from(newest > revision);
        (revision, count) = (newest, counted);
    }
    assert!(
        progress >= 10,
        "the child was killed before it wrote in all but {progress} rounds"
    );

    let started = std::time::Instant::now();
    registry.put("config", b"{}").await.unwrap();
    assert!(
        started.elapsed() < Duration::from_secs(1),
        "the lock of the dead is free"
    );
    assert!(registry.get("config").await.unwrap().unwrap().revision.0 > revision);
}

#[tokio::test]
async fn a_watch_hears_another_process() {
    let directory = TempDir::new("heard");
    let (_, mut watch) = open(&directory.0).watch("counter").await.unwrap();
    let (mut process, _output) = child("a_process_killed_at_any_moment_leaves_a_whole_state", &directory.0);
    let mut last = 0;
    for _ in 0..10 {
        let events = tokio::time::timeout(Duration::from_secs(20), watch.next())
            .await
            .unwrap()
            .unwrap();
        for event in events {
            let Event::Put(record) = event else { panic!("{event:?}") };
            let count: u64 = String::from_utf8(record.value).unwrap().parse().unwrap();
            assert!(count > last);
            last = count;
        }
    }
    process.kill().unwrap();
    process.wait().unwrap();
}
