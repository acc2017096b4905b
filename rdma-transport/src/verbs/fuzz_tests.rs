//! Whatever a peer says on the stream or in fragments: no panic, no memory beyond a bound.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;

use super::control::{Read, Stream};
use super::incoming::Assembly;
use super::wire::{self, Info, Kind};
use crate::common::LIMITS;
use crate::test_util::allocating;

fn fragment() -> impl Strategy<Value = Vec<u8>> {
    let len = prop_oneof![0u32..20_000, any::<u32>()];
    let kind = prop_oneof![len.prop_map(Kind::First), Just(Kind::More), Just(Kind::Credit)];
    let body = prop::collection::vec(any::<u8>(), 0..8192);
    let right = (kind, any::<u32>(), body).prop_map(|(kind, credits, body)| {
        let mut out = wire::header(kind, credits).to_vec();
        out.extend(body);
        out
    });
    prop_oneof![4 => right, 1 => prop::collection::vec(any::<u8>(), 0..40)]
}

proptest! {
    #[test]
    fn messages_in_fragments(fragments in prop::collection::vec(fragment(), 0..40)) {
        let (_any, most) = allocating(|| {
            let mut assembly = Assembly::default();
            for fragment in &fragments {
                match assembly.add(fragment) {
                    Ok(Some(message)) => assert!(message.len() <= LIMITS.max_message),
                    Ok(None) => {}
                    Err(_) => break,
                }
            }
        });
        prop_assert!(most <= LIMITS.max_message + 8192, "{most} bytes");
    }

    #[test]
    fn the_stream(bytes in prop::collection::vec(any::<u8>(), 0..9000), kinds in prop::collection::vec(0u8..5, 0..9)) {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let stream = Stream::new(Arc::new(ours.into()));
        for kind in kinds {
            let mut frame = [0; wire::CONTROL];
            frame[0] = kind;
            theirs.write_all(&frame).unwrap();
        }
        theirs.write_all(&bytes).unwrap();
        let (_any, most) = allocating(|| {
            while let Read::Frames(_) = stream.read() {}
        });
        prop_assert!(most < 64 * 1024, "{most} bytes");
    }

    #[test]
    fn queue_pair_data(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
        if let Some(info) = Info::decode(&bytes) {
            prop_assert_eq!(info.encode(), bytes);
        }
    }
}
