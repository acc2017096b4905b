//! Leases over verbs, between two hosts, beside what they consist of: atomics and messages, measured in the same rounds.

use std::path::Path;
use std::time::Instant;

use lockmgr::Mode;
use rdma_transport::{FabricKind, RegionKey};

use super::partner::{NODE, Request, take};
use super::{Args, Match, host, judge};
use crate::lease::node::Member;
use crate::lease::{ACQUIRE_LIMIT, HAND_OVER_HALVES, Tally};
use crate::progress::check;
use crate::stats::{Latency, median, sig};
use crate::table::Table;
use crate::transport::peer;

/// Medians of one round, µs.
struct Round {
    atomic: f64,
    /// An atomic and a read with one doorbell: the batch of an acquisition beside far holders, or by one.
    pair: f64,
    /// Half a round trip of messages.
    half: f64,
    shared: f64,
    exclusive: f64,
    hand_over: f64,
}

/// This side's node, and what it has measured.
pub struct Leases {
    member: Member,
    rounds: Vec<Round>,
}

impl Leases {
    /// Opens a node that takes leases on records of the partner's, and meets the partner's node.
    ///
    /// # Errors
    /// The partner is gone.
    pub fn open(args: &Args, storage: &str, records: RegionKey, partner: &str) -> anyhow::Result<Self> {
        let listen = format!("{}:0", host(&args.listen));
        let member = Member::open(0, records, storage, |name, handler| {
            peer::open(FabricKind::Verbs, listen, name, args.spin(), handler)
        })?;
        member.meet(NODE, partner)?;
        Ok(Self {
            member,
            rounds: Vec::new(),
        })
    }

    /// One round: atomics, leases nobody else wants, messages, a lease that goes to and fro.
    ///
    /// # Errors
    /// The partner is gone, or a lease does not come.
    pub fn round(&mut self, game: &Match) -> anyhow::Result<()> {
        let manager = self.member.manager();
        let alone = |mode| -> anyhow::Result<f64> {
            let mut tally = Tally::new(mode)?;
            tally.play(manager, 0..game.operations)?;
            Ok(tally.acquire.at(0.5) / 1e3)
        };
        let mut hand_over = Latency::new()?;
        let atomic = game.atomic()?;
        let (pair, shared, exclusive) = (game.pair()?, alone(Mode::Shared)?, alone(Mode::Exclusive)?);
        let half = game.echo(&[0; 48])?;
        for _ in 0..game.operations / 2 {
            game.ask(&Request::Lease)?;
            let start = Instant::now();
            take(manager)?;
            hand_over.add(start.elapsed());
        }
        self.rounds.push(Round {
            atomic,
            pair,
            half,
            shared,
            exclusive,
            hand_over: hand_over.at(0.5) / 1e3,
        });
        check()
    }

    /// The figures.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn report(&self, out: &Path) -> anyhow::Result<()> {
        let header = [
            "operation",
            "p50 us",
            "beside",
            "ratio",
            "least–most of a round",
            "target",
            "verdict",
        ];
        let mut table = Table::new("Leases between two hosts, medians of the rounds", &header);
        let of = |what: &dyn Fn(&Round) -> f64| self.rounds.iter().map(what).collect::<Vec<_>>();
        let parts = |r: &Round| r.atomic + HAND_OVER_HALVES * r.half;
        type Figure<'a> = &'a dyn Fn(&Round) -> f64;
        let figures: [(&str, Figure<'_>); 3] = [
            ("one atomic", &|r| r.atomic),
            ("an atomic and a read, one doorbell", &|r| r.pair),
            ("message, half a round trip", &|r| r.half),
        ];
        for (name, figure) in figures {
            let mut row = vec![name.to_owned(), sig(median(&of(figure)))];
            row.resize(header.len(), "-".to_owned());
            table.row(row);
        }
        let sum = format!("{HAND_OVER_HALVES} halves and an atomic");
        let judged: [(&str, Figure<'_>, &str, Figure<'_>, f64); 3] = [
            (
                "acquire shared, nobody else",
                &|r| r.shared,
                "an atomic",
                &|r| r.atomic,
                ACQUIRE_LIMIT,
            ),
            (
                "acquire exclusive, nobody else",
                &|r| r.exclusive,
                "an atomic",
                &|r| r.atomic,
                ACQUIRE_LIMIT,
            ),
            (
                "hand-over, one holder to the other",
                &|r| r.hand_over,
                &sum,
                &parts,
                1.0,
            ),
        ];
        for (name, here, beside, floor, limit) in judged {
            let (here, floor) = (of(here), of(floor));
            let mut row = vec![name.to_owned(), sig(median(&here)), beside.to_owned()];
            row.extend(judge(&here, &floor, false, limit));
            table.row(row);
        }
        table.write_csv(&out.join("rdma-leases.csv"))?;
        println!("{table}");
        Ok(())
    }
}
