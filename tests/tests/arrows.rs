//! Which part may know which. The crates' arrows are those of `cargo metadata`, the files' are their imports.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, ensure};

#[path = "arrows/fields.rs"]
mod fields;
#[path = "arrows/modules.rs"]
mod modules;

/// What each crate of the file system may know of the workspace. Servers do not know the client, nor each other; the client knows
/// of the servers only what is in their messages.
const MAY_KNOW: &[(&str, &[&str])] = &[
    ("rt", &[]),
    ("rdma-transport", &["rt"]),
    ("lockmgr", &["rt", "rdma-transport"]),
    ("distfuse-abi", &[]),
    ("fsd-proto", &["rt", "rdma-transport", "lockmgr"]),
    ("fsd-node", &["rt", "rdma-transport", "fsd-proto"]),
    (
        "fsd-meta",
        &["rt", "rdma-transport", "lockmgr", "fsd-proto", "fsd-node"],
    ),
    (
        "fsd-storage",
        &["rt", "rdma-transport", "lockmgr", "fsd-proto", "fsd-node"],
    ),
    (
        "fsd-client",
        &[
            "rt",
            "rdma-transport",
            "lockmgr",
            "distfuse-abi",
            "fsd-proto",
            "fsd-node",
        ],
    ),
    (
        "fsd",
        &[
            "rt",
            "rdma-transport",
            "lockmgr",
            "fsd-proto",
            "fsd-node",
            "fsd-meta",
            "fsd-storage",
            "fsd-client",
        ],
    ),
];

/// Files of these crates import each other in no circle, and have no more than [`LINES`] lines.
const PARTS: &[&str] = &[
    "fsd/proto",
    "fsd/node",
    "fsd/meta",
    "fsd/storage",
    "fsd/client",
    "fsd",
    "rdma-transport",
    "rdma-transport/rt",
    "lockmgr",
    "kmod/abi",
];

/// Most lines of a file.
const LINES: usize = 500;

/// The rooms of crates, each above those that it may know.
const ROOMS: &[(&str, &[&str])] = &[
    (
        "fsd/client",
        &[
            "session",
            "cache",
            "kernel",
            "data",
            "opens",
            "namespace",
            "storing",
            "files",
            "revoke",
            "membership",
            "calls",
            "client",
            "fuse",
            "mount",
        ],
    ),
    (
        "fsd/meta",
        &[
            "rules",
            "error",
            "journal",
            "nodes",
            "namespace",
            "membership",
            "service",
            "house",
            "server",
            "crash_tests",
            "takeover_tests",
        ],
    ),
];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

#[test]
fn crates_know_only_what_they_may() -> anyhow::Result<()> {
    let told = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1", "--offline"])
        .current_dir(root())
        .output()
        .context("cargo metadata")?;
    ensure!(
        told.status.success(),
        "cargo metadata: {}",
        String::from_utf8_lossy(&told.stderr)
    );
    let all: serde_json::Value = serde_json::from_slice(&told.stdout)?;
    let packages = all["packages"].as_array().context("no packages")?;
    let ours: BTreeSet<&str> = packages.iter().filter_map(|p| p["name"].as_str()).collect();
    for (name, may) in MAY_KNOW {
        let package = packages
            .iter()
            .find(|p| p["name"] == *name)
            .with_context(|| format!("no crate {name}"))?;
        let known = package["dependencies"].as_array().context("no dependencies")?;
        // What only its tests know is no arrow.
        let known = known
            .iter()
            .filter(|d| d["kind"] != "dev")
            .filter_map(|d| d["name"].as_str());
        let known: BTreeSet<&str> = known.filter(|n| ours.contains(n)).collect();
        let may: BTreeSet<&str> = may.iter().copied().collect();
        let more: Vec<_> = known.difference(&may).collect();
        ensure!(more.is_empty(), "{name} must not know {more:?}");
    }
    Ok(())
}

/// All source files below a folder.
fn files_of(dir: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(files_of(&path)?);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
    Ok(files)
}

/// A way from a module back to itself.
fn circle(graph: &BTreeMap<String, BTreeSet<String>>) -> Option<Vec<String>> {
    fn walk(
        graph: &BTreeMap<String, BTreeSet<String>>,
        way: &mut Vec<String>,
        done: &mut BTreeSet<String>,
    ) -> Option<Vec<String>> {
        let here = way.last()?.clone();
        for next in graph.get(&here).into_iter().flatten() {
            if let Some(at) = way.iter().position(|m| m == next) {
                return Some(way[at..].to_vec());
            }
            if done.contains(next) {
                continue;
            }
            way.push(next.clone());
            if let Some(found) = walk(graph, way, done) {
                return Some(found);
            }
            way.pop();
        }
        done.insert(here);
        None
    }
    let mut done = BTreeSet::new();
    graph
        .keys()
        .find_map(|module| walk(graph, &mut vec![module.clone()], &mut done))
}

fn check(name: &str, graph: &BTreeMap<String, BTreeSet<String>>) -> anyhow::Result<()> {
    ensure!(
        graph.values().any(|all| !all.is_empty()),
        "{name}: no imports found: {graph:?}"
    );
    let found = circle(graph);
    ensure!(found.is_none(), "{name}: {found:?} import each other");
    Ok(())
}

fn top(module: &str) -> &str {
    module.split("::").next().unwrap_or_default()
}

#[test]
fn rooms_know_only_what_is_below_them() -> anyhow::Result<()> {
    for (name, rooms) in ROOMS {
        let place = |module: &str| {
            let room = top(module);
            let place = rooms.iter().position(|r| *r == room);
            place.with_context(|| format!("{name}: no room for {module}"))
        };
        for (from, all) in modules::arrows(&root().join(name).join("src"))? {
            // The crate itself only names its rooms.
            for to in all.iter().filter(|_| from != "crate") {
                ensure!(place(&from)? >= place(to)?, "{name}: {from} must not know {to}");
            }
        }
    }
    Ok(())
}

#[test]
fn files_import_each_other_in_no_circle() -> anyhow::Result<()> {
    for name in PARTS {
        check(name, &modules::arrows(&root().join(name).join("src"))?)?;
    }
    Ok(())
}

#[test]
fn no_file_is_too_long_to_be_read_at_once() -> anyhow::Result<()> {
    let mut long = Vec::new();
    for name in PARTS {
        for file in files_of(&root().join(name).join("src"))? {
            let lines = std::fs::read_to_string(&file)?.lines().count();
            let tests = file
                .file_stem()
                .is_some_and(|s| s.to_string_lossy().ends_with("tests"));
            if lines > LINES && !tests {
                long.push(format!("{}: {lines}", file.display()));
            }
        }
    }
    ensure!(long.is_empty(), "more than {LINES} lines: {long:#?}");
    Ok(())
}

#[test]
fn no_struct_has_more_fields_than_a_reader_keeps_in_mind() -> anyhow::Result<()> {
    let mut many = Vec::new();
    let mut excepted: BTreeSet<&str> = fields::RECORDS.iter().map(|(name, _)| *name).collect();
    for part in PARTS {
        for file in files_of(&root().join(part).join("src"))? {
            let file_name = file.strip_prefix(root())?.with_extension("");
            for (name, count) in fields::structs(&std::fs::read_to_string(&file)?) {
                let full = format!("{}::{name}", file_name.display());
                if count > fields::FIELDS && !excepted.remove(full.as_str()) {
                    many.push(format!("{full}: {count}"));
                }
            }
        }
    }
    ensure!(
        many.is_empty(),
        "more than {} fields; what belongs together is a struct of its own: {many:#?}",
        fields::FIELDS
    );
    ensure!(excepted.is_empty(), "no exceptions any more: {excepted:?}");
    Ok(())
}

#[test]
fn a_circle_is_found() {
    let graph = |arrows: &[(&str, &str)]| {
        let mut graph: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (from, to) in arrows {
            graph.entry((*from).into()).or_default().insert((*to).into());
            graph.entry((*to).into()).or_default();
        }
        graph
    };
    assert_eq!(circle(&graph(&[("a", "b"), ("b", "c"), ("a", "c")])), None);
    let found = circle(&graph(&[("a", "b"), ("b", "c"), ("c", "b")]));
    assert_eq!(found, Some(vec!["b".to_owned(), "c".to_owned()]));
}

/// What runs in simulation takes its clock, locks, channels, threads and random numbers from `rt`: what goes past it would be real
/// time, and another order at each run.
#[test]
fn what_is_simulated_goes_through_rt() -> anyhow::Result<()> {
    const SIMULATED: &[&str] = &[
        "lockmgr",
        "rdma-transport/src/sim",
        "fsd/proto",
        "fsd/node",
        "fsd/meta",
        "fsd/storage",
        "fsd/client",
    ];
    const PAST: &[&str] = &[
        "parking_lot::",
        "crossbeam::",
        "rand::random",
        "std::thread",
        "std::time::Instant",
        "Duration, Instant}",
        "SystemTime::now",
        "std::sync::mpsc",
        "std::hint::spin_loop",
    ];
    let mut past = Vec::new();
    for name in SIMULATED {
        let dir = root().join(name);
        let src = dir.join("src");
        for file in files_of(if src.is_dir() { &src } else { &dir })? {
            let text = std::fs::read_to_string(&file)?;
            let text = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            let found = PAST.iter().filter(|word| text.contains(**word));
            past.extend(found.map(|word| format!("{}: {word}", file.display())));
        }
    }
    ensure!(past.is_empty(), "not through rt: {past:#?}");
    Ok(())
}
