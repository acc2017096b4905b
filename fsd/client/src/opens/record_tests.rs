//! The bits of several mounts in one record, through opens, closes, pins and failures in the middle of a batch.

use std::sync::Arc;

use lockmgr::{NodeId, RecordLayout};
use proptest::prelude::*;
use rdma_transport::{AsyncOp, Completion, ConnId, Connection, Op, RegionKey, RemoteAddr, TransportError};
use rt::sync::Mutex;
use rt::time::Instant;

use super::Place;
use crate::cache::opens::{Opens, Usage, UsageBit};
use fsd_proto::ino;

/// A record in memory. Batches stop after some operations if that is set.
struct Memory {
    words: Mutex<Vec<u64>>,
    fail_after: Mutex<Option<usize>>,
}

impl Memory {
    fn run(&self, op: &mut Op<'_>) {
        let mut words = self.words.lock();
        match op {
            Op::Read { at, into } => {
                for (i, bytes) in into.chunks_exact_mut(8).enumerate() {
                    bytes.copy_from_slice(&words[at.offset as usize / 8 + i].to_ne_bytes());
                }
            }
            Op::Faa { at, add, old } => {
                let word = &mut words[at.offset as usize / 8];
                *old = *word;
                *word = word.wrapping_add(*add);
            }
            _ => unreachable!("not used by records of opens"),
        }
    }
}

impl Connection for Memory {
    fn execute(&self, ops: &mut [Op<'_>]) -> Result<(), TransportError> {
        let end = self.fail_after.lock().take();
        for (i, op) in ops.iter_mut().enumerate() {
            if end == Some(i) {
                return Err(TransportError::Shutdown);
            }
            self.run(op);
        }
        Ok(())
    }

    fn id(&self) -> ConnId {
        unreachable!()
    }

    fn peer_identity(&self) -> &[u8] {
        &[]
    }

    fn peer_addr(&self) -> String {
        String::new()
    }

    fn is_alive(&self) -> bool {
        true
    }

    fn submit(&self, _: Vec<AsyncOp>, _: Completion) {
        unreachable!()
    }

    fn send(&self, _: &[u8]) -> Result<(), TransportError> {
        unreachable!()
    }

    fn queue(&self, _: &[u8]) -> Result<(), TransportError> {
        unreachable!()
    }

    fn close(&self) {}
}

/// The inode that the record serves, of a later generation than the first.
const INO: u64 = 5 << 44 | 9;

/// Neighbours in one word, its last bit among them, and one in another word.
const NODES: [u16; 4] = [61, 62, 63, 64];

struct Cluster {
    memory: Arc<Memory>,
    layout: RecordLayout,
    mounts: Vec<Mount>,
}

#[derive(Default)]
struct Mount {
    opens: Opens,
    /// Open handles; true: for writing.
    handles: Vec<bool>,
}

impl Cluster {
    fn new() -> Self {
        let layout = RecordLayout::new(64).unwrap();
        let words = Mutex::new(vec![0; layout.record_bytes() as usize / 8]);
        let fail_after = Mutex::default();
        Self {
            memory: Arc::new(Memory { words, fail_after }),
            layout,
            mounts: NODES.map(|_| Mount::default()).into(),
        }
    }

    fn place(&self, mount: usize) -> Place {
        Place {
            conn: Arc::clone(&self.memory) as Arc<dyn Connection>,
            record: RemoteAddr {
                key: RegionKey(0),
                offset: 0,
            },
            layout: self.layout,
            unlinked: ino::unlinked_flag(INO),
            node: NodeId(NODES[mount]),
            twin: None,
        }
    }

    fn in_memory(&self, mount: usize) -> Usage {
        let words = self.memory.words.lock();
        let node = NodeId(NODES[mount]);
        let is_set = |(offset, bit): (u64, u64)| words[offset as usize / 8] & bit != 0;
        Usage::from_bits(
            is_set(self.layout.open_bit(node)),
            is_set(self.layout.use_bit(node)),
        )
    }

    fn act(&mut self, mount: usize, action: Action) {
        let place = self.place(mount);
        let Mount { opens, handles } = &mut self.mounts[mount];
        let (count, writers, pinned) = (opens.count, opens.writers, opens.pinned);
        match action {
            Action::Open { writer } => {
                opens.count += 1;
                opens.writers += u32::from(writer);
                handles.push(writer);
            }
            Action::Close { oldest } => {
                let Some(last) = handles.len().checked_sub(1) else {
                    return;
                };
                let writer = handles.remove(if oldest { 0 } else { last });
                opens.count -= 1;
                opens.writers -= u32::from(writer);
            }
            Action::Pin => opens.pinned = Some(Instant::now()),
            Action::EndPin => opens.pinned = None,
        }
        let seen = place.record(opens);
        match (seen, action) {
            (Ok(seen), _) => {
                assert_eq!(seen.own(), opens.usage());
                assert!(opens.is_recorded());
                self.check_seen(mount, &seen);
            }
            // Failed opens and pins did not happen; closes and ends of pins did.
            (Err(_), Action::Open { .. } | Action::Pin) => {
                if opens.count > count {
                    handles.pop();
                }
                (opens.count, opens.writers, opens.pinned) = (count, writers, pinned);
            }
            (Err(_), _) => {}
        }
    }

    fn check_seen(&self, mount: usize, seen: &super::RecordUse) {
        let all = (0..NODES.len()).map(|m| (m, self.in_memory(m)));
        let of_others = |bit| all.clone().any(|(m, usage)| m != mount && usage.has(bit));
        assert_eq!(seen.opened_by_others(), of_others(UsageBit::Open));
        let written = all
            .clone()
            .any(|(m, usage)| m != mount && usage == Usage::Writing);
        assert_eq!(seen.written_by_others(), written);
        assert_eq!(
            seen.in_use(),
            all.clone().any(|(_, usage)| usage != Usage::Unused)
        );
        assert!(!seen.is_orphan());
    }

    /// Every mount's bits say what it does, and there are no others.
    fn check(&self) {
        for (m, mount) in self.mounts.iter().enumerate().filter(|(_, m)| !m.opens.in_doubt) {
            assert_eq!(self.in_memory(m), mount.opens.recorded, "mount {}", NODES[m]);
        }
        let words = self.memory.words.lock();
        let mut rest = words.clone();
        for node in NODES.map(NodeId) {
            for (offset, bit) in [self.layout.open_bit(node), self.layout.use_bit(node)] {
                rest[offset as usize / 8] &= !bit;
            }
        }
        assert!(rest.iter().all(|&w| w == 0), "carried: {words:x?}");
    }
}

#[derive(Debug, Clone, Copy)]
enum Action {
    Open { writer: bool },
    Close { oldest: bool },
    Pin,
    EndPin,
}

fn action() -> impl Strategy<Value = Action> {
    prop_oneof![
        any::<bool>().prop_map(|writer| Action::Open { writer }),
        any::<bool>().prop_map(|oldest| Action::Close { oldest }),
        Just(Action::Pin),
        Just(Action::EndPin),
    ]
}

proptest! {
    #[test]
    fn bits_say_the_truth_and_never_carry(
        steps in prop::collection::vec(
            (0..NODES.len(), action(), prop::option::weighted(0.2, 0usize..6)), 0..60,
        ),
    ) {
        let mut cluster = Cluster::new();
        for (mount, action, fail_after) in steps {
            *cluster.memory.fail_after.lock() = fail_after;
            cluster.act(mount, action);
            cluster.check();
        }
        *cluster.memory.fail_after.lock() = None;
        for mount in 0..NODES.len() {
            let place = cluster.place(mount);
            let opens = &mut cluster.mounts[mount].opens;
            place.record(opens).unwrap();
            prop_assert!(opens.is_recorded());
            *opens = Opens { recorded: opens.recorded, ..Opens::default() };
            place.record(opens).unwrap();
            cluster.check();
        }
        prop_assert!(cluster.memory.words.lock().iter().all(|&w| w == 0));
    }
}

#[test]
fn who_uses_it_last_sees_an_orphan() {
    let mut cluster = Cluster::new();
    cluster.act(0, Action::Open { writer: true });
    cluster.act(1, Action::Pin);
    let flag = |ino| cluster.memory.words.lock()[RecordLayout::FLAGS as usize / 8] = ino::unlinked_flag(ino);
    flag(INO);
    for (mount, last) in [(0, false), (1, true)] {
        let place = cluster.place(mount);
        let opens = &mut cluster.mounts[mount].opens;
        *opens = Opens {
            recorded: opens.recorded,
            ..Opens::default()
        };
        assert_eq!(place.record(opens).unwrap().is_orphan(), last);
    }
}
