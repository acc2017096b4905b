//! How many fields structs have.

/// Most fields of a struct.
pub const FIELDS: usize = 12;

/// Structs that may have more: records whose fields somebody else has laid down, or that are sent and shown as they are. With the reason.
pub const RECORDS: &[(&str, &str)] = &[
    ("kmod/abi/src/layout::Attach", "argument of an ioctl"),
    ("kmod/abi/src/layout::Shared", "memory shared with the kernel"),
    ("kmod/abi/src/layout::Entry", "memory shared with the kernel"),
    ("fsd/proto/src/wire/attr::Attr", "message: what stat shows"),
    (
        "fsd/proto/src/wire/mount::MountStatus",
        "message: what fsd status shows",
    ),
    (
        "fsd/proto/src/wire/storage::StorageStatus",
        "message: what fsd status shows",
    ),
    (
        "lockmgr/src/model/options::Options",
        "a plain list of bounds and switches, of which each exploration sets some",
    ),
];

/// The structs of a file by name, with the number of their fields. Relies on the form that rustfmt gives.
pub fn structs(text: &str) -> Vec<(String, usize)> {
    let mut found: Vec<(String, usize)> = Vec::new();
    // Indentation of the struct that the line is in.
    let mut inside: Option<usize> = None;
    for line in text.lines() {
        let bare = line.trim_start();
        let indent = line.len() - bare.len();
        let declared = bare.strip_prefix("pub").map_or(bare, |rest| {
            let rest = rest
                .strip_prefix('(')
                .and_then(|r| r.split_once(')'))
                .map_or(rest, |(_, r)| r);
            rest.trim_start()
        });
        match inside {
            None => {
                if let Some(rest) = declared.strip_prefix("struct ").filter(|r| r.ends_with('{')) {
                    let end = rest.find(|c: char| !(c.is_alphanumeric() || c == '_'));
                    found.push((rest[..end.unwrap_or(rest.len())].to_owned(), 0));
                    inside = Some(indent);
                }
            }
            Some(at) if indent == at && bare.starts_with('}') => inside = None,
            Some(at) => {
                let is_name = |name: &str| name.chars().all(|c| c.is_alphanumeric() || c == '_' || c == '#');
                let field = declared.split_once(": ").is_some_and(|(name, _)| is_name(name));
                if let Some((_, count)) = found.last_mut().filter(|_| indent == at + 4 && field) {
                    *count += 1;
                }
            }
        }
    }
    found
}

#[test]
fn fields_are_counted() {
    let text = "\
/// A: comment.
pub(super) struct Some<'a, T: Copy> {
    /// It has: colons.
    pub a: u8,
    pub(crate) r#type: u32,
    #[arg(long: x)]
    long: Vec<
        Very<T>,
    >,
}

struct Unit;
pub struct Tuple(u8, u8);

mod deep {
    struct One {
        only: &'a str,
    }
}
";
    let one = |name: &str, count| (name.to_owned(), count);
    assert_eq!(structs(text), [one("Some", 3), one("One", 1)]);
}
