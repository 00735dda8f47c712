//! What can be seen here, what cannot, why, and how to fix it.
