//! Whatever the kernel's side says of the layout, and has in rings and table: an error or values, and no access outside of the mapping.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use proptest::prelude::*;

use crate::attachment::Attachment;
use crate::layout::{self, Attach};
use crate::messages::{Answer, Call, Command, Event};
use crate::table::{Attributes, Grant};
use crate::word::Mode;

/// Bytes of the file that is mapped in the place of the device.
const SIZE: u64 = 1 << 18;
const EVENTS: u32 = 16;

fn device(bytes: &[u8]) -> File {
    let file = tempfile::tempfile_in("/dev/shm").expect("a file");
    file.set_len(SIZE).expect("its size");
    file.write_all_at(bytes, 0).expect("its contents");
    file
}

/// A layout that is right.
fn sound() -> Attach {
    Attach {
        abi: layout::ABI_VERSION,
        entries: 64,
        events: EVENTS,
        commands: 16,
        cpus: 1,
        buffers: 2,
        counters_offset: 4096,
        events_offset: 8192,
        commands_offset: 4096 * 3,
        table_offset: 4096 * 4,
        buffers_offset: 4096 * 8,
        map_size: SIZE,
        ..Attach::default()
    }
}

fn attached(bytes: &[u8], layout: Attach) -> Option<Attachment> {
    Attachment::over(device(bytes), layout, Duration::ZERO).ok()
}

/// Touches all that the layout names.
fn use_all(attachment: &Attachment, inos: &[u64]) {
    let _ = attachment.counters();
    let _ = attachment.is_gone();
    let table = attachment.table();
    for &ino in inos {
        let _ = table.grant(ino, Mode::Exclusive, &Grant::default());
        let _ = table.set_attributes(ino, &Attributes::default());
        let _ = (table.word(ino), table.neighbours(ino), table.used_again(ino));
        let _ = table.revoke(ino, Mode::Shared, false);
        let _ = (table.finish(ino, Mode::None), table.cancel(ino), table.evict(ino));
    }
    let mut into = [0; layout::BUFFER_SIZE + 9];
    for call in [0, 1, 2, u32::MAX] {
        attachment.fill_buffer(call, &into);
        attachment.read_buffer(call, &mut into);
    }
    let command = Command::Answer {
        call: 1,
        answer: Answer::Again,
    };
    // The file has no doorbell: an error, after the command has been written.
    let _ = attachment.command(command);
}

/// Sizes and offsets around those that are right.
fn number() -> impl Strategy<Value = u64> {
    prop_oneof![
        3 => (0..SIZE / 4096 + 2).prop_map(|n| n * 4096),
        1 => (0u32..64).prop_map(|bit| 1 << bit),
        1 => any::<u64>(),
    ]
}

fn count() -> impl Strategy<Value = u32> {
    prop_oneof![3 => (0u32..12).prop_map(|bit| 1 << bit), 1 => any::<u32>(), 1 => 0u32..70]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn a_layout_is_refused_or_inside(
        offsets in prop::array::uniform5(prop::option::weighted(0.3, number())),
        counts in prop::array::uniform5(prop::option::weighted(0.3, count())),
        map_size in 0..=SIZE,
        whole in prop::bool::weighted(0.7),
    ) {
        let mut layout = sound();
        let places = [&mut layout.counters_offset, &mut layout.events_offset, &mut layout.commands_offset, &mut layout.table_offset, &mut layout.buffers_offset];
        places.into_iter().zip(offsets).for_each(|(place, new)| *place = new.unwrap_or(*place));
        let sizes = [&mut layout.entries, &mut layout.events, &mut layout.commands, &mut layout.cpus, &mut layout.buffers];
        sizes.into_iter().zip(counts).for_each(|(size, new)| *size = new.unwrap_or(*size));
        layout.map_size = if whole { SIZE } else { map_size };
        if let Some(attachment) = attached(&[], layout) {
            use_all(&attachment, &[1, 77]);
        }
    }

    #[test]
    fn garbage_in_rings_and_table_is_read_as_something(
        bytes in prop::collection::vec(any::<u8>(), 4096),
        (tail, ahead) in (any::<u64>(), 0u64..40),
        kinds in prop::collection::vec(0u32..6, EVENTS as usize),
        inos in prop::collection::vec(0u64..9, 1..6),
    ) {
        // Everything but the counts of the events' ring is noise.
        let all = bytes.repeat((SIZE / 4096) as usize);
        let attachment = attached(&all, sound()).expect("a sound layout");
        attachment.set_events(tail, tail.wrapping_add(ahead), &kinds);
        for _ in 0..ahead {
            match attachment.try_event() {
                Ok(Some(Event::Call(Call { act: crate::messages::Act::Read, len, .. }))) => {
                    prop_assert!(len as usize <= layout::BUFFER_SIZE);
                }
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => break,
            }
        }
        use_all(&attachment, &inos);
    }
}
