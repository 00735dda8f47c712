//! Where a version of NCCL tells what its network steps wait for.

use super::super::nccl::NcclVersion;
use super::super::symbols::{FirstInstruction, Symbol, Symbols};

/// The hook for changes of state, in 2.25 and later. The names carry the types of all arguments, so a function that was given
/// others is not found.
const STATE: &str = "_Z37ncclProfilerRecordProxyStepEventStateiP13ncclProxyArgsi24ncclProfilerEventState_t";
const STOP: &str = "_Z30ncclProfilerStopProxyStepEventiP13ncclProxyArgsi";
/// The same for a range of steps, in the two versions before.
const STATES: &str =
    "_Z38ncclProfilerRecordProxyStepEventStatesiP13ncclProxyArgsmm24ncclProfilerEventState_t";
const STOPS: &str = "_Z31ncclProfilerStopProxyStepEventsiP13ncclProxyArgsmm";

/// The symbols to look for.
pub(in super::super) const SYMBOLS: [&str; 4] = [STATE, STOP, STATES, STOPS];

/// The first version that has hooks.
const FIRST: NcclVersion = NcclVersion::new(2, 23, 0);
/// The first version that tells waiting for credit apart from waiting for the GPU.
const TELLS_CREDIT: NcclVersion = NcclVersion::new(2, 27, 0);

/// The hooks of one library.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WaitHooks {
    /// Offset of the hook for changes of state in the file, bytes.
    pub state_at: u64,
    /// Index of the argument that holds the state.
    pub state_argument: u64,
    /// Offset of the hook for the end of a step in the file, bytes.
    pub stop_at: u64,
    /// Whether waiting for credit is told apart; where not, it counts as waiting for the GPU.
    pub tells_credit: bool,
    /// Cost of one hit on a common bare-metal host, ns: what it costs at least.
    pub hit_ns: u64,
}

/// Why a library's wait states cannot be seen, and what is seen in their place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoWaitHooks {
    /// The version has none.
    #[error(
        "NCCL {version} has no hooks for its network steps (2.23 brought them): what its proxy threads wait for stays \
         unknown, its public calls are seen"
    )]
    TooOld {
        /// Which.
        version: NcclVersion,
    },
    /// The symbols are not in the file.
    #[error(
        "NCCL {} does not name its hooks for network steps (its local symbols were removed, or the functions have other \
         arguments): what its proxy threads wait for stays unknown, its public calls are seen; the wheels of \
         nvidia-nccl-cu12 have the symbols",
        version.map_or_else(|| "of unknown version".to_owned(), |version| version.to_string())
    )]
    NoSymbols {
        /// Which, where it could be read.
        version: Option<NcclVersion>,
    },
}

impl WaitHooks {
    /// Finds the hooks.
    ///
    /// # Errors
    /// [`NoWaitHooks`], which names what is seen in their place.
    pub(in super::super) fn find(
        version: Option<NcclVersion>,
        symbols: &Symbols,
    ) -> Result<Self, NoWaitHooks> {
        if let Some(version) = version
            && version < FIRST
        {
            return Err(NoWaitHooks::TooOld { version });
        }
        let pair = |state: &str, stop: &str| Some((symbols.get(state)?, symbols.get(stop)?));
        let (state, stop, state_argument) = if let Some((state, stop)) = pair(STATE, STOP) {
            (state, stop, 3)
        } else if let Some((state, stop)) = pair(STATES, STOPS) {
            (state, stop, 4)
        } else {
            return Err(NoWaitHooks::NoSymbols { version });
        };
        Ok(Self {
            state_at: state.file_offset,
            state_argument,
            stop_at: stop.file_offset,
            tells_credit: version.is_some_and(|version| version >= TELLS_CREDIT),
            hit_ns: hit_ns(state).max(hit_ns(stop)),
        })
    }
}

const fn hit_ns(symbol: Symbol) -> u64 {
    // The program's own time comes on top; the slower of the two predictions has room for it.
    match symbol.first {
        FirstInstruction::Emulated => FirstInstruction::Emulated.predicted_hit_ns() + 200,
        FirstInstruction::SingleStepped => FirstInstruction::SingleStepped.predicted_hit_ns() + 200,
    }
}
