//! How endpoints and connections refer to the net: it must not live on because of them.

use std::sync::{Arc, Weak};

use rt::sync::Mutex;

use super::state::State;
use crate::error::TransportError;

#[derive(Clone)]
pub(super) struct NetRef(Weak<Mutex<State>>);

impl NetRef {
    pub(super) fn of(state: &Arc<Mutex<State>>) -> Self {
        Self(Arc::downgrade(state))
    }

    pub(super) fn get(&self) -> Result<Arc<Mutex<State>>, TransportError> {
        self.0.upgrade().ok_or(TransportError::Shutdown)
    }
}
