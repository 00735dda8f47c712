//! Wire messages to facts and back.
//!
//! To the wire never fails. From the wire fails with a [`WireError`] that names what is wrong; nothing is repaired,
//! clipped or defaulted.

mod budget;
mod hardware;
mod network;
mod reading;
mod record;
mod step;
mod subject;
mod waits;

pub use budget::{LEAF_TABLE, leaf_table};
pub use record::{Payload, Record};
pub use subject::{KnownSubjects, MAX_SUBJECTS, SubjectEntry, SubjectNumbers};

use stallscope_attribution::budget::BudgetError;

/// Longest name of a node, job, port or device that is accepted, bytes.
pub const MAX_NAME_BYTES: usize = 1024;

/// Why a message is not a fact.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The bytes are not the message.
    #[error("not a {what}: {source}")]
    Malformed {
        /// What was expected.
        what: &'static str,
        /// What the decoder met.
        source: prost::DecodeError,
    },
    /// A part that must be there is absent.
    #[error("{field} is missing")]
    Missing {
        /// Which part.
        field: &'static str,
    },
    /// A value of an enumeration or a choice that this version does not know: the sender is newer.
    #[error("{field} has a value this version does not know ({value}); the sender is newer")]
    Unknown {
        /// Which part.
        field: &'static str,
        /// The value; 0 for an absent choice.
        value: i64,
    },
    /// A name is empty, too long or holds control characters.
    #[error("{field} is not a name: {why}")]
    Name {
        /// Which part.
        field: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A window or an offset does not fit the time line.
    #[error("{field} ends after the end of time")]
    Time {
        /// Which part.
        field: &'static str,
    },
    /// The leaf table is not one this version has names for.
    #[error("leaf table {version} is unknown here (newest known: {newest})")]
    LeafTable {
        /// Version in the message.
        version: u32,
        /// Newest version known.
        newest: u32,
    },
    /// The number of leaves is not that of their table.
    #[error("{found} leaves where table {version} has {expected}")]
    LeafCount {
        /// Version of the table.
        version: u32,
        /// Leaves in the message.
        found: usize,
        /// Leaves in the table.
        expected: usize,
    },
    /// Intervals of leaves do not fit together.
    #[error("leaf intervals do not fit: {why}")]
    Intervals {
        /// How.
        why: &'static str,
    },
    /// The leaves are not a budget.
    #[error("budget refused: {0}")]
    Budget(#[from] BudgetError),
    /// A number has been given to another subject, or there are too many.
    #[error("subject {id} refused: {why}")]
    Subject {
        /// The number.
        id: u32,
        /// What is wrong with it.
        why: &'static str,
    },
}

fn name(field: &'static str, text: String) -> Result<String, WireError> {
    if text.is_empty() {
        return Err(WireError::Name { field, why: "empty" });
    }
    text_of(field, text)
}

fn text_of(field: &'static str, text: String) -> Result<String, WireError> {
    if text.len() > MAX_NAME_BYTES {
        return Err(WireError::Name {
            field,
            why: "too long",
        });
    }
    if text.chars().any(char::is_control) {
        return Err(WireError::Name {
            field,
            why: "holds control characters",
        });
    }
    Ok(text)
}
