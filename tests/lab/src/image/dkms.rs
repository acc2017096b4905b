//! DKMS, with which users build the kernel extension: fetched and unpacked, but not installed, for it would go to work on the
//! kernels of this machine.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::image::packages::{Apt, fetch};

/// Its program.
///
/// # Errors
/// The package cannot be had.
pub fn program(cache: &Path, mirror: Option<&str>) -> Result<PathBuf> {
    let home = cache.join("dkms");
    let program = home.join("usr/sbin/dkms");
    if !program.is_file() {
        let apt = Apt::new(&cache.join("apt"), mirror)?;
        apt.update()?;
        fetch(&apt, &["dkms"], &home, |_| Ok(()))?;
    }
    if program.is_file() {
        Ok(program)
    } else {
        Err(Error::missing(
            format!("the program {}", program.display()),
            "the package is not as it was; remove its folder from the cache and try again",
        ))
    }
}
