//! What a connection knows of its endpoint.

use std::sync::Arc;

use mio::{Poll, Token, Waker};

use crate::base::Base;
use crate::buffer::BufferPool;
use crate::error::TransportError;
use crate::fabric::{FabricConfig, Handler};

/// What the waker of the progress thread reports as.
pub(super) const WAKER: Token = Token(usize::MAX);

/// An endpoint without its connections.
pub(crate) struct Host {
    pub(crate) base: Base,
    waker: Waker,
}

impl Host {
    pub(crate) fn new(
        config: FabricConfig,
        handler: Arc<dyn Handler>,
        buffers: Arc<BufferPool>,
        poll: &Poll,
    ) -> Result<Arc<Self>, TransportError> {
        let waker =
            Waker::new(poll.registry(), WAKER).map_err(|e| TransportError::os("create an eventfd", &e))?;
        Ok(Arc::new(Self {
            base: Base::new(config, handler, buffers)?,
            waker,
        }))
    }

    /// Makes the progress thread look around, whatever it is doing.
    pub(crate) fn wake(&self) {
        self.base.set_news();
        if let Err(e) = self.waker.wake() {
            tracing::error!("wake the progress thread: {e}");
        }
    }
}
