//! The adapter as all connections of an endpoint use it.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use super::attend::Due;
use super::cells::Cells;
use super::device::{self, Device};
use super::ffi::{Channel, Event, Mr};
use super::receive::Receive;
use super::region;
use super::wire::{Control, Place};
use crate::buffer::{BufferPool, Registration};
use crate::error::TransportError;
use crate::ops::RegionKey;
use crate::options::VerbsOptions;
use crate::regions::Regions;

pub(super) struct Adapter {
    pub(super) options: VerbsOptions,
    pub(super) regions: Regions<Mr>,
    pub(super) cells: Arc<Cells>,
    pub(super) receive: Receive,
    pub(super) channel: Arc<Channel>,
    port_down: AtomicBool,
    gone: AtomicBool,
    /// Completions for the progress thread to call.
    due: Mutex<VecDeque<Due>>,
    pub(super) device: Arc<Device>,
}

impl Adapter {
    /// Opens the device that the options name, or that fits the address listened on.
    pub(super) fn open(local: SocketAddr, options: &VerbsOptions) -> Result<Arc<Self>, TransportError> {
        let device = Arc::new(device::open(local, options)?);
        let channel = Channel::new(&device.pd.context)
            .map_err(|e| TransportError::os("create a completion channel", &e))?;
        tracing::info!(
            "listening on {local}, RDMA device {} port {} address index {} ({})",
            device.pd.context.name,
            device.port,
            device.gid_index,
            std::net::Ipv6Addr::from(device.gid)
        );
        Ok(Arc::new(Self {
            options: options.clone(),
            regions: Regions::default(),
            cells: Cells::new(&device.pd),
            receive: Receive::new(&device, &channel)?,
            channel,
            port_down: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            due: Mutex::default(),
            device,
        }))
    }

    pub(super) fn name(&self) -> &str {
        &self.device.pd.context.name
    }

    /// The protection domain, as buffers know it: a number that no other has as long as anything is registered in it.
    pub(super) fn domain(&self) -> usize {
        Arc::as_ptr(&self.device.pd).addr()
    }

    /// Buffers that the adapter uses in place.
    pub(super) fn buffers(&self) -> Arc<BufferPool> {
        let (pd, domain) = (Arc::clone(&self.device.pd), self.domain());
        BufferPool::new(Some(Box::new(move |mem| {
            let mr = region::local(&pd, mem)?;
            Ok(Registration {
                domain,
                lkey: mr.lkey(),
                _keep: Box::new(mr),
            })
        })))
    }

    /// What the device has said is wrong with it.
    pub(super) fn trouble(&self) -> Option<String> {
        let name = self.name();
        if self.gone.load(Ordering::SeqCst) {
            return Some(format!("the RDMA device {name} has failed or was removed"));
        }
        let down = self.port_down.load(Ordering::SeqCst);
        down.then(|| format!("port {} of the RDMA device {name} is down", self.device.port))
    }

    /// Hears what the device reports; true if it has gone.
    pub(super) fn heed(&self) -> bool {
        let name = self.name();
        let mut gone = false;
        while let Some(event) = self.device.pd.context.event() {
            match event {
                Event::PortDown(port) if port == self.device.port => {
                    self.port_down.store(true, Ordering::SeqCst);
                    tracing::warn!("port {port} of the RDMA device {name} is down");
                }
                Event::PortUp(port) if port == self.device.port => {
                    self.port_down.store(false, Ordering::SeqCst);
                    tracing::info!("port {port} of the RDMA device {name} is up");
                }
                Event::PortDown(_) | Event::PortUp(_) => {}
                Event::DeviceGone => {
                    self.gone.store(true, Ordering::SeqCst);
                    tracing::error!("the RDMA device {name} has failed or was removed");
                    gone = true;
                }
                Event::Other(what) => tracing::debug!("{name}: {what}"),
            }
        }
        gone
    }

    /// What a region key stands for.
    pub(super) fn find(&self, key: u64) -> Control {
        self.regions.with(RegionKey(key), |found| match found {
            Some((mr, access)) => Control::There(
                key,
                Place {
                    base: mr.mem.address(),
                    len: mr.mem.len() as u64,
                    rkey: mr.rkey(),
                    access: *access,
                },
            ),
            None => Control::Nowhere(key),
        })
    }

    /// Leaves a completion to the progress thread; false if its caller attends to it.
    pub(super) fn owe(&self, due: Due) -> bool {
        match due.offer() {
            Some(due) => {
                self.due.lock().push_back(due);
                true
            }
            None => false,
        }
    }

    /// Calls the completions that are due; for the progress thread.
    pub(super) fn call_due(&self) -> bool {
        let mut worked = false;
        loop {
            // Not while the lock is held: they may submit.
            let due = self.due.lock().pop_front();
            let Some(due) = due else { return worked };
            due.call();
            worked = true;
        }
    }
}
