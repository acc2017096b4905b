//! Whatever a peer writes to shared memory or the control socket: no panic, no memory beyond a bound.

use std::sync::atomic::Ordering;

use proptest::prelude::*;

use super::control::Notice;
use super::layout::{Channel, RING, Side};
use super::ring::{Consumer, Producer};
use crate::common::LIMITS;
use crate::test_util::allocating;

proptest! {
    #[test]
    fn notices(bytes in prop::collection::vec(any::<u8>(), 0..64), kind in 0u8..5, rights in 0u8..10) {
        let mut right_length = bytes.clone();
        right_length.resize(24, 0);
        right_length[0] = kind;
        right_length[1] = rights;
        let (_any, most) = allocating(|| {
            let known = Notice::decode(&right_length);
            if let Some(notice) = known {
                assert_eq!(Notice::decode(&notice.encode()), Some(notice));
            }
            Notice::decode(&bytes)
        });
        prop_assert_eq!(most, 0);
    }

    #[test]
    fn rings(
        words in prop::collection::vec((0u64..64, any::<u64>()), 0..20),
        lens in prop::collection::vec(0u32..200_000, 0..6),
        tail in prop_oneof![0u64..2 * RING as u64, any::<u64>()],
        head in prop_oneof![0u64..2 * RING as u64, any::<u64>()],
    ) {
        let channel = Channel::create(None).unwrap();
        let side = Side::Connecting;
        for (at, word) in &words {
            channel.ring_word(side, at * 8).store(*word, Ordering::SeqCst);
        }
        // Some records with the right check.
        let mut at = 0u64;
        for len in &lens {
            let check = u64::from(0x5eed_f00du32 ^ at as u32);
            channel.ring_word(side, at).store(check << 32 | u64::from(*len), Ordering::SeqCst);
            at += 8 + u64::from(*len).next_multiple_of(8);
        }
        channel.tail(side).store(tail, Ordering::SeqCst);
        let mut into = vec![0; LIMITS.max_message];
        let (_any, most) = allocating(|| {
            let mut consumer = Consumer::default();
            for _ in 0..100 {
                if !matches!(consumer.pop(&channel, side, &mut into), Ok(Some(_))) {
                    break;
                }
            }
            let mut producer = Producer::default();
            for _ in 0..8 {
                channel.head(side).store(head, Ordering::SeqCst);
                if producer.push(&channel, side, &into).is_err() {
                    break;
                }
            }
        });
        prop_assert_eq!(most, 0);
    }
}
