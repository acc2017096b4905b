//! A storage node has lost its lease table, and mounts that trust the old one live.

use std::sync::Arc;

use super::stage::Cluster;
use crate::crash_tests::cluster::new_inode;
use crate::crash_tests::world::join;
use fsd_node::fake_conn::FakeConn;
use fsd_proto::ino;
use fsd_proto::rpc::Errno;
use fsd_proto::time::Time;
use fsd_proto::wire::{Kind, MetaReply, MetaRequest, NamespaceOp, StorageRequest};

const OLD: [u64; 2] = [1, 1];
const NEW: [u64; 2] = [2, 1];
const YES: Option<Result<MetaReply, Errno>> = Some(Ok(MetaReply::Done));
const NOT_YET: Option<Result<MetaReply, Errno>> = Some(Err(Errno(libc::EAGAIN)));

fn tables(ids: [u64; 2]) -> MetaRequest {
    MetaRequest::Tables {
        ids: ids.to_vec(),
        stores: vec!["a".into(), "b".into()],
        places: vec![0, 0],
    }
}

fn lease(cluster: &mut Cluster, conn: &Arc<FakeConn>, ids: [u64; 2]) -> Option<Result<MetaReply, Errno>> {
    cluster.ask(conn, &tables(ids))
}

/// So many mounts that lease.
fn leasing(mounts: u64) -> Cluster {
    let mut cluster = Cluster::new(mounts);
    *cluster.storage.tables.lock() = OLD;
    for conn in cluster.conns.clone() {
        assert_eq!(lease(&mut cluster, &conn, OLD), YES);
    }
    cluster
}

fn newcomer(cluster: &mut Cluster, life: u64) -> Arc<FakeConn> {
    let conn = FakeConn::new(life);
    let joined = cluster.ask(&conn, &join(None, life));
    assert!(matches!(joined, Some(Ok(MetaReply::Joined(_)))), "{joined:?}");
    conn
}

fn end(cluster: &mut Cluster, mount: u16) {
    cluster.evict(mount);
    cluster.finish();
}

#[test]
fn nobody_leases_in_a_new_table_before_all_have_lost_the_old_one() {
    for restarted in [false, true] {
        let mut cluster = leasing(2);
        let era = cluster.service.journal.eras.now();
        cluster.storage.tables.lock()[0] = NEW[0];
        let new = newcomer(&mut cluster, 3);
        let late = newcomer(&mut cluster, 4);
        assert_eq!(lease(&mut cluster, &new, NEW), NOT_YET);
        cluster.advance();
        let told: Vec<u64> = cluster
            .mounts
            .tables
            .lock()
            .iter()
            .map(|(conn, _)| conn.0)
            .collect();
        assert_eq!(told, [1, 2]);
        assert!(
            cluster
                .mounts
                .tables
                .lock()
                .iter()
                .all(|(_, tables)| *tables == NEW)
        );
        // Nor in the old one, now that it is known to be no more.
        assert_eq!(lease(&mut cluster, &late, OLD), NOT_YET);
        end(&mut cluster, 0);
        assert_eq!(lease(&mut cluster, &new, NEW), NOT_YET);
        if restarted {
            // One that may have been told nothing comes back.
            cluster.restart(&[1]);
            let hello = fsd_proto::wire::Hello::new("test", fsd_proto::wire::Role::Client(None), 3);
            let back = cluster.ask_as(&hello, &new, &join(Some((2, 1)), 3));
            assert!(matches!(back, Some(Ok(MetaReply::Joined(_)))), "{back:?}");
            // What it had begun to do is not stored: it counts among those who lease until it has said what it has found.
            assert_eq!(lease(&mut cluster, &new, NEW), NOT_YET);
            end(&mut cluster, 3);
        }
        cluster.storage.asked.lock().clear();
        cluster.advance();
        assert_eq!(cluster.service.journal.eras.now(), era);
        end(&mut cluster, 1);
        cluster.advance();
        assert_eq!(cluster.service.journal.eras.now(), era + 1);
        let cut = |r: &StorageRequest| matches!(r, StorageRequest::Cut { ends } if ends.len() == 2);
        assert!(
            !cluster.storage.asked(cut).is_empty(),
            "what they have left is cut"
        );
        assert_eq!(lease(&mut cluster, &new, NEW), YES);
        if !restarted {
            assert_eq!(lease(&mut cluster, &late, OLD), NOT_YET);
            assert_eq!(lease(&mut cluster, &late, NEW), YES);
        }
    }
}

/// The record that would say that a mount has the file open is lost: it may write to its frames until it has found that out.
#[test]
fn a_file_without_a_name_stays_while_somebody_may_have_it_open() {
    for lost in [false, true] {
        let mut cluster = leasing(3);
        let conn = cluster.conn(0);
        let reserved = cluster.service.namespace.numbers.reserve(0, 1);
        let Ok(number) = reserved.map(|range| range.inos[0]) else {
            panic!("no number")
        };
        let ops = [
            new_inode(ino::ROOT, number, Kind::File, "one"),
            NamespaceOp::Unlink {
                parent: ino::ROOT,
                name: b"one".to_vec(),
                ino: number,
                keep: true,
            },
        ];
        for (seq, op) in (1..).zip(ops) {
            let request = MetaRequest::Namespace {
                seq,
                acknowledged: seq,
                now: Time(1),
                touched: Vec::new(),
                op,
            };
            let done = cluster.ask(&conn, &request);
            assert!(matches!(done, Some(Ok(_))), "{done:?}");
        }
        let orphans = |cluster: &Cluster| cluster.service.namespace.transactions.orphans();
        assert_eq!(orphans(&cluster), 1);
        if lost {
            cluster.storage.tables.lock()[usize::from(ino::shard(number))] = 7;
        }
        end(&mut cluster, 1);
        assert_eq!(orphans(&cluster), u64::from(lost));
        // All others lose their leases, without anybody's asking for new ones.
        cluster.advance();
        assert_eq!(cluster.mounts.tables.lock().is_empty(), !lost);
        end(&mut cluster, 0);
        assert_eq!(orphans(&cluster), u64::from(lost));
        end(&mut cluster, 2);
        assert_eq!(orphans(&cluster), 0);
    }
}
