//! Graphs: work recorded from a stream instead of run, and run as often as wanted by one call.

use std::sync::Arc;

use virtual_node_state::log::Kind;

use super::Engine;
use super::schedule::Work;
use crate::module::KernelSpec;

/// What can be recorded.
#[derive(Debug, Clone)]
pub(super) enum Node {
    Kernel(Arc<KernelSpec>),
    Copy { kind: Kind, bytes: u64 },
}

impl Node {
    /// `None` for work that belongs to one run alone.
    pub(super) fn of(work: Work) -> Option<Self> {
        match work {
            Work::Kernel(kernel) => Some(Self::Kernel(kernel)),
            Work::Copy { kind, bytes } => Some(Self::Copy { kind, bytes }),
            Work::Record { .. } | Work::Wait { .. } | Work::Collective(_) => None,
        }
    }

    fn work(&self) -> Work {
        match self {
            Self::Kernel(kernel) => Work::Kernel(Arc::clone(kernel)),
            Self::Copy { kind, bytes } => Work::Copy {
                kind: *kind,
                bytes: *bytes,
            },
        }
    }
}

/// What was captured, in order. All of one stream, so every node follows the one before.
#[derive(Debug, Clone)]
pub(crate) struct Graph(Arc<[Node]>);

impl Graph {
    /// Number of nodes.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }
}

impl Engine {
    /// Begins to record what is submitted to a stream; false when there is no such stream or it records already.
    pub(crate) fn capture_begin(&self, stream: usize) -> bool {
        match self.lock().streams.get_mut(stream) {
            Some(Some(found)) if found.capture.is_none() => {
                found.capture = Some(Vec::new());
                true
            }
            _ => false,
        }
    }

    /// Ends the recording; `None` when there was none.
    pub(crate) fn capture_end(&self, stream: usize) -> Option<Graph> {
        let captured = self.lock().streams.get_mut(stream)?.as_mut()?.capture.take();
        captured.map(|nodes| Graph(nodes.into()))
    }

    /// Whether a stream records; `None` when there is no such stream.
    pub(crate) fn is_capturing(&self, stream: usize) -> Option<bool> {
        let state = self.lock();
        Some(state.streams.get(stream)?.as_ref()?.capture.is_some())
    }

    /// Submits all of a graph; false when there is no such stream.
    pub(crate) fn graph_launch(&self, stream: usize, graph: &Graph) -> bool {
        graph.0.iter().all(|node| self.submit(stream, node.work()))
    }
}
