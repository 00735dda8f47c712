//! The closed, versioned list of causes and places.

macro_rules! causes {
    ($($(#[doc = $doc:literal])+ $name:ident = $text:literal;)+) => {
        /// Why GPU time was lost. New causes may be added, none is ever renamed.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Cause { $($(#[doc = $doc])+ $name,)+ }

        impl Cause {
            /// Every cause.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The stable dotted name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The cause of that name.
            #[must_use]
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

causes! {
    /// A node's own network interface is slow.
    NetworkNic = "network.nic";
    /// The network between nodes is slow.
    NetworkFabric = "network.fabric";
    /// The link between GPUs of a node is slow.
    NetworkNvlink = "network.nvlink";
    /// The PCIe path of a network interface is slow.
    NetworkPcie = "network.pcie";
    /// The communication library is configured badly.
    NetworkConfig = "network.config";
    /// Kernels use the tensor cores badly.
    KernelLowTensor = "kernel.low_tensor";
    /// Kernels are bound by device memory.
    KernelMemoryBound = "kernel.memory_bound";
    /// The clock is below the reference without a fault.
    KernelClock = "kernel.clock";
    /// Data-loader workers are too slow.
    DataLoader = "data.loader";
    /// Storage is too slow for the data loaders.
    DataStorage = "data.storage";
    /// Host-to-device copies are exposed.
    DataCopy = "data.copy";
    /// The host cannot issue work fast enough.
    HostLaunch = "host.launch";
    /// The launching thread does not get a CPU.
    HostCpu = "host.cpu";
    /// Garbage collection pauses the launching thread.
    HostGc = "host.gc";
    /// Synchronisation drains the GPU.
    HostSync = "host.sync";
    /// Allocation in the driver blocks the launching thread.
    HostAlloc = "host.alloc";
    /// Compilation blocks the launching thread.
    HostCompile = "host.compile";
    /// A process takes in data more slowly than its peers send it.
    HostReceiver = "host.receiver";
    /// A GPU lowers its clock because it is hot.
    DeviceThermal = "device.thermal";
    /// A GPU lowers its clock because of its power limit.
    DevicePowerCap = "device.power_cap";
    /// Another process uses the GPU.
    DeviceContention = "device.contention";
    /// A GPU's own PCIe link is slow.
    DevicePcie = "device.pcie";
    /// A GPU reports faults.
    DeviceFault = "device.fault";
    /// Ranks have unequal work by construction.
    JobImbalance = "job.imbalance";
    /// Checkpoints stall the job.
    JobCheckpoint = "job.checkpoint";
    /// The job restarted.
    JobRestart = "job.restart";
    /// GPUs are not allocated.
    JobUnallocated = "job.unallocated";
    /// Nothing worth naming is lost.
    None = "none";
    /// Time is lost and the evidence does not say why.
    Unknown = "unknown";
}

impl Cause {
    /// Whether it slows what ranks send each other: a network, or who takes in what comes over it.
    #[must_use]
    pub const fn slows_communication(self) -> bool {
        matches!(
            self,
            Self::NetworkNic
                | Self::NetworkFabric
                | Self::NetworkNvlink
                | Self::NetworkPcie
                | Self::NetworkConfig
                | Self::HostReceiver
        )
    }
}

/// Where a cause sits. Unknown parts are `None`; a cause of the whole job has no part set.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Place {
    /// Node name.
    pub node: Option<String>,
    /// GPU index on that node.
    pub gpu: Option<u32>,
    /// PCI address `dddd:bb:dd.f` of that GPU.
    pub pci: Option<String>,
    /// Rank in the job.
    pub rank: Option<u32>,
    /// Network interface or port.
    pub nic_port: Option<String>,
    /// A link, named by its two ends.
    pub link: Option<String>,
    /// Process id on the node.
    pub process: Option<u32>,
}

/// How sure a number or a verdict is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Confidence {
    /// A guess with evidence.
    Low,
    /// One kind of evidence.
    Medium,
    /// Independent kinds of evidence agree.
    High,
    /// Measured by the device itself.
    Exact,
}

impl Confidence {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
            Self::Exact => "exact",
        }
    }
}
