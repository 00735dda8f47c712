//! The two machines and what every check may use.

use std::cell::OnceCell;
use std::time::Instant;

use anyhow::{Context, Result};

use super::initramfs;
use super::machine::{Accelerator, Boot, Cable, End, Machine, mac};
use super::programs::Inside;
use super::recording::Recorders;
use crate::paths::Paths;
use crate::setup::{self, Kernel};

/// Modules that the guests load once they reach the host's files: RDMA over Ethernet with the check sums it computes, what
/// spoils a link, and what tells of TCP connections.
const MODULES: [&str; 7] = [
    "crc32_generic",
    "crc32_pclmul",
    "ib_uverbs",
    "rdma_rxe",
    "sch_netem",
    "sch_tbf",
    "tcp_diag",
];

/// Name of each machine's RDMA device.
pub(super) const RDMA: &str = "rxe0";

/// Two running machines.
#[derive(Debug)]
pub(super) struct Pair {
    /// One.
    pub(super) left: Machine,
    /// The other.
    pub(super) right: Machine,
    /// What runs in them.
    pub(super) inside: Inside,
    /// The checkout and the cache.
    pub(super) paths: Paths,
    /// The recorders of both, once they run.
    recorders: OnceCell<Recorders>,
    _folder: tempfile::TempDir,
}

impl Pair {
    /// Boots both and connects them; also says in words what runs.
    pub(super) fn boot(paths: &Paths, inside: Inside) -> Result<(Self, String)> {
        let kernel = setup::stock_kernel(paths)?;
        // Short: the name of a socket may have no more than 107 bytes.
        let folder = tempfile::Builder::new()
            .prefix("stallscope-vm-")
            .tempdir_in("/tmp")?;
        let initial = folder.path().join("initramfs");
        initramfs::write(&kernel, &initial)?;
        let accelerator = Accelerator::find(&kernel, &initial, folder.path())?;
        let started = Instant::now();
        let boot = Boot {
            accelerator,
            kernel: &kernel,
            initial: &initial,
            program: &inside.guest,
            folder: folder.path(),
        };
        let mut left = Machine::start(End::Left, &boot)?;
        let mut right = Machine::start(End::Right, &boot)?;
        let release = left.up()?;
        right.up()?;
        let text = format!(
            "Linux {release}, {}, two machines up in {} s",
            accelerator.name(),
            started.elapsed().as_secs()
        );
        for machine in [&left, &right] {
            settle(machine, &kernel)?;
        }
        pretend_more_lanes(&right)?;
        let pair = Self {
            left,
            right,
            inside,
            paths: paths.clone(),
            recorders: OnceCell::new(),
            _folder: folder,
        };
        Ok((pair, text))
    }

    /// The recorders of both machines, which the first who asks starts: that takes a while, and one of each does for all.
    pub(super) fn recorders(&self) -> Result<&Recorders> {
        match self.recorders.get() {
            Some(recorders) => Ok(recorders),
            None => {
                let started = Recorders::start(self)?;
                Ok(self.recorders.get_or_init(|| started))
            }
        }
    }

    /// The machine at an end of the cables.
    pub(super) fn machine(&self, end: End) -> &Machine {
        match end {
            End::Left => &self.left,
            End::Right => &self.right,
        }
    }

    /// Both machines.
    pub(super) fn both(&self) -> [&Machine; 2] {
        [&self.left, &self.right]
    }
}

/// Name, modules, addresses, and an RDMA device on the cable for data.
fn settle(machine: &Machine, kernel: &Kernel) -> Result<()> {
    let number = machine.end.number();
    let script = format!(
        r"echo {name} > /proc/sys/kernel/hostname
ip link set lo up
for m in {modules}; do modprobe --dirname {root} $m; done
for n in /sys/class/net/*; do
  case $(cat $n/address) in
  {data}) ip link set ${{n##*/}} name data; ip address add 10.77.1.{number}/24 dev data; ip link set data up;;
  {talk}) ip link set ${{n##*/}} name talk; ip address add 10.77.2.{number}/24 dev talk; ip link set talk up;;
  esac
done
rdma link add {RDMA} type rxe netdev data",
        name = machine.end.name(),
        modules = MODULES.join(" "),
        root = kernel.root.display(),
        data = mac(Cable::Data, number),
        talk = mac(Cable::Talk, number),
    );
    machine
        .guest
        .shell(&script, 120)
        .map(drop)
        .with_context(|| format!("machine {} was not set up", machine.end.name()))
}

/// The card of this machine says of itself that it could do what its slot can. No card of the emulator has a link above the
/// least there is, so the kernel's word for that is covered by another; what the link runs at now is the kernel's own.
fn pretend_more_lanes(machine: &Machine) -> Result<()> {
    let script = r"device=$(dirname $(readlink -f /sys/class/net/data/device))
mkdir -p /run/pretend
for what in max_link_speed max_link_width; do
  cat $device/../$what > /run/pretend/$what
  mount --bind /run/pretend/$what $device/$what
done";
    machine.guest.shell(script, 30).map(drop)
}

/// A machine's address on the cable for data, as RDMA names it.
pub(super) fn data_address(end: End) -> String {
    format!("::ffff:10.77.1.{}", end.number())
}

/// A machine's address on the cable for conversations.
pub(super) fn talk_address(end: End) -> String {
    format!("10.77.2.{}", end.number())
}
