use super::*;

fn job(size: u32) -> Rendezvous<impl Fn(&Addresses) -> Result<String, String>> {
    let job = Job {
        size,
        roles: Roles::parse(Some("meta=0,storage=0-1,client=1-2"), size).unwrap(),
        command: vec!["true".into()],
        uuid: "u".into(),
    };
    Rendezvous::new(job, |(meta, storage)| Ok(format!("{meta} {}", storage.join(" "))))
}

fn here(rank: u32, ip: &str) -> Say {
    Say::Here {
        rank,
        host: format!("host{rank}"),
        ip: ip.parse().unwrap(),
        coordinator: "10.0.0.9".parse().unwrap(),
        ports: [7000, 7100],
    }
}

const PHASES: [Phase; 7] = [
    Phase::Storage,
    Phase::Meta,
    Phase::Mount,
    Phase::Run,
    Phase::Unmount,
    Phase::EndMeta,
    Phase::EndStorage,
];

fn ranks(tells: &[Tell]) -> Vec<u32> {
    tells.iter().map(|t| t.rank).collect()
}

#[test]
fn a_job_from_beginning_to_end() {
    let mut r = job(3);
    assert_eq!(r.said(2, here(2, "10.0.0.2")), []);
    assert_eq!(r.said(0, here(0, "127.0.0.1")), []);
    assert_eq!(r.missing(), [1]);
    let plans = r.said(1, here(1, "10.0.0.1"));
    assert_eq!(ranks(&plans), [0, 1, 2]);
    let plan = |i: usize| match &plans[i].order {
        Order::Plan(plan) => plan.as_ref().clone(),
        other => panic!("{other:?}"),
    };
    // The first host knows itself as the loopback only; the others reach it as the coordinator's.
    assert_eq!(plan(0).config, "10.0.0.9:7000 10.0.0.9:7100 10.0.0.1:7100");
    assert_eq!(
        (plan(0).meta, plan(0).storage, plan(0).client),
        (true, vec![0], None)
    );
    assert_eq!(
        (plan(1).meta, plan(1).storage, plan(1).client),
        (false, vec![1], Some(0))
    );
    assert_eq!(
        (plan(2).meta, plan(2).storage, plan(2).client),
        (false, vec![], Some(1))
    );
    for phase in PHASES {
        assert!(!r.is_over());
        let done = |rank: u32| Say::Done {
            phase,
            status: if phase == Phase::Run { rank as u8 } else { 0 },
        };
        assert_eq!(r.said(1, done(1)), []);
        assert_eq!(r.said(0, done(0)), []);
        let go = r.said(2, done(2));
        assert_eq!(ranks(&go), [0, 1, 2]);
        let worst = if phase == Phase::EndStorage { 2 } else { 0 };
        assert!(go.iter().all(|t| t.order == Order::Go(worst) && !t.watch));
    }
    assert!(r.is_over());
    assert_eq!((r.status(), r.stopped()), (2, None));
    assert_eq!(r.gone(1), []);
    assert_eq!(r.stopped(), None);
}

#[test]
fn one_that_fails_stops_all() {
    let mut r = job(3);
    for rank in 0..3 {
        r.said(rank, here(rank, "10.0.0.1"));
    }
    assert_eq!(r.said(2, Say::Watch), []);
    assert_eq!(r.said(0, Say::Watch), []);
    r.said(
        0,
        Say::Done {
            phase: Phase::Storage,
            status: 0,
        },
    );
    let tells = r.said(1, Say::Failed { why: "disk".into() });
    let stop = |rank, watch| Tell {
        rank,
        watch,
        order: Order::Stop("rank 1 on host1: disk".into()),
    };
    let heard = Tell {
        rank: 1,
        watch: false,
        order: Order::Go(0),
    };
    // Whoever waits is told, in answer to what it waits for; who works, through its watch.
    assert_eq!(tells, [heard, stop(0, false), stop(0, true), stop(2, true)]);
    assert_eq!(
        r.said(
            2,
            Say::Done {
                phase: Phase::Storage,
                status: 0
            }
        ),
        [stop(2, false)]
    );
    assert!(!r.is_over());
    for rank in 0..3 {
        assert_eq!(r.gone(rank), []);
    }
    assert!(r.is_over());
    assert_eq!(r.status(), 1);
}

#[test]
fn one_that_goes_or_is_out_of_step_stops_all() {
    let mut r = job(2 + 1);
    r.said(0, here(0, "10.0.0.1"));
    let tells = r.said(0, here(0, "10.0.0.1"));
    assert!(matches!(&tells[0].order, Order::Stop(why) if why.contains("rank 0")));
    let mut r = job(3);
    for rank in 0..3 {
        r.said(rank, here(rank, "10.0.0.1"));
    }
    let tells = r.said(
        1,
        Say::Done {
            phase: Phase::Run,
            status: 0,
        },
    );
    assert_eq!(tells, []);
    assert_eq!(r.stopped(), Some("rank 1 on host1 is out of step"));
    let mut r = job(3);
    r.said(1, here(1, "10.0.0.1"));
    r.said(1, Say::Watch);
    assert_eq!(ranks(&r.gone(1)), [1]);
    assert_eq!(r.stopped(), Some("rank 1 on host1 has gone"));
    assert!(matches!(
        r.said(7, Say::Watch)[..],
        [Tell {
            order: Order::Stop(_),
            ..
        }]
    ));
}

#[test]
fn a_job_without_a_command_is_ended_by_its_watchers() {
    let mut r = job(3);
    for rank in 0..3 {
        r.said(rank, here(rank, "10.0.0.1"));
        r.said(rank, Say::Watch);
    }
    let tells = r.finish();
    assert!(tells.iter().all(|t| t.watch && t.order == Order::Finish));
    assert_eq!(ranks(&tells), [0, 1, 2]);
    assert_eq!(r.finish(), []);
}
