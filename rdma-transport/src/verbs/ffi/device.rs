//! Devices, protection domains, regions.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Once};

use rdma_sys as sys;
use rustix::fs::OFlags;

use super::status::{check, text};
use crate::mem::SharedMem;

/// `IBV_GID_TYPE_ROCE_V2`; not in the bindings.
const ROCE_V2: u32 = 2;
const LAYER_ETHERNET: u8 = 2;

unsafe extern "C" {
    /// Inline in the header, over this symbol of the library.
    #[link_name = "_ibv_query_gid_ex"]
    fn query_gid_ex(
        context: *mut sys::ibv_context,
        port: u32,
        index: u32,
        entry: *mut sys::ibv_gid_entry,
        flags: u32,
        size: usize,
    ) -> i32;
}

/// What a device can do, as far as it matters here.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DeviceLimits {
    pub(crate) ports: u8,
    pub(crate) max_mr_size: u64,
    pub(crate) max_qp_wr: u32,
    pub(crate) max_cqe: u32,
    pub(crate) max_srq_wr: u32,
    /// Reads and atomics that may be under way as their target, as their source.
    pub(crate) rd_atomic_target: u8,
    pub(crate) rd_atomic_source: u8,
    pub(crate) atomics: bool,
    /// Regions need not be pinned.
    pub(crate) on_demand: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct PortInfo {
    pub(crate) active: bool,
    pub(crate) ethernet: bool,
    pub(crate) lid: u16,
    /// As in `ibv_mtu`: 1 is 256 bytes, 5 is 4096.
    pub(crate) mtu: u8,
    pub(crate) gids: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gid {
    pub(crate) raw: [u8; 16],
    pub(crate) roce_v2: bool,
}

/// What a device says without being asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    PortDown(u8),
    PortUp(u8),
    DeviceGone,
    Other(String),
}

/// An open device; closed when the last object made from it has gone.
pub(crate) struct Context {
    raw: NonNull<sys::ibv_context>,
    pub(crate) name: String,
}

// SAFETY: libibverbs locks or needs no locks: its functions may be called from any thread.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

/// Calls `act` with each device of this machine until it returns something.
fn find<R>(mut act: impl FnMut(*mut sys::ibv_device, String) -> Option<R>) -> io::Result<Option<R>> {
    let mut count = 0;
    // SAFETY: the list ends after `count` entries and is freed below, after the last use of its devices.
    let list = unsafe { sys::ibv_get_device_list(&raw mut count) };
    if list.is_null() {
        return Err(io::Error::last_os_error());
    }
    let mut found = None;
    for i in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: `i` is below the length of the list.
        let device = unsafe { *list.add(i) };
        // SAFETY: a device of the list.
        let name = text(unsafe { sys::ibv_get_device_name(device) });
        found = act(device, name);
        if found.is_some() {
            break;
        }
    }
    // SAFETY: from `ibv_get_device_list`, freed once; open contexts do not need it.
    unsafe { sys::ibv_free_device_list(list) };
    Ok(found)
}

/// The names of this machine's devices.
pub(crate) fn names() -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    find(|_, name| {
        names.push(name);
        None::<()>
    })?;
    Ok(names)
}

impl Context {
    pub(crate) fn open(name: &str) -> io::Result<Arc<Self>> {
        static FORK: Once = Once::new();
        FORK.call_once(|| {
            // SAFETY: before any other call of the library. Without it a child process could take pages of
            // queues away from the adapter; failing, the kernel does it by itself or nothing can be done.
            let _unsupported = unsafe { sys::ibv_fork_init() };
        });
        let opened = find(|device, found| {
            // SAFETY: a device of the list, which `find` has not freed yet.
            (found == name).then(|| NonNull::new(unsafe { sys::ibv_open_device(device) }))
        })?;
        match opened {
            Some(Some(raw)) => {
                let context = Self {
                    raw,
                    name: name.to_owned(),
                };
                let flags = rustix::fs::fcntl_getfl(context.events())?;
                rustix::fs::fcntl_setfl(context.events(), flags | OFlags::NONBLOCK)?;
                Ok(Arc::new(context))
            }
            Some(None) => Err(io::Error::last_os_error()),
            None => Err(io::Error::from_raw_os_error(libc::ENODEV)),
        }
    }

    pub(super) fn raw(&self) -> *mut sys::ibv_context {
        self.raw.as_ptr()
    }

    /// Readable when there is an event.
    pub(crate) fn events(&self) -> BorrowedFd<'_> {
        // SAFETY: open as long as the context, which the result borrows.
        unsafe { BorrowedFd::borrow_raw((*self.raw()).async_fd) }
    }

    pub(crate) fn limits(&self) -> io::Result<DeviceLimits> {
        // SAFETY: plain data, for which zeros are a value.
        let mut ex: sys::ibv_device_attr_ex = unsafe { std::mem::zeroed() };
        if let Some(query) = self.query_ex() {
            // SAFETY: the provider's own function with its context, and a buffer of the size told.
            check(unsafe { query(self.raw(), std::ptr::null(), &raw mut ex, size_of_val(&ex)) })?;
        } else {
            // SAFETY: an open context and a buffer of the right type.
            check(unsafe { sys::ibv_query_device(self.raw(), &raw mut ex.orig_attr) })?;
        }
        let a = &ex.orig_attr;
        let positive = |n: i32| u32::try_from(n).unwrap_or(0);
        let small = |n: i32| u8::try_from(n.clamp(0, 255)).unwrap_or(0);
        let odp = sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_READ.0
            | sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_WRITE.0
            | sys::ibv_odp_transport_cap_bits::IBV_ODP_SUPPORT_ATOMIC.0;
        Ok(DeviceLimits {
            ports: a.phys_port_cnt,
            max_mr_size: a.max_mr_size,
            max_qp_wr: positive(a.max_qp_wr),
            max_cqe: positive(a.max_cqe),
            max_srq_wr: positive(a.max_srq_wr),
            rd_atomic_target: small(a.max_qp_rd_atom),
            rd_atomic_source: small(a.max_qp_init_rd_atom),
            atomics: a.atomic_cap != sys::ibv_atomic_cap::IBV_ATOMIC_NONE,
            on_demand: ex.odp_caps.general_caps & u64::from(sys::ibv_odp_general_caps::IBV_ODP_SUPPORT.0)
                != 0
                && ex.odp_caps.per_transport_caps.rc_odp_caps & odp == odp,
        })
    }

    /// The provider's extended query. The one of the bindings looks for another mark than the library sets, and
    /// so never finds it.
    fn query_ex(
        &self,
    ) -> Option<
        unsafe extern "C" fn(
            *mut sys::ibv_context,
            *const sys::ibv_query_device_ex_input,
            *mut sys::ibv_device_attr_ex,
            usize,
        ) -> i32,
    > {
        // SAFETY: an open context.
        if unsafe { (*self.raw()).abi_compat } as usize != usize::MAX {
            return None;
        }
        let before = std::mem::offset_of!(sys::verbs_context, context);
        // SAFETY: the mark says that the context is the last field of a `verbs_context`.
        let outer = unsafe { self.raw().byte_sub(before) }.cast::<sys::verbs_context>();
        let needed =
            size_of::<sys::verbs_context>() - std::mem::offset_of!(sys::verbs_context, query_device_ex);
        // SAFETY: as above; `sz` says how much of the structure the library has, counted from its end.
        unsafe { ((*outer).sz >= needed).then_some((*outer).query_device_ex)? }
    }

    pub(crate) fn port(&self, port: u8) -> io::Result<PortInfo> {
        // SAFETY: plain data, for which zeros are a value.
        let mut attr: sys::ibv_port_attr = unsafe { std::mem::zeroed() };
        // SAFETY: an open context; the function writes the older, shorter form of this structure.
        check(unsafe { sys::ibv_query_port(self.raw(), port, (&raw mut attr).cast()) })?;
        Ok(PortInfo {
            active: attr.state == sys::ibv_port_state::IBV_PORT_ACTIVE,
            ethernet: attr.link_layer == LAYER_ETHERNET,
            lid: attr.lid,
            mtu: u8::try_from(attr.active_mtu).unwrap_or(1),
            gids: u32::try_from(attr.gid_tbl_len).unwrap_or(0),
        })
    }

    /// An entry of a port's table; None if it is empty.
    pub(crate) fn gid(&self, port: u8, index: u32) -> Option<Gid> {
        // SAFETY: plain data, for which zeros are a value.
        let mut entry: sys::ibv_gid_entry = unsafe { std::mem::zeroed() };
        // SAFETY: an open context, a buffer of the size told.
        let status = unsafe {
            query_gid_ex(
                self.raw(),
                u32::from(port),
                index,
                &raw mut entry,
                0,
                size_of::<sys::ibv_gid_entry>(),
            )
        };
        // SAFETY: every bit pattern is sixteen bytes.
        let raw = unsafe { entry.gid.raw };
        (status == 0 && raw != [0; 16]).then_some(Gid {
            raw,
            roce_v2: entry.gid_type == ROCE_V2,
        })
    }

    /// The next event, if there is one.
    pub(crate) fn event(&self) -> Option<Event> {
        let mut event = sys::ibv_async_event {
            element: sys::ibv_async_event_element_t { port_num: 0 },
            event_type: sys::ibv_event_type::IBV_EVENT_CQ_ERR,
        };
        // The kernel may know kinds that the bindings do not: the field is looked at as a number.
        // SAFETY: an open context, whose descriptor does not block, and a buffer of the right type.
        if unsafe { sys::ibv_get_async_event(self.raw(), &raw mut event) } != 0 {
            return None;
        }
        // SAFETY: the field is four bytes that the library has written.
        let kind = unsafe { (&raw const event.event_type).cast::<u32>().read() };
        const PORT_ACTIVE: u32 = sys::ibv_event_type::IBV_EVENT_PORT_ACTIVE as u32;
        const PORT_ERR: u32 = sys::ibv_event_type::IBV_EVENT_PORT_ERR as u32;
        const FATAL: u32 = sys::ibv_event_type::IBV_EVENT_DEVICE_FATAL as u32;
        // SAFETY: for events of ports the element is a port number; for others it is not looked at.
        let port = || u8::try_from(unsafe { event.element.port_num }).unwrap_or(0);
        let result = match kind {
            PORT_ERR => Event::PortDown(port()),
            PORT_ACTIVE => Event::PortUp(port()),
            FATAL => Event::DeviceGone,
            other => Event::Other(format!("event {other}")),
        };
        // SAFETY: an event just got, acknowledged once; whoever destroys its object waits for this.
        unsafe { sys::ibv_ack_async_event(&raw mut event) };
        Some(result)
    }
}

impl Drop for Context {
    fn drop(&mut self) {
        // SAFETY: everything made from it holds an `Arc` of it, so nothing is left.
        if let Err(e) = check(unsafe { sys::ibv_close_device(self.raw()) }) {
            tracing::error!("close {}: {e}", self.name);
        }
    }
}

pub(crate) struct Pd {
    raw: NonNull<sys::ibv_pd>,
    pub(crate) context: Arc<Context>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Pd {}
// SAFETY: as for `Context`.
unsafe impl Sync for Pd {}

impl Pd {
    pub(crate) fn new(context: &Arc<Context>) -> io::Result<Arc<Self>> {
        // SAFETY: an open context.
        let raw = NonNull::new(unsafe { sys::ibv_alloc_pd(context.raw()) });
        Ok(Arc::new(Self {
            raw: raw.ok_or_else(io::Error::last_os_error)?,
            context: Arc::clone(context),
        }))
    }

    pub(super) fn raw(&self) -> *mut sys::ibv_pd {
        self.raw.as_ptr()
    }
}

impl Drop for Pd {
    fn drop(&mut self) {
        // SAFETY: everything made from it holds an `Arc` of it, so nothing is left.
        if let Err(e) = check(unsafe { sys::ibv_dealloc_pd(self.raw()) }) {
            tracing::error!("free a protection domain: {e}");
        }
    }
}

/// Memory that the adapter can reach, pinned or on demand, until it is dropped.
pub(crate) struct Mr {
    raw: NonNull<sys::ibv_mr>,
    pub(crate) mem: Arc<SharedMem>,
    _pd: Arc<Pd>,
}

// SAFETY: as for `Context`.
unsafe impl Send for Mr {}
// SAFETY: as for `Context`.
unsafe impl Sync for Mr {}

impl Mr {
    pub(crate) fn new(pd: &Arc<Pd>, mem: &Arc<SharedMem>, access: u32) -> io::Result<Self> {
        let at = mem.address() as *mut libc::c_void;
        // SAFETY: the mapping outlives the region, which holds `mem`; it is shared memory, which anybody may
        // change at any time, and is accessed as such.
        let raw = unsafe { sys::ibv_reg_mr(pd.raw(), at, mem.len(), access.cast_signed()) };
        Ok(Self {
            raw: NonNull::new(raw).ok_or_else(io::Error::last_os_error)?,
            mem: Arc::clone(mem),
            _pd: Arc::clone(pd),
        })
    }

    pub(crate) fn lkey(&self) -> u32 {
        // SAFETY: a region until it is dropped.
        unsafe { self.raw.as_ref().lkey }
    }

    pub(crate) fn rkey(&self) -> u32 {
        // SAFETY: as above.
        unsafe { self.raw.as_ref().rkey }
    }
}

impl Drop for Mr {
    fn drop(&mut self) {
        // SAFETY: ours, and not used after this.
        if let Err(e) = check(unsafe { sys::ibv_dereg_mr(self.raw.as_ptr()) }) {
            // The adapter can still reach the memory: it must stay where it is.
            std::mem::forget(Arc::clone(&self.mem));
            tracing::error!("deregister {}: {e}", self.mem.name());
        }
    }
}

impl AsRawFd for Context {
    fn as_raw_fd(&self) -> i32 {
        self.events().as_raw_fd()
    }
}
