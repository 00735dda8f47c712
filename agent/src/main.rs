//! The `stallscope` binary.
fn main() {}
