//! What is known about NCCL's own insides, by version.

mod hash;
mod layout;
mod version;

pub use hash::{CommHash, combined, of_split, of_unique_id};
pub use layout::{CommLayout, MAGIC};
pub use version::NcclVersion;
