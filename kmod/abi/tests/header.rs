//! The layout in Rust against the C header: sizes, offsets, constants, as the C compiler has them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fmt::Write;
use std::mem::offset_of;
use std::path::Path;
use std::process::Command;

use distfuse_abi::{Counters, layout, word};

/// Name in C, value in Rust.
fn expected() -> Vec<(String, u64)> {
    let mut all: Vec<(String, u64)> = Vec::new();
    macro_rules! layout_of {
        ($rust:ident, $c:literal, $($field:ident),*) => {
            all.push((format!("sizeof(struct {})", $c), size_of::<layout::$rust>() as u64));
            $({
                let name = stringify!($field).trim_start_matches("r#");
                let offset = offset_of!(layout::$rust, $field) as u64;
                all.push((format!("offsetof(struct {}, {name})", $c), offset));
            })*
        };
    }
    layout_of!(
        Entry,
        "distfuse_entry",
        word,
        ino,
        version,
        since,
        seq,
        valid,
        mode,
        nlink,
        uid,
        gid,
        atime_nsec,
        hints,
        size,
        blocks,
        mtime,
        ctime,
        atime,
        mtime_nsec,
        ctime_nsec,
        space_from,
        space_to
    );
    layout_of!(
        Event,
        "distfuse_event",
        r#type,
        flags,
        ino,
        mode,
        cookie,
        error,
        mtime_nsec,
        size,
        mtime,
        ctime,
        ctime_nsec,
        reserved
    );
    layout_of!(
        Command,
        "distfuse_command",
        r#type,
        flags,
        ino,
        cookie,
        error,
        result
    );
    layout_of!(
        Shared,
        "distfuse_shared",
        abi,
        state,
        term_end,
        event_head,
        event_overflow,
        event_tail,
        event_need_wakeup,
        command_head,
        command_tail,
        command_need_kick
    );
    layout_of!(
        Attach,
        "distfuse_attach",
        abi,
        root_fd,
        flags,
        max_ratio,
        entries,
        events,
        commands,
        cpus,
        map_size,
        counters_offset,
        events_offset,
        commands_offset,
        table_offset,
        buffers_offset,
        buffers,
        spin_us,
        reserved
    );
    for (name, value) in [
        ("ABI_VERSION", layout::ABI_VERSION.into()),
        ("COUNT_MASK", word::COUNT),
        ("MODE_SHIFT", word::MODE_SHIFT.into()),
        ("MODE_MASK", word::MODE),
        ("NONE", word::Mode::None as u64),
        ("SHARED", word::Mode::Shared as u64),
        ("EXCLUSIVE", word::Mode::Exclusive as u64),
        ("REVOKING", word::REVOKING),
        ("WAITERS", word::WAITERS),
        ("DIRTY", word::DIRTY),
        ("MAPPED", word::MAPPED),
        ("USED", word::USED),
        ("GENERATION_SHIFT", word::GENERATION_SHIFT.into()),
        ("ATTR_DATA", layout::ATTR_DATA.into()),
        ("ATTR_ALL", layout::ATTR_ALL.into()),
        ("ATTR_XATTRS", layout::ATTR_XATTRS.into()),
        ("HINT_CALL", layout::HINT_CALL.into()),
        ("WAYS", layout::WAYS as u64),
        ("MIN_ENTRIES", layout::MIN_ENTRIES.into()),
        ("MAX_ENTRIES", layout::MAX_ENTRIES.into()),
        ("HASH_FACTOR", layout::HASH_FACTOR),
        ("EVENT_NEED", layout::EVENT_NEED.into()),
        ("EVENT_DRAINED", layout::EVENT_DRAINED.into()),
        ("EVENT_FLUSHED", layout::EVENT_FLUSHED.into()),
        ("EVENT_CALL", layout::EVENT_CALL.into()),
        ("CALL_WRITE", layout::CALL_WRITE.into()),
        ("CALL_KILL_PRIV", layout::CALL_KILL_PRIV.into()),
        ("CALL_SPACE", layout::CALL_SPACE.into()),
        ("SPACE_CALLS", layout::SPACE_CALLS.into()),
        ("BUFFER_SIZE", layout::BUFFER_SIZE as u64),
        ("MAX_BUFFERS", layout::MAX_BUFFERS.into()),
        ("MAX_SPIN_US", layout::MAX_SPIN_US.into()),
        ("COMMAND_ANSWER", layout::COMMAND_ANSWER.into()),
        ("ANSWER_AGAIN", layout::ANSWER_AGAIN.into()),
        ("FLUSHED_INODE", layout::FLUSHED_INODE.into()),
        ("FLUSHED_NOFILE", layout::FLUSHED_NOFILE.into()),
        ("FLUSHED_KEPT", layout::FLUSHED_KEPT.into()),
        ("COMMAND_WAKE", layout::COMMAND_WAKE.into()),
        ("COMMAND_FLUSH", layout::COMMAND_FLUSH.into()),
        ("FLUSH_UNMAP", layout::FLUSH_UNMAP.into()),
        ("FLUSH_DROP", layout::FLUSH_DROP.into()),
        ("STATE_ATTACHED", layout::STATE_ATTACHED.into()),
        ("STATE_GONE", layout::STATE_GONE.into()),
        ("ATTACH_STAT", layout::ATTACH_STAT.into()),
        ("ATTACH_NAMES", layout::ATTACH_NAMES.into()),
        ("ATTACH_ACCESS", layout::ATTACH_ACCESS.into()),
        ("COUNTERS_STRIDE", layout::COUNTERS_STRIDE as u64),
        ("NR_COUNTERS", Counters::NAMES.len() as u64),
        ("IOC_VERSION", layout::IOC_VERSION),
        ("IOC_ATTACH", layout::IOC_ATTACH),
        ("IOC_KICK", layout::IOC_KICK),
    ] {
        all.push((format!("DISTFUSE_{name}"), value));
    }
    for (index, name) in Counters::NAMES.iter().enumerate() {
        all.push((format!("DISTFUSE_{}", name.to_uppercase()), index as u64));
    }
    for ino in [1, 2, 0xdead_beef, u64::MAX] {
        for bits in [1, 3, 12, 22] {
            all.push((
                format!("distfuse_set({ino}ULL, {bits})"),
                layout::set_of(ino, bits) as u64,
            ));
        }
    }
    all
}

#[test]
fn the_layout_is_that_of_the_c_header() {
    let expected = expected();
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("../include/uapi/distfuse.h");
    let mut program = format!(
        "#include <stddef.h>\n#include <stdio.h>\n#include \"{}\"\nint main(void) {{\n",
        header.display()
    );
    for (name, _) in &expected {
        writeln!(program, "printf(\"%llu\\n\", (unsigned long long)({name}));").unwrap();
    }
    program += "return 0; }\n";
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("layout.c");
    let binary = dir.path().join("layout");
    std::fs::write(&source, program).unwrap();
    let built = Command::new("cc")
        .arg("-Wall")
        .arg("-Werror")
        .arg("-o")
        .arg(&binary)
        .arg(&source)
        .status()
        .unwrap();
    assert!(built.success());
    let output = Command::new(&binary).output().unwrap();
    let found = String::from_utf8(output.stdout).unwrap();
    let found: Vec<u64> = found.lines().map(|line| line.parse().unwrap()).collect();
    assert_eq!(found.len(), expected.len());
    for ((name, value), found) in expected.iter().zip(found) {
        assert_eq!(*value, found, "{name}");
    }
}

#[test]
fn the_device_is_called_the_same() {
    let header = include_str!("../../include/uapi/distfuse.h");
    let name = layout::DEVICE.trim_start_matches("/dev/");
    assert!(header.contains(&format!("DISTFUSE_DEVICE\t\t\"{name}\"")));
}
