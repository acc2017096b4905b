use super::*;

#[test]
fn every_access_is_checked() {
    let mem = SharedMem::anonymous(4096).unwrap();
    assert_eq!((mem.len(), mem.is_empty()), (4096, false));
    let mut eight = [1; 8];
    assert!(mem.read_at(4088, &mut eight).is_ok());
    assert_eq!(eight, [0; 8], "fresh memory is zero");
    for off in [4089, 4096, 5000, usize::MAX, usize::MAX - 7] {
        assert!(mem.read_at(off, &mut eight).is_err());
        assert!(mem.write_at(off, &eight).is_err());
        assert!(mem.zero(off, 8).is_err());
        assert!(mem.copy_within(off, 0, 8).is_err() && mem.copy_within(0, off, 8).is_err());
        assert!(mem.word(off).is_err());
    }
    assert!(mem.word(4).is_err() && mem.word(4088).is_ok());
    assert!(mem.read_at(4096, &mut []).is_ok());
    assert!(SharedMem::anonymous(0).is_err());
}

#[test]
fn copies_of_every_length_and_alignment() {
    let mem = SharedMem::anonymous(8192).unwrap();
    for len in [0, 1, 7, 8, 9, 64, 504, 512, 520, 4000] {
        for off in [0, 1, 8, 13] {
            let data: Vec<u8> = (0..len).map(|i| (i * 7 + off) as u8).collect();
            let mut back = vec![0; len];
            mem.write_at(off, &data).unwrap();
            mem.read_at(off, &mut back).unwrap();
            assert_eq!(back, data);
            mem.copy_within(off, off + 5, len).unwrap();
            mem.read_at(off + 5, &mut back).unwrap();
            assert_eq!(back, data, "overlapping copy");
            mem.zero(off, len + 5).unwrap();
        }
    }
}

#[test]
fn named_memory_survives_and_grows() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    let mem = SharedMem::open_file(&path, 4096, true).unwrap();
    mem.write_at(100, b"still here").unwrap();
    drop(mem);
    let mem = SharedMem::open_file(&path, 8192, false).unwrap();
    let mut back = [0; 10];
    mem.read_at(100, &mut back).unwrap();
    assert_eq!(&back, b"still here");
    assert_eq!(mem.name(), path.display().to_string());
    let other = SharedMem::open_file(&path, 4096, false).unwrap();
    other.word(8).unwrap().store(7, Ordering::SeqCst);
    assert_eq!(
        mem.word(8).unwrap().load(Ordering::SeqCst),
        7,
        "two mappings of the same memory"
    );
    assert_eq!(
        std::fs::metadata(&path).unwrap().len(),
        8192,
        "never made shorter"
    );
}

#[test]
fn a_memory_file_is_its_owners_alone() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pool");
    std::fs::write(&path, b"left by an older release").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    SharedMem::open_file(&path, 4096, false).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).unwrap();
    assert!(SharedMem::open_file(&link, 4096, false).is_err());
    assert!(SharedMem::open_file(dir.path(), 4096, false).is_err());
    if rustix::process::geteuid().is_root() {
        std::os::unix::fs::chown(&path, Some(65534), None).unwrap();
        let error = SharedMem::open_file(&path, 4096, false).unwrap_err().to_string();
        assert!(error.contains("remove it"), "{error}");
    }
}

#[test]
fn memory_is_reserved_and_given_back_in_parts() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = dir.path().join("pool");
    let used = || std::fs::metadata(&path).unwrap().blocks() * 512;
    let mem = SharedMem::open_file(&path, 1 << 20, false).unwrap();
    assert_eq!(used(), 0);
    mem.reserve(256 << 10, 256 << 10).unwrap();
    assert_eq!(used(), 256 << 10);
    mem.write_at(300 << 10, b"data").unwrap();
    mem.give_back(256 << 10, 256 << 10).unwrap();
    assert_eq!(used(), 0);
    let mut back = [1; 4];
    mem.read_at(300 << 10, &mut back).unwrap();
    assert_eq!(back, [0; 4]);
    assert!(mem.reserve(1 << 20, 1).is_err() && mem.give_back(1 << 20, 1).is_err());
    assert!(mem.file_system_free().unwrap() > 0);
}

#[test]
fn what_cannot_be_had_is_an_error() {
    let path = std::path::Path::new("/dev/shm").join(format!("distfuse-test-{}", std::process::id()));
    let error = SharedMem::open_file(&path, 1 << 46, true)
        .unwrap_err()
        .to_string();
    std::fs::remove_file(&path).unwrap();
    assert!(error.contains("reserve"), "{error}");
    assert!(SharedMem::open_file(std::path::Path::new("/nonexistent/x"), 4096, false).is_err());
}

#[test]
fn announced_memory_is_measured() {
    let mem = SharedMem::anonymous(4096).unwrap();
    let fd = mem.fd().try_clone_to_owned().unwrap();
    assert!(SharedMem::from_fd(fd, 8192, "lie".to_owned()).is_err());
}

#[test]
fn lent_buffers_are_checked() {
    let mut buffer = [0u8; 8];
    // SAFETY: last used before the buffer is borrowed again.
    let mut lent = unsafe { Lent::writable(&mut buffer) };
    assert!(lent.fill(6, &[1, 2]) && !lent.fill(7, &[1, 2]) && !lent.fill(usize::MAX, &[1]));
    assert_eq!(lent.len(), 8);
    let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(lent.recv_from(a.as_fd(), 9).is_err() && lent.send_to(b.as_fd(), 9).is_err());
    // SAFETY: as above.
    let mut lent = unsafe { Lent::readable(&buffer) };
    assert!(!lent.fill(0, &[1]) && lent.recv_from(a.as_fd(), 0).is_err());
    assert_eq!(lent.send_to(b.as_fd(), 6).unwrap(), 2);
}
