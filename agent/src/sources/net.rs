//! Ports, queues and flows of the node.
