//! The label in a storage directory: whose it is.

use std::path::Path;

use super::StorageError;

/// Name of the file in a storage node's directory that says what it belongs to.
const LABEL: &str = "storage.label";

/// Reads a storage directory's label and checks that it belongs to this cluster and node.
///
/// # Errors
/// [`StorageError::Format`].
pub fn read_label(dir: &Path, cluster: &str, id: u16) -> Result<String, StorageError> {
    let format = |detail: String| StorageError::Format {
        path: dir.to_owned(),
        detail,
    };
    let text = std::fs::read_to_string(dir.join(LABEL))
        .map_err(|_| format("is not a formatted storage directory: run fsd format first".into()))?;
    let mut lines = text.lines();
    let (name, node, uuid) = (lines.next(), lines.next(), lines.next());
    if name != Some(cluster) || node.and_then(|n| n.parse::<u16>().ok()) != Some(id) {
        return Err(format(format!(
            "belongs to storage node {} of cluster '{}', not to node {id} of '{cluster}'",
            node.unwrap_or("?"),
            name.unwrap_or("?")
        )));
    }
    uuid.map(str::to_owned)
        .ok_or_else(|| format("has a damaged label".into()))
}

/// Makes a storage directory.
///
/// # Errors
/// It is formatted already, or the disk refuses.
pub fn format(dir: &Path, cluster: &str, id: u16, uuid: &str) -> Result<(), StorageError> {
    let io = |error| StorageError::Io {
        what: "cannot format",
        path: dir.to_owned(),
        error,
    };
    if dir.join(LABEL).exists() {
        let detail = "is formatted already: remove it first if its contents are not wanted".into();
        return Err(StorageError::Format {
            path: dir.to_owned(),
            detail,
        });
    }
    std::fs::create_dir_all(dir).map_err(io)?;
    std::fs::write(dir.join(LABEL), format!("{cluster}\n{id}\n{uuid}\n")).map_err(io)
}
