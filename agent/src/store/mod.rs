//! The local ring on disk.
