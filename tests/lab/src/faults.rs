//! What scenarios do to a cluster: guests come back, links are cut, slow, lossy, narrower.
//!
//! Killing and pausing are done to the [`crate::guest::Guest`], what only a switch can do to the
//! [`crate::switch::Switch`].

use crate::cluster::{Cluster, HELPER_LIMIT};
use crate::error::Result;
use crate::options::Tier;

impl Cluster {
    /// Boots a guest again after it was killed, and sets up its node as before.
    ///
    /// # Errors
    /// It does not come up.
    pub fn reboot(&self, guest: usize) -> Result<()> {
        let guest = self.guest(guest)?;
        guest.kill();
        self.bring_up(guest)
    }

    /// Cuts a node's link: at the switch, or where nodes share a guest at the bridge.
    ///
    /// # Errors
    /// There is no such node.
    pub fn cut(&self, node: usize) -> Result<()> {
        self.set_link(node, false)
    }

    /// Ends [`Cluster::cut`].
    ///
    /// # Errors
    /// There is no such node.
    pub fn restore(&self, node: usize) -> Result<()> {
        self.set_link(node, true)
    }

    fn set_link(&self, node: usize, up: bool) -> Result<()> {
        let guest = self.node(node)?.guest;
        match (self.options().tier, up) {
            (Tier::Multi, true) => self.switch().restore(guest),
            (Tier::Multi, false) => self.switch().cut(guest),
            (Tier::Single, _) => {
                // Not the interface's own state: then the node's port would be down, which it would notice.
                let state = if up { 3 } else { 0 };
                self.run(
                    node,
                    &format!("bridge link set dev p{node} state {state}"),
                    HELPER_LIMIT,
                )?;
            }
        }
        Ok(())
    }

    /// Has a node's card treat what it sends as `tc`'s netem does: "delay 5ms loss 2%". Empty ends that.
    ///
    /// # Errors
    /// The settings are not understood.
    pub fn netem(&self, node: usize, settings: &str) -> Result<()> {
        let card = self.node(node)?.card;
        let script = if settings.is_empty() {
            format!("tc qdisc del dev {card} root")
        } else {
            format!("modprobe sch_netem && tc qdisc replace dev {card} root netem {settings}")
        };
        self.run(node, &script, HELPER_LIMIT).map(drop)
    }

    /// Changes the largest packet of a node's card, and of what it is plugged into.
    ///
    /// # Errors
    /// The device does not allow it.
    pub fn set_mtu(&self, node: usize, mtu: u32) -> Result<()> {
        let card = self.node(node)?.card;
        let mut script = format!("ip link set {card} mtu {mtu}");
        if self.options().tier == Tier::Single {
            script = format!("ip link set br0 mtu {mtu}; ip link set p{node} mtu {mtu} && {script}");
        }
        self.run(node, &script, HELPER_LIMIT).map(drop)
    }
}
