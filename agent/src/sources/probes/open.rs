//! Opens library files at paths that belong to other users.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::Path;

use rustix::fs::{FileType, Mode, OFlags, fstat, open};

/// Opens the plain file of this inode.
///
/// Whoever owns the path may have put anything there since it was looked at. Opening a pipe waits for ever, and opening a
/// device may do worse, so the path is only looked up first; what it leads to is opened when it is known to be the file.
///
/// # Errors
/// It cannot be opened, is no plain file, or is another one.
pub(super) fn open_plain_file(path: &Path, inode: u64) -> io::Result<File> {
    // An entry of `map_files` is a link that leads to the mapped file itself; on overlay file systems that has another
    // inode than the mapping was listed with.
    let is_mapping = path.parent().is_some_and(|parent| parent.ends_with("map_files"));
    let mut look = OFlags::PATH | OFlags::CLOEXEC;
    if !is_mapping {
        look |= OFlags::NOFOLLOW;
    }
    let found = open(path, look, Mode::empty())?;
    let stat = fstat(&found)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Err(io::Error::other("it is no plain file"));
    }
    if !is_mapping && stat.st_ino != inode {
        return Err(io::Error::other("another file was put in its place"));
    }
    let by_descriptor = format!("/proc/self/fd/{}", found.as_raw_fd());
    let read = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(File::from(open(by_descriptor, read, Mode::empty())?))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io::Read as _;
    use std::os::unix::fs::{MetadataExt as _, symlink};
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    /// Opens in a thread: what waits for ever must fail the test, not stop it.
    fn opened(path: &Path, inode: u64) -> io::Result<File> {
        let (done, outcome) = mpsc::channel();
        let path = path.to_owned();
        std::thread::spawn(move || done.send(open_plain_file(&path, inode)));
        outcome.recv_timeout(Duration::from_secs(20)).unwrap()
    }

    #[test]
    fn the_file_that_was_looked_at_is_opened_and_no_other() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("libcuda.so.1");
        std::fs::write(&path, "code").unwrap();
        let inode = std::fs::metadata(&path).unwrap().ino();
        let mut text = String::new();
        opened(&path, inode).unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "code");

        let link = dir.path().join("link");
        symlink(&path, &link).unwrap();
        assert!(opened(&link, inode).is_err(), "a link put in its place");
        assert!(opened(&path, inode + 1).is_err(), "another file");
        assert!(opened(&dir.path().join("absent"), inode).is_err());
    }

    #[test]
    fn pipes_and_devices_are_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let pipe = dir.path().join("libnccl.so.2");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
        let inode = std::fs::metadata(&pipe).unwrap().ino();
        assert!(opened(&pipe, inode).is_err());

        let null = Path::new("/dev/null");
        let inode = std::fs::metadata(null).unwrap().ino();
        assert!(opened(null, inode).is_err());
    }

    #[test]
    fn a_mapping_leads_to_its_file_and_to_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mappings = dir.path().join("map_files");
        std::fs::create_dir(&mappings).unwrap();
        let library = dir.path().join("libcuda.so.1");
        std::fs::write(&library, "code").unwrap();
        symlink(&library, mappings.join("1-2")).unwrap();
        symlink("/dev/null", mappings.join("2-3")).unwrap();
        assert!(opened(&mappings.join("1-2"), 0).is_ok());
        assert!(opened(&mappings.join("2-3"), 0).is_err());
    }
}
