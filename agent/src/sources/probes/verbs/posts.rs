//! Probes on the providers' functions that post: one per file and offset, for as long as a process uses it.

use std::collections::{BTreeMap, BTreeSet, HashMap as StdHashMap};
use std::fs::File;
use std::io::{self, BufReader};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use aya::Ebpf;
use aya::maps::{HashMap, MapData};
use aya::programs::ProgramError;
use aya::programs::uprobe::UProbeLink;
use stallscope_records::verbs::posts_by;

use super::super::attach::attach_program;
use super::super::detach;
use super::super::object::{LoadError, take_map};
use super::super::symbols::{SymbolError, Symbols};
use super::place::Place;
use crate::sources::clock;
use crate::sources::procs::LibraryId;

/// Most functions with probes; a node has a provider or two, each container perhaps its own copies.
const MAX_FUNCTIONS: usize = 64;
/// Most of them in one file: a provider has one that posts requests, and four that set parts for each kind of queue pair.
const MAX_IN_A_FILE: usize = 16;
/// Most functions of one process.
const MAX_OF_A_PROCESS: usize = 32;
/// Most files remembered by what their symbols say.
const REMEMBERED_FILES: usize = 256;
/// Most providers' files looked at in a process; distributions have about twenty.
const MAX_FILES: usize = 32;

/// What posts, by the names in the sources of rdma-core. They are local: stripped files have lost them.
const NAMES: [&str; 15] = [
    "bnxt_re_post_send",
    "c4iw_post_send",
    "efa_post_send",
    "erdma_post_send",
    "hns_roce_u_v2_post_send",
    "ionic_post_send",
    "irdma_upost_send",
    "mana_post_send",
    "mlx4_post_send",
    "mlx5_post_send",
    "mthca_arbel_post_send",
    "pvrdma_post_send",
    "qelr_post_send",
    "rxe_post_send",
    "siw_post_send",
];

/// Most entries of [`Watched`]; those of processes that are gone go first.
const MAX_WATCHED: usize = 4096;

/// Since when which function of which process is watched: by thread group id and address, `CLOCK_MONOTONIC` ns. Of processes
/// that are gone too: the last of their posts is read later.
pub(in super::super) type Watched = Arc<Mutex<StdHashMap<(u32, u64), u64>>>;

/// Why the posts through a function stay unseen.
#[derive(Debug, thiserror::Error)]
pub enum PostsError {
    /// The process is gone, or may not be looked at.
    #[error("what process {tgid} posts stays unseen: what it maps cannot be read ({source})")]
    Maps {
        /// Which.
        tgid: u32,
        /// Why.
        source: io::Error,
    },
    /// The pointer leads to no file.
    #[error(
        "what process {tgid} posts stays unseen: its RDMA context leads to {address:#x}, which is no code of a file"
    )]
    NoFile {
        /// Which.
        tgid: u32,
        /// Where the pointer leads.
        address: u64,
    },
    /// The pointer leads elsewhere.
    #[error(
        "what process {tgid} posts stays unseen: its RDMA context leads into {shown}, which is no provider's library"
    )]
    NoProvider {
        /// Which.
        tgid: u32,
        /// The file.
        shown: String,
    },
    /// The pointer leads into a function, or to none.
    #[error(
        "what process {tgid} posts through {shown} stays unseen: no function is known to start where its RDMA context leads"
    )]
    NoFunction {
        /// Which.
        tgid: u32,
        /// The file.
        shown: String,
    },
    /// The file cannot be opened.
    #[error("what is posted through {shown} of process {tgid} stays unseen: it cannot be opened ({source})")]
    Open {
        /// Which.
        tgid: u32,
        /// The file.
        shown: String,
        /// Why.
        source: io::Error,
    },
    /// The file cannot be read as a library.
    #[error("what is posted through {shown} stays unseen: {source}")]
    Symbols {
        /// The file.
        shown: String,
        /// Why.
        source: SymbolError,
    },
    /// As many are watched as may be.
    #[error("what process {tgid} posts through {shown} stays unseen: too many functions are watched already")]
    TooMany {
        /// Which.
        tgid: u32,
        /// The file.
        shown: String,
    },
    /// The kernel refuses.
    #[error("what is posted through {shown} stays unseen: the kernel refuses a probe there ({source})")]
    Refused {
        /// The file.
        shown: String,
        /// Why.
        source: ProgramError,
    },
}

/// A function, whoever maps it: file, offset, how it posts.
type Function = (LibraryId, u64, u32);

struct Probed {
    link: UProbeLink,
    users: BTreeSet<u32>,
}

/// The functions with probes.
pub(in super::super) struct PostProbes {
    functions: BTreeMap<Function, Probed>,
    detaching: BTreeMap<Function, JoinHandle<()>>,
    /// Offsets of the functions that post, by the symbols of a file.
    named: StdHashMap<LibraryId, Vec<u64>>,
    /// Addresses that are watched, by process.
    processes: BTreeMap<u32, BTreeSet<u64>>,
    watched: Watched,
    /// What the kernel told of: address; thread group id, and how it posts in the upper half.
    postings: HashMap<MapData, [u64; 2], u32>,
}

impl PostProbes {
    pub(in super::super) fn new(ebpf: &mut Ebpf) -> Result<Self, LoadError> {
        Ok(Self {
            functions: BTreeMap::new(),
            detaching: BTreeMap::new(),
            named: StdHashMap::new(),
            processes: BTreeMap::new(),
            watched: Watched::default(),
            postings: take_map(ebpf, "VERBS_POSTINGS")?,
        })
    }

    /// Since when what is watched.
    pub(in super::super) fn watched(&self) -> Watched {
        Arc::clone(&self.watched)
    }

    /// Watches the function at this address of the process.
    pub(in super::super) fn watch(
        &mut self,
        ebpf: &mut Ebpf,
        tgid: u32,
        address: u64,
        by: u32,
    ) -> Result<(), PostsError> {
        if self.is_watched(tgid, address) {
            return Ok(());
        }
        let watched = self.place_and_attach(ebpf, tgid, address, by);
        if let Err(PostsError::Maps { .. } | PostsError::Open { .. } | PostsError::Refused { .. }) = &watched
        {
            // It may pass: the kernel shall tell again.
            let _ = self
                .postings
                .remove(&[address, u64::from(tgid) | u64::from(by) << 32]);
        }
        watched
    }

    fn place_and_attach(
        &mut self,
        ebpf: &mut Ebpf,
        tgid: u32,
        address: u64,
        by: u32,
    ) -> Result<(), PostsError> {
        let maps = |source| PostsError::Maps { tgid, source };
        let place = Place::of(maps_of(tgid).map_err(maps)?, address)
            .map_err(maps)?
            .ok_or(PostsError::NoFile { tgid, address })?;
        self.attach(ebpf, tgid, (address, by), &place)
    }

    /// Looks for providers of the process whose functions have names. Gives how many of its functions are watched.
    pub(in super::super) fn look_at(&mut self, ebpf: &mut Ebpf, tgid: u32) -> Result<usize, PostsError> {
        let maps = |source| PostsError::Maps { tgid, source };
        let providers = Place::of_providers(maps_of(tgid).map_err(maps)?, MAX_FILES).map_err(maps)?;
        for (code, start) in providers {
            for offset in self.named(tgid, &code)? {
                let Some(inside) = offset.checked_sub(code.file_offset) else {
                    continue;
                };
                let place = code.at(offset);
                let address = start.saturating_add(inside);
                self.attach(ebpf, tgid, (address, posts_by::REQUESTS), &place)?;
            }
        }
        Ok(self.watched_of(tgid))
    }

    /// Where the functions that post lie in the file, if it names them.
    fn named(&mut self, tgid: u32, code: &Place) -> Result<Vec<u64>, PostsError> {
        if let Some(known) = self.named.get(&code.id) {
            return Ok(known.clone());
        }
        let file = open(tgid, code)?;
        let offsets = match Symbols::read(&file, &NAMES) {
            Ok(symbols) => NAMES
                .iter()
                .filter_map(|name| Some(symbols.get(name)?.file_offset))
                .collect(),
            Err(SymbolError::NoTable) => Vec::new(),
            Err(source) => {
                return Err(PostsError::Symbols {
                    shown: code.shown.clone(),
                    source,
                });
            }
        };
        if self.named.len() >= REMEMBERED_FILES {
            self.named.clear();
        }
        self.named.insert(code.id, offsets);
        Ok(self.named.get(&code.id).cloned().unwrap_or_default())
    }

    fn attach(
        &mut self,
        ebpf: &mut Ebpf,
        tgid: u32,
        (address, by): (u64, u32),
        place: &Place,
    ) -> Result<(), PostsError> {
        let shown = || place.shown.clone();
        if !place.is_provider {
            return Err(PostsError::NoProvider { tgid, shown: shown() });
        }
        if self.watched_of(tgid) >= MAX_OF_A_PROCESS {
            return Err(PostsError::TooMany { tgid, shown: shown() });
        }
        let function = (place.id, place.file_offset, by);
        if !self.functions.contains_key(&function) {
            self.check_room(tgid, place)?;
            let file = open(tgid, place)?;
            let starts = place
                .starts_function(&file)
                .map_err(|source| PostsError::Symbols {
                    shown: shown(),
                    source,
                })?;
            if !starts {
                return Err(PostsError::NoFunction { tgid, shown: shown() });
            }
            if let Some(detaching) = self.detaching.remove(&function) {
                // Attached anew before that is over, every post would be counted twice. A panic there is not ours to repeat.
                let _ = detaching.join();
            }
            let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
            let program = if by == posts_by::REQUESTS {
                "verbs_post_send"
            } else {
                "verbs_post_part"
            };
            let link = attach_program(ebpf, &path, program, place.file_offset, Some(u64::from(by)));
            let link = link.map_err(|source| PostsError::Refused {
                shown: shown(),
                source,
            })?;
            let users = BTreeSet::new();
            self.functions.insert(function, Probed { link, users });
            tracing::info!(
                provider = place.shown,
                offset = place.file_offset,
                "posts are watched"
            );
        }
        if let Some(probed) = self.functions.get_mut(&function) {
            probed.users.insert(tgid);
        }
        if self.processes.entry(tgid).or_default().insert(address) {
            self.note(tgid, address);
        }
        Ok(())
    }

    /// Tells the reader since when.
    fn note(&self, tgid: u32, address: u64) {
        let mut watched = self.watched.lock().unwrap_or_else(PoisonError::into_inner);
        if watched.len() >= MAX_WATCHED {
            watched.retain(|(tgid, _), _| self.processes.contains_key(tgid));
        }
        watched.insert((tgid, address), clock::monotonic_ns());
    }

    fn check_room(&mut self, tgid: u32, place: &Place) -> Result<(), PostsError> {
        self.detaching.retain(|_, detaching| !detaching.is_finished());
        let in_file = self.functions.keys().filter(|(id, ..)| *id == place.id).count();
        // What is still detaching holds its descriptor.
        if self.functions.len() + self.detaching.len() >= MAX_FUNCTIONS || in_file >= MAX_IN_A_FILE {
            return Err(PostsError::TooMany {
                tgid,
                shown: place.shown.clone(),
            });
        }
        Ok(())
    }

    /// Forgets a process; functions that no other uses are detached in the background.
    pub(in super::super) fn forget(&mut self, tgid: u32) {
        self.processes.remove(&tgid);
        let told: Vec<_> = self.postings.keys().filter_map(Result::ok).collect();
        for key in told.iter().filter(|key| key[1] as u32 == tgid) {
            let _ = self.postings.remove(key);
        }
        for probed in self.functions.values_mut() {
            probed.users.remove(&tgid);
        }
        let unused: Vec<Function> = self
            .functions
            .iter()
            .filter_map(|(function, probed)| probed.users.is_empty().then_some(*function))
            .collect();
        for function in unused {
            if let Some(Probed { link, .. }) = self.functions.remove(&function)
                && let Some(detaching) = detach::in_background(move || drop(link))
            {
                self.detaching.insert(function, detaching);
            }
        }
    }

    fn is_watched(&self, tgid: u32, address: u64) -> bool {
        self.processes
            .get(&tgid)
            .is_some_and(|addresses| addresses.contains(&address))
    }

    fn watched_of(&self, tgid: u32) -> usize {
        self.processes.get(&tgid).map_or(0, BTreeSet::len)
    }
}

impl Drop for PostProbes {
    fn drop(&mut self) {
        self.functions.clear();
        for (_, detaching) in std::mem::take(&mut self.detaching) {
            // A panic in dropping a link is not ours to repeat.
            let _ = detaching.join();
        }
    }
}

fn maps_of(tgid: u32) -> io::Result<BufReader<File>> {
    let file = File::open(format!("/proc/{tgid}/maps"))?;
    Ok(BufReader::with_capacity(64 << 10, file))
}

fn open(tgid: u32, place: &Place) -> Result<File, PostsError> {
    place.open(tgid).map_err(|source| PostsError::Open {
        tgid,
        shown: place.shown.clone(),
        source,
    })
}
