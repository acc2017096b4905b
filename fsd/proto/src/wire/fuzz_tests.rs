//! Whatever bytes come as a message of a peer: a value that goes round or an error, no panic.

use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::*;

/// Decodes; what is a value comes back from its own encoding.
fn read<T: Serialize + DeserializeOwned + PartialEq + std::fmt::Debug>(body: &[u8]) {
    if let Ok(value) = decode::<T>(body) {
        let again = postcard::to_stdvec(&value).expect("what was decoded can be encoded");
        assert_eq!(decode::<T>(&again).as_ref(), Ok(&value));
    }
}

fn read_as_everything(body: &[u8]) {
    read::<MetaRequest>(body);
    read::<MetaReply>(body);
    read::<StorageRequest>(body);
    read::<StorageReply>(body);
    read::<MountRequest>(body);
    read::<Visited>(body);
    read::<MountStatus>(body);
    read::<Result<u64, crate::errno::Errno>>(body);
    let _ = Attr::decode(body);
    let _ = Hello::check(body, "c");
}

/// Bytes of which many are small, as tags and lengths are: what is only random rarely gets past the first of them.
fn body() -> impl Strategy<Value = Vec<u8>> {
    let byte = prop_oneof![3 => 0u8..8, 1 => Just(0xff), 1 => any::<u8>()];
    (0u8..32, prop::collection::vec(byte, 0..120)).prop_map(|(tag, mut rest)| {
        rest.insert(0, tag);
        rest
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(miri) { 20 } else { 4000 }))]

    #[test]
    fn garbage_is_an_error_or_a_value(bytes in body()) {
        read_as_everything(&bytes);
        let _ = parse(&bytes);
    }
}

/// A few bytes a level, and a message is long enough for forty thousand levels.
#[test]
fn transactions_within_transactions_do_not_use_up_the_stack() {
    let logged = |request| Logged { order: 0, request };
    let replay = |entries| MetaRequest::Replay { entries, last: false };
    let encoded = |request| postcard::to_stdvec(&request).expect("a request");
    let flat = replay(vec![
        logged(MetaRequest::Sync),
        logged(MetaRequest::Reap { ino: 5 }),
    ]);
    assert_eq!(decode(&encoded(flat.clone())), Ok(flat));
    // What comes before the inner request of one, so often.
    let one = encoded(replay(vec![logged(MetaRequest::Sync)]));
    let before = &one[..3];
    let deep = before.repeat(40_000);
    assert!(decode::<MetaRequest>(&deep).is_err());
    // The same thread decodes others as before.
    assert_eq!(decode(&encoded(MetaRequest::Sync)), Ok(MetaRequest::Sync));
    assert!(decode::<MetaRequest>(&one).is_ok());
}
