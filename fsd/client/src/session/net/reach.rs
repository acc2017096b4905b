//! Which servers this mount can reach, for `fsd status`.

use super::Net;
use fsd_node::probe::{self, Probe};
use fsd_proto::ask;

impl Net {
    /// Is there no connection to the metadata server, and none to one of the storage nodes?
    #[must_use]
    pub fn is_alone(&self) -> bool {
        let mut links = self.storage.get().into_iter().flatten();
        !self.has_meta() && links.any(|link| self.storage_now(link.id).is_none())
    }

    /// A sentence for each server that cannot be reached.
    #[must_use]
    pub fn unreachable(&self) -> Vec<String> {
        let Some(me) = self.me.upgrade() else {
            return Vec::new();
        };
        let net = std::sync::Arc::clone(&me);
        let meta = Probe {
            who: format!("the metadata server ({})", me.meta_addr),
            ask: Box::new(move || match net.meta(ask::meta::Clock {}) {
                Ok(_) => Ok(()),
                Err(error) => Err(error.to_string()),
            }),
        };
        let links = me.storage.get().into_iter().flatten();
        let storage = links.map(|link| {
            let (net, id) = (std::sync::Arc::clone(&me), link.id);
            Probe {
                who: format!("storage node {id} ({})", link.addr()),
                ask: Box::new(move || match net.ask_storage(id, ask::storage::Space {}) {
                    Ok(_) => Ok(()),
                    Err(error) => Err(error.to_string()),
                }),
            }
        });
        probe::unreachable([meta].into_iter().chain(storage).collect(), probe::PATIENCE)
    }
}
