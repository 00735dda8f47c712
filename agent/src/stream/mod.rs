//! The QUIC stream to a collector.
