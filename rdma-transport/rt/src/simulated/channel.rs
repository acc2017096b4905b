//! Channels. Each has a real one inside, which in a simulation nobody waits for.

use std::panic::Location;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel as real;

use super::sched;
use super::task::{Outcome, Why};
use super::time::Instant;

pub use real::{RecvError, RecvTimeoutError, SendError, TryRecvError, TrySendError};

/// Its place in memory is where receivers wait, and the next one where senders do.
#[derive(Debug)]
struct Place(#[allow(dead_code)] [u8; 2]);

/// Where things are put in.
pub struct Sender<T> {
    real: Option<real::Sender<T>>,
    place: Arc<Place>,
}

/// Where they come out.
pub struct Receiver<T> {
    real: Option<real::Receiver<T>>,
    place: Arc<Place>,
}

fn made<T>((sender, receiver): (real::Sender<T>, real::Receiver<T>)) -> (Sender<T>, Receiver<T>) {
    let place = Arc::new(Place([0; 2]));
    let other = Arc::clone(&place);
    let sender = Sender {
        real: Some(sender),
        place,
    };
    let receiver = Receiver {
        real: Some(receiver),
        place: other,
    };
    (sender, receiver)
}

/// A channel that takes everything.
#[must_use]
pub fn unbounded<T>() -> (Sender<T>, Receiver<T>) {
    made(real::unbounded())
}

/// A channel that has room for so many.
#[must_use]
pub fn bounded<T>(room: usize) -> (Sender<T>, Receiver<T>) {
    made(real::bounded(room))
}

impl Place {
    fn receivers(&self) -> usize {
        std::ptr::from_ref(self).cast::<()>() as usize
    }

    fn senders(&self) -> usize {
        self.receivers() + 1
    }
}

impl<T> Sender<T> {
    fn real(&self) -> &real::Sender<T> {
        match &self.real {
            Some(real) => real,
            None => unreachable!("taken when it is dropped only"),
        }
    }

    /// Puts something in; waits for room.
    ///
    /// # Errors
    /// Nobody will receive it.
    #[track_caller]
    pub fn send(&self, mut what: T) -> Result<(), SendError<T>> {
        if !sched::point() {
            return self.real().send(what);
        }
        loop {
            match self.try_send(what) {
                Ok(()) => return Ok(()),
                Err(TrySendError::Disconnected(back)) => return Err(SendError(back)),
                Err(TrySendError::Full(back)) => what = back,
            }
            let on = [self.place.senders(), 0];
            if sched::block(Why::Channel, on, None, Location::caller(), |_| {}) == Some(Outcome::TimedOut) {
                return Err(SendError(what));
            }
        }
    }

    /// Puts something in if there is room.
    ///
    /// # Errors
    /// There is not, or nobody will receive it.
    pub fn try_send(&self, what: T) -> Result<(), TrySendError<T>> {
        sched::point();
        self.real().try_send(what)?;
        sched::wake(self.place.receivers(), false);
        Ok(())
    }
}

impl<T> Receiver<T> {
    fn real(&self) -> &real::Receiver<T> {
        match &self.real {
            Some(real) => real,
            None => unreachable!("taken when it is dropped only"),
        }
    }

    /// Takes something out, or waits.
    ///
    /// # Errors
    /// Nobody will send anything.
    #[track_caller]
    pub fn recv(&self) -> Result<T, RecvError> {
        if !sched::simulated() {
            return self.real().recv();
        }
        self.until(None, Location::caller()).map_err(|_| RecvError)
    }

    /// Takes something out, or waits, not longer than that.
    ///
    /// # Errors
    /// Nothing came, or nobody will send anything.
    #[track_caller]
    pub fn recv_timeout(&self, time: Duration) -> Result<T, RecvTimeoutError> {
        self.recv_deadline(Instant::now() + time)
    }

    /// As [`Receiver::recv_timeout`].
    ///
    /// # Errors
    /// Nothing came, or nobody will send anything.
    #[track_caller]
    pub fn recv_deadline(&self, until: Instant) -> Result<T, RecvTimeoutError> {
        if !sched::simulated() {
            return self.real().recv_deadline(until.real());
        }
        self.until(Some(until), Location::caller())
    }

    fn until(&self, until: Option<Instant>, at: &'static Location<'static>) -> Result<T, RecvTimeoutError> {
        loop {
            match self.try_recv() {
                Ok(what) => return Ok(what),
                Err(TryRecvError::Disconnected) => return Err(RecvTimeoutError::Disconnected),
                Err(TryRecvError::Empty) => {}
            }
            let deadline = until.map(Instant::virtual_nanos);
            let on = [self.place.receivers(), 0];
            if sched::block(Why::Channel, on, deadline, at, |_| {}) == Some(Outcome::TimedOut) {
                return Err(RecvTimeoutError::Timeout);
            }
        }
    }

    /// Takes something out if there is something.
    ///
    /// # Errors
    /// There is not; perhaps there never will be.
    pub fn try_recv(&self) -> Result<T, TryRecvError> {
        sched::point();
        let what = self.real().try_recv()?;
        sched::wake(self.place.senders(), false);
        Ok(what)
    }

    /// Is there nothing in it now?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.real().is_empty()
    }

    /// All that there is.
    pub fn try_iter(&self) -> impl Iterator<Item = T> + '_ {
        std::iter::from_fn(|| self.try_recv().ok())
    }
}

/// What came first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Either<A, B> {
    /// From the first channel.
    First(Result<A, RecvError>),
    /// From the second.
    Second(Result<B, RecvError>),
    /// Nothing in time.
    Neither,
}

/// Receives from the one of two channels that has something, or has lost its senders.
#[track_caller]
pub fn recv_either<A, B>(first: &Receiver<A>, second: &Receiver<B>, timeout: Duration) -> Either<A, B> {
    if !sched::simulated() {
        return crossbeam::channel::select! {
            recv(first.real()) -> got => Either::First(got),
            recv(second.real()) -> got => Either::Second(got),
            default(timeout) => Either::Neither,
        };
    }
    let until = (Instant::now() + timeout).virtual_nanos();
    let on = [first.place.receivers(), second.place.receivers()];
    loop {
        match first.try_recv() {
            Ok(what) => return Either::First(Ok(what)),
            Err(TryRecvError::Disconnected) => return Either::First(Err(RecvError)),
            Err(TryRecvError::Empty) => {}
        }
        match second.try_recv() {
            Ok(what) => return Either::Second(Ok(what)),
            Err(TryRecvError::Disconnected) => return Either::Second(Err(RecvError)),
            Err(TryRecvError::Empty) => {}
        }
        // Something may have come into the first one while the second was looked at.
        if !first.real().is_empty() {
            continue;
        }
        let at = Location::caller();
        if sched::block(Why::Channel, on, Some(until), at, |_| {}) == Some(Outcome::TimedOut) {
            return Either::Neither;
        }
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        Self {
            real: self.real.clone(),
            place: Arc::clone(&self.place),
        }
    }
}

impl<T> Clone for Receiver<T> {
    fn clone(&self) -> Self {
        Self {
            real: self.real.clone(),
            place: Arc::clone(&self.place),
        }
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        drop(self.real.take());
        sched::wake(self.place.receivers(), true);
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        drop(self.real.take());
        sched::wake(self.place.senders(), true);
    }
}

impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Sender")
    }
}

impl<T> std::fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Receiver")
    }
}
