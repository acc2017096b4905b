//! Whatever is in the metadata store: an error or values, no panic.

use std::sync::Arc;

use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::crash_tests::world::{Disks, config, reach};
use super::journal::records::{Dirent, Inode, LAYOUT, Member, Superblock, decode, encode, key};
use super::rules::Rules;
use super::service::Service;
use fsd_node::fake_disk::{FakeStore, Table};
use fsd_proto::wire::Created;

/// Decodes; what is a value comes back from its own encoding.
fn read<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(bytes: &[u8]) {
    if let Ok(value) = decode::<T>(bytes) {
        let again = decode::<T>(&encode(&value)).map_err(|refusal| refusal.errno());
        assert_eq!(again, Ok(value));
    }
}

/// Bytes of which many are small, as lengths and tags are.
fn value() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => 0u8..6, 1 => any::<u8>()];
    prop::collection::vec(byte, 0..100)
}

fn member() -> impl Strategy<Value = Vec<u8>> {
    let member = (any::<u8>(), any::<u64>(), "[a-z]{0,5}").prop_map(|(incarnation, life, name)| {
        encode(&Member {
            incarnation,
            life,
            listen: name.clone(),
            name,
        })
    });
    prop_oneof![member, value()]
}

/// A key of one kind, as long as it should be or not.
fn tagged(tag: u8) -> impl Strategy<Value = Vec<u8>> {
    prop::collection::vec(any::<u8>(), 0..20).prop_map(move |mut rest| {
        rest.insert(0, tag);
        rest
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_stored_value_is_damaged_or_comes_back(bytes in value()) {
        read::<Superblock>(&bytes);
        read::<Inode>(&bytes);
        read::<Dirent>(&bytes);
        read::<Member>(&bytes);
        read::<(Created, u64)>(&bytes);
        let _ = (key::number(&bytes), key::second(&bytes), key::rest(&bytes));
    }

    #[test]
    fn a_store_is_damaged_or_can_be_loaded(
        members in prop::collection::btree_map(tagged(b'C'), member(), 0..3),
        answers in prop::collection::btree_map(tagged(b'L'), value(), 0..3),
        next in prop::option::of(value()),
        shards in 0u16..3,
    ) {
        let mut table = Table::from_iter(members.into_iter().chain(answers));
        table.extend(next.map(|next| (key::next_index(0), next)));
        let superblock = Superblock {
            layout: LAYOUT,
            cluster: "c".into(),
            uuid: "u".into(),
            record_bytes: 64,
            shards,
            era: 0,
            tables: Vec::new(),
        };
        let memory = tempfile::tempdir().unwrap();
        let mut config = config().clone();
        config.meta.memory_dir = memory.path().to_owned();
        let reach = reach(&Disks::new().nodes);
        let options = (false, Rules::without(None));
        let _ = Service::open(Arc::new(FakeStore::with(table)), &config, &superblock, options, |_| reach);
    }
}
