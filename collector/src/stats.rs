//! What happened, counted.

use std::sync::atomic::{AtomicU64, Ordering};

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $name:ident;)+) => {
        /// Counters since the collector started.
        #[derive(Debug, Default)]
        pub struct Stats { $($(#[doc = $doc])+ pub(crate) $name: AtomicU64,)+ }

        /// The counters at one moment.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct StatsSnapshot { $($(#[doc = $doc])+ pub $name: u64,)+ }

        impl Stats {
            /// The counters now.
            #[must_use]
            pub fn snapshot(&self) -> StatsSnapshot {
                StatsSnapshot { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }
        }
    };
}

counters! {
    /// Connections accepted with a valid certificate.
    connections;
    /// Connections that failed before that: wrong certificate, wrong protocol, timed out.
    failed_handshakes;
    /// Connections refused because too many were open.
    refused_connections;
    /// Connections closed because the client broke the protocol.
    protocol_errors;
    /// Connections closed because the store could not store.
    store_errors;
    /// Messages stored.
    stored_messages;
    /// Bytes of stored messages.
    stored_bytes;
    /// Messages received again and dropped.
    duplicates;
    /// Reports answered.
    reports;
}

impl Stats {
    pub(crate) fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }
}
