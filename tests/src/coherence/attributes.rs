//! Each attribute that can be set, from each of its values to each other one, set on either side.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, ensure};

use super::Pair;
use crate::sys;

/// Sets one to a value.
type Set = fn(&Path, i64) -> std::io::Result<()>;
/// What it is.
type Get = fn(&fs::Metadata) -> i64;

const BILLION: i64 = 1_000_000_000;

fn seconds(nanos: i64) -> (i64, i64) {
    (nanos.div_euclid(BILLION), nanos.rem_euclid(BILLION))
}

/// Nanoseconds since 1970: now, the beginning, before it, long before it, beyond what 32 bits hold.
const TIMES: &[i64] = &[
    1_700_000_000 * BILLION + 5,
    0,
    -BILLION,
    -BILLION * BILLION + 1,
    4_300_000_000 * BILLION + 999_999_999,
];

const ATTRIBUTES: &[(&str, &[i64], Set, Get)] = &[
    (
        "atime",
        TIMES,
        |path, value| sys::utimens(path, seconds(value), (0, libc::UTIME_OMIT)),
        |seen| seen.atime() * BILLION + seen.atime_nsec(),
    ),
    (
        "mtime",
        TIMES,
        |path, value| sys::utimens(path, (0, libc::UTIME_OMIT), seconds(value)),
        |seen| seen.mtime() * BILLION + seen.mtime_nsec(),
    ),
    (
        "mode",
        &[0o644, 0, 0o777, 0o4755, 0o2711, 0o1666],
        |path, value| fs::set_permissions(path, fs::Permissions::from_mode(value as u32)),
        |seen| i64::from(seen.mode() & 0o7777),
    ),
    (
        "owner",
        &[0, 1000, 65534, 4_294_967_293],
        |path, value| chown(path, Some(value as u32), None),
        |seen| i64::from(seen.uid()),
    ),
    (
        "group",
        &[0, 1000, 65534, 4_294_967_293],
        |path, value| chown(path, None, Some(value as u32)),
        |seen| i64::from(seen.gid()),
    ),
    (
        "size",
        &[0, 1, 4096, 100_000, 5, 1 << 33],
        sys::truncate,
        |seen| seen.len() as i64,
    ),
];

pub(super) fn each(pair: &Pair, _round: usize) -> anyhow::Result<()> {
    let (a, b) = pair.both("attributes");
    fs::write(&a, b"x")?;
    for (name, values, set, get) in ATTRIBUTES {
        for from in *values {
            for to in *values {
                for (value, path) in [(from, &a), (to, &b)] {
                    set(path, *value).with_context(|| format!("{name} of {value}"))?;
                    let (here, there) = (get(&a.metadata()?), get(&b.metadata()?));
                    ensure!(
                        here == *value && there == *value,
                        "{name} from {from} to {to}: {value} was set at {}, the sides show {here} and {there}",
                        path.display()
                    );
                }
            }
        }
    }
    // How many blocks, and names, nobody sets: both sides tell the same, and what has data has blocks.
    fs::write(&a, vec![7; 300_000])?;
    let blocks = (a.metadata()?.blocks(), b.metadata()?.blocks());
    ensure!(
        blocks.0 > 0 && blocks.1 > 0,
        "blocks of a file with data: {blocks:?}"
    );
    fs::hard_link(&b, b.with_extension("2"))?;
    ensure!(a.metadata()?.nlink() == 2, "names");
    fs::remove_file(a.with_extension("2"))?;
    ensure!(b.metadata()?.nlink() == 1, "names");
    fs::remove_file(&a)?;
    Ok(())
}
