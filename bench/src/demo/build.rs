//! Real builds on mount 0, watched on mount 1, run on mount 2.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use crate::progress::check;

/// What was built, and how it went.
pub struct Built {
    /// The step.
    pub what: String,
    /// Its result.
    pub result: String,
}

const MODULES: usize = 16;

fn run(command: &mut Command, dir: &Path) -> anyhow::Result<String> {
    let out = command
        .current_dir(dir)
        .output()
        .with_context(|| format!("cannot run {command:?}"))?;
    if !out.status.success() {
        bail!(
            "{command:?} failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn available(program: &str) -> bool {
    Command::new(program)
        .arg("--version")
        .output()
        .is_ok_and(|o| o.status.success())
}

/// Names that appear in a directory while `work` runs, and how often it was listed.
fn watched<T>(dir: &Path, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<(T, usize, u64)> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let (mut names, mut listings) = (BTreeSet::new(), 0u64);
            while !stop.load(Ordering::Relaxed) {
                if let Ok(entries) = fs::read_dir(dir) {
                    names.extend(entries.flatten().map(|e| e.file_name()));
                    listings += 1;
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            (names.len(), listings)
        });
        let result = work();
        stop.store(true, Ordering::Relaxed);
        let (names, listings) = watcher.join().unwrap_or_default();
        Ok((result?, names, listings))
    })
}

fn program(
    mounts: &[PathBuf],
    name: &str,
    compiler: &str,
    write: impl FnOnce(&Path) -> std::io::Result<()>,
    compile: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> anyhow::Result<Built> {
    let what = format!("build a program with {compiler} on mount 0, watch on 1, run on 2");
    if !available(compiler) {
        return Ok(Built {
            what,
            result: format!("skipped: no {compiler} here"),
        });
    }
    check()?;
    let source = mounts[0].join(name);
    fs::create_dir(&source)?;
    write(&source).with_context(|| format!("sources in {}", source.display()))?;
    let start = Instant::now();
    let ((), names, listings) = watched(&mounts[1].join(name), || compile(&source))?;
    let took = start.elapsed().as_secs_f64();
    let said = run(
        &mut Command::new(mounts[2].join(name).join("program")),
        &mounts[2],
    )?;
    let want = (0..MODULES).map(|n| n * n).sum::<usize>().to_string();
    if said.trim() != want {
        bail!("the program said {said:?} on mount 2, not {want}");
    }
    let result =
        format!("{took:.1} s; the watcher saw {names} names in {listings} listings; it ran and said {want}");
    Ok(Built { what, result })
}

/// Seventeen C files, an object each, then the linker.
///
/// # Errors
/// The build or the program fails.
pub fn c_program(mounts: &[PathBuf]) -> anyhow::Result<Built> {
    let write = |dir: &Path| {
        let mut main = String::from("#include <stdio.h>\n");
        for n in 0..MODULES {
            fs::write(
                dir.join(format!("m{n}.c")),
                format!("#include <stdlib.h>\nint f{n}(void) {{ return {n} * {n}; }}\n"),
            )?;
            main += &format!("int f{n}(void);\n");
        }
        let sum: Vec<String> = (0..MODULES).map(|n| format!("f{n}()")).collect();
        main += &format!(
            "int main(void) {{ printf(\"%d\\n\", {}); return 0; }}\n",
            sum.join(" + ")
        );
        fs::write(dir.join("main.c"), main)
    };
    let compile = |dir: &Path| {
        let mut objects = Vec::new();
        for name in (0..MODULES).map(|n| format!("m{n}")).chain(["main".to_owned()]) {
            check()?;
            run(
                Command::new("cc").args(["-O1", "-c", &format!("{name}.c"), "-o", &format!("{name}.o")]),
                dir,
            )?;
            objects.push(format!("{name}.o"));
        }
        run(Command::new("cc").args(&objects).args(["-o", "program"]), dir).map(drop)
    };
    program(mounts, "build-c", "cc", write, compile)
}

/// A Rust program of seventeen modules, with rustc's own temporary files, links and mapped reads.
///
/// # Errors
/// The build or the program fails.
pub fn rust_program(mounts: &[PathBuf]) -> anyhow::Result<Built> {
    let write = |dir: &Path| {
        let mut main = String::new();
        for n in 0..MODULES {
            fs::write(
                dir.join(format!("m{n}.rs")),
                format!("pub fn f() -> usize {{ {n} * {n} }}\n"),
            )?;
            main += &format!("mod m{n};\n");
        }
        let sum: Vec<String> = (0..MODULES).map(|n| format!("m{n}::f()")).collect();
        main += &format!("fn main() {{ println!(\"{{}}\", {}); }}\n", sum.join(" + "));
        fs::write(dir.join("main.rs"), main)
    };
    let compile = |dir: &Path| {
        run(
            Command::new("rustc").args(["-C", "codegen-units=4", "-O", "main.rs", "-o", "program"]),
            dir,
        )
        .map(drop)
    };
    program(mounts, "build-rust", "rustc", write, compile)
}
