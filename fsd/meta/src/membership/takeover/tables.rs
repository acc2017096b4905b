//! New lease tables. A storage node whose host was restarted has none of the leases that mounts had there, and begins with an empty
//! table. Nobody may lease in that one before all who trust the one before know that their leases are lost: what they have cached,
//! another would change, and they would go on showing it.
//!
//! So a mount that finds tables which are not those of the era waits. The mounts that lease in those are told; each ends that life, and
//! is declared dead and shut out like any other, or leaves. When none is left nobody alive can have changed a file: whatever is beyond
//! the ends of files, and every file without a name, is cleared away, for the lease records that would say whose it is are lost. Then
//! the new era begins.

use rdma_transport::ConnId;

use super::Takeover;
use crate::error::{MetaError, Refusal, no};
use crate::journal::eras::Found;
use crate::rules::Flaw;
use fsd_proto::ask;

impl Takeover {
    /// A mount that has leased nothing yet has found these lease tables. It may lease in them; or an error: not yet.
    pub fn found_tables(&self, conn: ConnId, found: &[u64]) -> Result<(), Refusal> {
        let (members, eras) = (&self.members, &self.members.journal.eras);
        members.note_leases(conn, false)?;
        match eras.found(found, || members.note_leases(conn, true))? {
            Found::Known => Ok(()),
            Found::First => {
                eras.begin(found)?;
                members.note_leases(conn, true)
            }
            Found::Others if members.rules.lack(Flaw::TablesMixed) => eras.begin(found),
            Found::Others => {
                self.state.lock().new_tables = true;
                self.wake();
                no(libc::EAGAIN)
            }
        }
    }

    /// Somebody may have found new tables: begins a new era once nobody leases in those before, and there are no dead. False: it has to
    /// wait for somebody.
    pub(super) fn begin_era(&self) -> Result<bool, MetaError> {
        if !self.state.lock().new_tables {
            return Ok(true);
        }
        if self.members.recovery.is_open() {
            return Ok(false);
        }
        let eras = &self.members.journal.eras;
        let tables = self
            .nodes
            .ids()
            .map(|id| Ok(self.nodes.ask(id, ask::storage::Attach {})?.table));
        let tables = tables.collect::<Result<Vec<u64>, MetaError>>()?;
        if !eras.check(&tables) {
            let (left, conns) = self.members.leasing();
            if left > 0 {
                self.note(vec![format!(
                    "lease tables are new: {left} mounts have lost their leases, and have not ended yet"
                )]);
                for conn in conns {
                    self.nodes.mounts.tables(&conn, tables.clone(), Box::new(|_| {}));
                }
                return Ok(false);
            }
            if !self.members.rules.lack(Flaw::EraNotCleared) {
                self.remains.clear()?;
            }
            eras.begin(&tables)?;
        }
        self.state.lock().new_tables = false;
        Ok(true)
    }
}
