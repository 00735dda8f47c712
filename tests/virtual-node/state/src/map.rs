//! A file mapped into several processes as one value made of atomics.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Deref;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::ptr::NonNull;

/// A value that may live in a shared file mapping.
///
/// # Safety
/// The type must be `repr(C)`, valid for every bit pattern, and consist of atomics only.
pub unsafe trait Shareable: Sync {}

/// A mapped `T`. Unmapped when dropped.
#[derive(Debug)]
pub struct Shared<T: Shareable> {
    at: NonNull<T>,
}

// SAFETY: a `Shareable` consists of atomics only, so references may be used from any thread.
unsafe impl<T: Shareable> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T: Shareable> Sync for Shared<T> {}

impl<T: Shareable> Shared<T> {
    /// Creates the file, zeroed, and maps it.
    ///
    /// # Errors
    /// When the file cannot be created, sized or mapped.
    pub fn create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        file.set_len(size_of::<T>() as u64)?;
        Self::map(&file)
    }

    /// Maps an existing file.
    ///
    /// # Errors
    /// When the file cannot be opened or mapped, or is shorter than `T`.
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        if file.metadata()?.len() < size_of::<T>() as u64 {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "shared state is shorter than this version's",
            ));
        }
        Self::map(&file)
    }

    /// Maps the file, growing it to the size of `T` when a peer has not done so yet.
    ///
    /// # Errors
    /// When the file cannot be created, sized or mapped.
    pub fn open_or_create(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)?;
        if file.metadata()?.len() < size_of::<T>() as u64 {
            file.set_len(size_of::<T>() as u64)?;
        }
        Self::map(&file)
    }

    fn map(file: &File) -> io::Result<Self> {
        // SAFETY: a fresh mapping of a file at least as long as `T`; the kernel picks the address.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<T>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        NonNull::new(at.cast())
            .map(|at| Self { at })
            .ok_or_else(|| io::Error::other("mapped at address zero"))
    }
}

impl<T: Shareable> Deref for Shared<T> {
    type Target = T;

    fn deref(&self) -> &T {
        // SAFETY: the mapping lives as long as `self`, is page aligned, and every bit pattern is a valid `T`.
        unsafe { self.at.as_ref() }
    }
}

impl<T: Shareable> Drop for Shared<T> {
    fn drop(&mut self) {
        // SAFETY: this exact mapping was made in `map` and no reference outlives `self`.
        unsafe { libc::munmap(self.at.as_ptr().cast(), size_of::<T>()) };
    }
}
