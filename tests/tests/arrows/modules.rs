//! The files of a crate as modules by their full paths, and which imports which: by `use`, or by a path in the code.
//!
//! An import of something that a module only passes on (`pub use`) leads to the file that has it. What is only there for tests
//! does not count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use anyhow::Context;

/// A module's path within its crate; the crate itself is empty.
type Name = Vec<String>;

/// Where each name that a module imports leads, as written: path and the name it has here.
struct Module {
    /// Paths from the crate's root, of everything that is mentioned.
    mentions: BTreeSet<Name>,
    /// What its own `use` lines bring in: the name here, and the path.
    brought: BTreeMap<String, Name>,
}

fn files(dir: &Path, into: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.is_dir() {
            files(&path, into)?;
        } else if path.extension().is_some_and(|e| e == "rs") {
            into.push(path);
        }
    }
    Ok(())
}

fn name_of(src: &Path, file: &Path) -> anyhow::Result<Name> {
    let inside = file.strip_prefix(src)?.with_extension("");
    let mut name: Name = inside
        .components()
        .map(|c| c.as_os_str().to_string_lossy().into_owned())
        .collect();
    let last = name.last().context("a file without a name")?;
    if last == "mod" || (name.len() == 1 && (last == "lib" || last == "main")) {
        name.pop();
    }
    Ok(name)
}

/// The text without comments, strings and what is compiled for tests only: modules for tests, of which the last has a body.
fn code(text: &str) -> String {
    let mut parts = text.split("#[cfg(test)]\nmod ");
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_once('\n') {
            Some((name, rest)) if name.ends_with(';') => text.push_str(rest),
            _ => break,
        }
    }
    let lines = text.lines().map(|l| l.split("//").next().unwrap_or_default());
    let mut out = String::new();
    for line in lines {
        // Strings of one line; those of several have no paths in them.
        for (n, part) in line.split('"').enumerate() {
            if n % 2 == 0 {
                out.push_str(part);
            }
        }
        out.push('\n');
    }
    out
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

/// `super` and `self` at the beginning of a path, and `crate`, replaced by what they mean in `here`; None for another crate's.
fn absolute(here: &Name, path: &[String]) -> Option<Name> {
    let mut base = match path.first()?.as_str() {
        "crate" => Vec::new(),
        "self" => here.clone(),
        "super" => here[..here.len().saturating_sub(1)].to_vec(),
        _ => return None,
    };
    let mut rest = &path[1..];
    while rest.first().is_some_and(|w| w == "super") {
        base.pop();
        rest = &rest[1..];
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

/// All paths of an import tree: `a::{b, c::{d, self}}` is a::b, a::c::d and a::c. With the names they get.
fn leaves(prefix: &[String], tree: &str, into: &mut Vec<(Name, String)>) {
    let mut depth = 0;
    let mut from = 0;
    let mut parts = Vec::new();
    for (at, c) in tree.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&tree[from..at]);
                from = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&tree[from..]);
    for part in parts.iter().map(|p| p.trim()).filter(|p| !p.is_empty()) {
        if let Some((head, body)) = part.split_once('{') {
            let mut prefix = prefix.to_vec();
            prefix.extend(words(head));
            leaves(&prefix, body.trim_end().trim_end_matches('}'), into);
            continue;
        }
        let (path, named) = part
            .split_once(" as ")
            .map_or((part, None), |(p, n)| (p, Some(n)));
        let mut path_words = prefix.to_vec();
        path_words.extend(words(path));
        if path_words.last().is_some_and(|w| w == "self") && path_words.len() > 1 {
            path_words.pop();
        }
        let named = named
            .map(|n| n.trim().to_owned())
            .or_else(|| path_words.last().cloned());
        into.push((path_words, named.unwrap_or_default()));
    }
}

fn words(path: &str) -> Vec<String> {
    path.split("::")
        .map(|w| w.trim().to_owned())
        .filter(|w| !w.is_empty())
        .collect()
}

/// The paths in the code that begin like an import: from `crate::` or `super::` up to what is no path any more.
fn inline_paths(code: &str) -> Vec<Name> {
    let mut found = Vec::new();
    for start in ["crate::", "super::", "self::"] {
        for (at, _) in code.match_indices(start) {
            if code[..at].ends_with(|c: char| is_word(c) || c == ':') {
                continue;
            }
            let rest = &code[at..];
            let end = rest
                .find(|c: char| !(is_word(c) || c == ':'))
                .unwrap_or(rest.len());
            found.push(words(&rest[..end]));
        }
    }
    found
}

fn module(here: &Name, text: &str, children: &BTreeSet<String>) -> Module {
    let code = code(text);
    let mut rest = code.as_str();
    let mut without = String::new();
    let mut trees = Vec::new();
    while let Some(at) = rest.find("use ") {
        let starts = rest[..at].chars().next_back().is_none_or(char::is_whitespace);
        let end = rest[at..].find(';').map(|e| at + e);
        if let (true, Some(end)) = (starts, end) {
            without.push_str(&rest[..at]);
            trees.push(rest[at + 4..end].to_owned());
            rest = &rest[end..];
        } else {
            without.push_str(&rest[..at + 4]);
            rest = &rest[at + 4..];
        }
    }
    without.push_str(rest);
    let mut module = Module {
        mentions: BTreeSet::new(),
        brought: BTreeMap::new(),
    };
    for tree in trees {
        let mut all = Vec::new();
        leaves(&[], &tree.replace('\n', " "), &mut all);
        for (path, named) in all {
            // `use child::X` in the parent is `use self::child::X`.
            let own = path.first().is_some_and(|w| children.contains(w));
            let path = if own {
                [vec!["self".to_owned()], path].concat()
            } else {
                path
            };
            if let Some(path) = absolute(here, &path) {
                module.brought.insert(named, path.clone());
                module.mentions.insert(path);
            }
        }
    }
    for path in inline_paths(&without) {
        module.mentions.extend(absolute(here, &path));
    }
    // A child module used by its name: `child::act()`.
    for child in children {
        let path = format!("{child}::");
        let called = without.match_indices(&path);
        if called
            .into_iter()
            .any(|(at, _)| !without[..at].ends_with(|c: char| is_word(c) || c == ':' || c == '.'))
        {
            module
                .mentions
                .insert([here.clone(), vec![child.clone()]].concat());
        }
    }
    module
}

/// The module whose file has what a path leads to.
fn resolve(modules: &BTreeMap<Name, Module>, path: &[String], depth: usize) -> Option<Name> {
    let mut at: Name = Vec::new();
    for (n, word) in path.iter().enumerate() {
        let mut next = at.clone();
        next.push(word.clone());
        if modules.contains_key(&next) {
            at = next;
            continue;
        }
        if depth < 8
            && let Some(onward) = modules.get(&at)?.brought.get(word)
        {
            let onward: Name = onward.iter().chain(&path[n + 1..]).cloned().collect();
            return resolve(modules, &onward, depth + 1);
        }
        break;
    }
    Some(at)
}

/// The modules of a crate by their paths (`a::b`), each with those whose files it needs.
pub fn arrows(src: &Path) -> anyhow::Result<BTreeMap<String, BTreeSet<String>>> {
    let mut all = Vec::new();
    files(src, &mut all)?;
    let mut texts: BTreeMap<Name, String> = BTreeMap::new();
    for file in all {
        let test = file
            .file_stem()
            .is_some_and(|s| s.to_string_lossy().ends_with("tests"));
        if test || file.ends_with("test_util.rs") {
            continue;
        }
        texts.insert(name_of(src, &file)?, std::fs::read_to_string(&file)?);
    }
    let names: BTreeSet<Name> = texts.keys().cloned().collect();
    let children = |of: &Name| -> BTreeSet<String> {
        let inside = names
            .iter()
            .filter(|n| n.len() == of.len() + 1 && n.starts_with(of));
        inside.filter_map(|n| n.last().cloned()).collect()
    };
    let modules: BTreeMap<Name, Module> = texts
        .iter()
        .map(|(name, text)| (name.clone(), module(name, text, &children(name))))
        .collect();
    let show = |name: &Name| {
        if name.is_empty() {
            "crate".to_owned()
        } else {
            name.join("::")
        }
    };
    let mut graph = BTreeMap::new();
    for (name, module) in &modules {
        let leads = module
            .mentions
            .iter()
            .filter_map(|path| resolve(&modules, path, 0));
        let others = leads.filter(|to| to != name).map(|to| show(&to));
        graph.insert(show(name), others.collect());
    }
    Ok(graph)
}

#[test]
fn imports_of_every_form_are_seen() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let write = |path: &str, text: &str| -> anyhow::Result<()> {
        let path = dir.path().join(path);
        std::fs::create_dir_all(path.parent().context("no folder")?)?;
        Ok(std::fs::write(path, text)?)
    };
    write(
        "lib.rs",
        "mod a;\nmod b;\nmod c;\npub use b::deep::{Thing, other as renamed};\n",
    )?;
    write("a.rs", "use crate::{Thing, c::{self, Other}};\n")?;
    write(
        "b/mod.rs",
        "pub mod deep;\nmod low;\npub use low::Low;\n// crate::a is not meant\n",
    )?;
    write(
        "b/deep.rs",
        "use super::super::c::X;\nuse super::{Low};\nfn f() { let _ = \"crate::a\"; }\n",
    )?;
    write(
        "b/low.rs",
        "fn f() { crate::renamed() }\n#[cfg(test)]\nmod tests { use crate::a; }\n",
    )?;
    write("c.rs", "struct Other; struct X;\n")?;
    let graph = arrows(dir.path())?;
    let to = |from: &str| graph[from].iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(to("a"), ["b::deep", "c"]);
    assert_eq!(to("b::deep"), ["b::low", "c"]);
    assert_eq!(to("b::low"), ["b::deep"]);
    assert_eq!(to("b"), ["b::low"]);
    assert_eq!(to("c"), Vec::<&str>::new());
    Ok(())
}
