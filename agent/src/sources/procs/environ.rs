//! What a process's environment says of its job, rank and devices.
//!
//! Nothing here is trusted: a variable that does not hold what it should is left out and named, never guessed at.

use stallscope_attribution::flops::Shape;

/// What a launcher told a process.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Declared {
    pub(super) rank: Option<u32>,
    pub(super) world: Option<u32>,
    pub(super) local_rank: Option<u32>,
    /// The rank comes from Slurm's variables, which the launcher of a step has too.
    pub(super) rank_by_slurm: bool,
    pub(super) job: Option<String>,
    /// Torch's rendezvous, equal on all ranks: names a job that has no other name. Not on the loopback, where it is
    /// equal for jobs of different nodes.
    pub(super) rendezvous: Option<String>,
    pub(super) kind: Option<String>,
    pub(super) model_flops_per_step: Option<u64>,
    /// `CUDA_VISIBLE_DEVICES`; `None` when not set.
    pub(super) visible: Option<Vec<VisibleDevice>>,
}

/// One entry of `CUDA_VISIBLE_DEVICES`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum VisibleDevice {
    Index(u32),
    /// `GPU-` and at least the start of a UUID.
    Uuid(String),
    /// A MIG device; the GPU's UUID where the old form names it.
    Mig {
        gpu_uuid: Option<String>,
    },
}

/// A variable that was ignored.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Malformed {
    pub(super) variable: &'static str,
    /// At most 64 characters of it.
    pub(super) value: String,
    pub(super) wanted: &'static str,
}

/// Launchers in the order in which they are believed: rank, ranks, rank on the node.
const LAUNCHERS: [[&str; 3]; 4] = [
    ["RANK", "WORLD_SIZE", "LOCAL_RANK"],
    [
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
    ],
    ["PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"],
    ["SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"],
];
const SLURM: usize = 3;

/// The kinds of job a verdict knows.
const KINDS: [&str; 7] = [
    "pretrain", "finetune", "rl", "prefill", "decode", "other", "unknown",
];

/// Largest rank and number of ranks believed.
const MAX_RANKS: u32 = 1 << 24;
/// Longest job name believed, bytes.
const MAX_NAME: usize = 128;
/// Most devices listed.
const MAX_VISIBLE: usize = 128;

/// Reads the NUL-separated block of `/proc/PID/environ`.
pub(super) fn parse_environ(block: &[u8]) -> (Declared, Vec<Malformed>) {
    let mut reader = Reader {
        block,
        malformed: Vec::new(),
    };
    let mut declared = Declared {
        job: ["STALLSCOPE_JOB", "SLURM_JOB_ID", "SLURM_JOBID"]
            .into_iter()
            .find_map(|name| reader.name(name)),
        kind: reader.kind("STALLSCOPE_JOB_KIND"),
        model_flops_per_step: reader
            .flops("STALLSCOPE_MODEL_FLOPS_PER_STEP")
            .or_else(|| reader.shape("STALLSCOPE_MODEL_SHAPE")),
        visible: reader.visible("CUDA_VISIBLE_DEVICES"),
        ..Declared::default()
    };
    if declared.job.is_none() {
        // torchrun's run id is `none` unless one is given.
        declared.job = reader.name("TORCHELASTIC_RUN_ID").filter(|id| id != "none");
    }
    for (launcher, [rank, ..]) in LAUNCHERS.into_iter().enumerate() {
        if declared.rank.is_none() {
            declared.rank = reader.number(rank);
            declared.rank_by_slurm = declared.rank.is_some() && launcher == SLURM;
        }
    }
    let mut world_variable = "WORLD_SIZE";
    for [_, world, local] in LAUNCHERS {
        if declared.world.is_none() {
            declared.world = reader.number(world);
            world_variable = world;
        }
        declared.local_rank = declared.local_rank.or_else(|| reader.number(local));
    }
    if declared.rank.is_some() {
        declared.rendezvous = reader.rendezvous();
    }
    if let (Some(rank), Some(world)) = (declared.rank, declared.world)
        && rank >= world
    {
        declared.world = None;
        reader.reject(world_variable, &world.to_string(), "more than the rank");
    }
    (declared, reader.malformed)
}

struct Reader<'a> {
    block: &'a [u8],
    malformed: Vec<Malformed>,
}

impl<'a> Reader<'a> {
    /// The first value of a variable, as getenv(3) finds it.
    fn raw(&self, name: &str) -> Option<&'a [u8]> {
        self.block.split(|&byte| byte == 0).find_map(|entry| {
            entry
                .strip_prefix(name.as_bytes())
                .and_then(|rest| rest.strip_prefix(b"="))
        })
    }

    /// A set but empty variable counts as not set.
    fn text(&mut self, name: &'static str, wanted: &'static str) -> Option<&'a str> {
        let raw = self.raw(name).filter(|raw| !raw.is_empty())?;
        let text = std::str::from_utf8(raw).ok();
        if text.is_none() {
            self.reject(name, &String::from_utf8_lossy(raw), wanted);
        }
        text
    }

    fn reject(&mut self, variable: &'static str, value: &str, wanted: &'static str) {
        let value = value
            .chars()
            .take(64)
            .map(|c| if c.is_control() { '?' } else { c })
            .collect();
        self.malformed.push(Malformed {
            variable,
            value,
            wanted,
        });
    }

    fn number(&mut self, name: &'static str) -> Option<u32> {
        const WANTED: &str = "a whole number below 16777216";
        let text = self.text(name, WANTED)?;
        let number = text.trim().parse().ok().filter(|&number| number < MAX_RANKS);
        if number.is_none() {
            self.reject(name, text, WANTED);
        }
        number
    }

    fn flops(&mut self, name: &'static str) -> Option<u64> {
        const WANTED: &str = "a positive whole number: FLOPs of one step on one GPU";
        let text = self.text(name, WANTED)?;
        let number = text.trim().parse().ok().filter(|&number| number > 0);
        if number.is_none() {
            self.reject(name, text, WANTED);
        }
        number
    }

    /// FLOPs of one step on one GPU from the model's shape.
    fn shape(&mut self, name: &'static str) -> Option<u64> {
        const WANTED: &str =
            "params=..,layers=..,heads=..,head_size=..,sequence=..,tokens=.. of one GPU and step";
        let text = self.text(name, WANTED)?;
        let flops = text
            .trim()
            .parse::<Shape>()
            .and_then(|shape| shape.model_flops_per_step());
        if flops.is_err() {
            self.reject(name, text, WANTED);
        }
        flops.ok()
    }

    fn name(&mut self, name: &'static str) -> Option<String> {
        const WANTED: &str = "a name of at most 128 bytes without control characters";
        let text = self.text(name, WANTED)?.trim();
        if text.is_empty() || text.len() > MAX_NAME || text.chars().any(char::is_control) {
            self.reject(name, text, WANTED);
            return None;
        }
        Some(text.to_owned())
    }

    fn kind(&mut self, name: &'static str) -> Option<String> {
        const WANTED: &str = "one of pretrain, finetune, rl, prefill, decode, other, unknown";
        let text = self.text(name, WANTED)?;
        if !KINDS.contains(&text) {
            self.reject(name, text, WANTED);
            return None;
        }
        Some(text.to_owned())
    }

    fn rendezvous(&mut self) -> Option<String> {
        let address = self.name("MASTER_ADDR")?;
        if address == "localhost" || address == "::1" || address.starts_with("127.") {
            return None;
        }
        let port = self.number("MASTER_PORT")?;
        Some(format!("{address}:{port}"))
    }

    fn visible(&mut self, name: &'static str) -> Option<Vec<VisibleDevice>> {
        const WANTED: &str = "a list of device indices, GPU- or MIG- names";
        if self.raw(name).is_some_and(<[u8]>::is_empty) {
            return Some(Vec::new());
        }
        let text = self.text(name, WANTED)?;
        let mut devices = Vec::new();
        for entry in text.split(',').take(MAX_VISIBLE).map(str::trim) {
            // The runtime too takes the devices before the first entry it does not know; -1 is the usual way to say
            // "none from here on".
            match visible_device(entry) {
                Some(device) => devices.push(device),
                None if entry.starts_with('-') || entry == "NoDevFiles" => break,
                None => {
                    self.reject(name, text, WANTED);
                    break;
                }
            }
        }
        Some(devices)
    }
}

fn visible_device(entry: &str) -> Option<VisibleDevice> {
    if let Ok(index) = entry.parse() {
        return Some(VisibleDevice::Index(index)).filter(|_| entry.bytes().all(|byte| byte.is_ascii_digit()));
    }
    let uuid = |text: &str| {
        let hex = text.strip_prefix("GPU-")?;
        (!hex.is_empty() && hex.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()))
            .then(|| text.to_owned())
    };
    if let Some(rest) = entry.strip_prefix("MIG-") {
        return Some(VisibleDevice::Mig {
            gpu_uuid: rest.split('/').next().and_then(uuid),
        });
    }
    uuid(entry).map(VisibleDevice::Uuid)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn parse(entries: &[&str]) -> (Declared, Vec<&'static str>) {
        let (declared, malformed) = parse_environ(entries.join("\0").as_bytes());
        (
            declared,
            malformed
                .into_iter()
                .map(|malformed| malformed.variable)
                .collect(),
        )
    }

    #[test]
    fn a_shape_gives_the_flops_that_are_not_declared() {
        let shape =
            "STALLSCOPE_MODEL_SHAPE=params=7e9,layers=32,heads=32,head_size=128,sequence=4096,tokens=1000";
        let flops = |entries: &[&str]| parse(entries).0.model_flops_per_step;
        // (6 * 7e9 + 12 * 32 * 32 * 128 * 4096) * 1000.
        assert_eq!(flops(&[shape]), Some(48_442_450_944_000));
        assert_eq!(flops(&[shape, "STALLSCOPE_MODEL_FLOPS_PER_STEP=99"]), Some(99));
        let (declared, malformed) = parse(&["STALLSCOPE_MODEL_SHAPE=params=7e9"]);
        assert_eq!(
            (declared.model_flops_per_step, malformed),
            (None, vec!["STALLSCOPE_MODEL_SHAPE"])
        );
    }

    #[test]
    fn torchrun_wins_over_slurm() {
        let (declared, malformed) = parse(&[
            "SLURM_PROCID=0",
            "SLURM_NTASKS=2",
            "SLURM_LOCALID=0",
            "SLURM_JOB_ID=4711",
            "RANK=13",
            "WORLD_SIZE=16",
            "LOCAL_RANK=5",
            "MASTER_ADDR=n0",
            "MASTER_PORT=29500",
            "PATH=/bin",
            "TORCHELASTIC_RUN_ID=none",
        ]);
        assert_eq!(
            (declared.rank, declared.world, declared.local_rank),
            (Some(13), Some(16), Some(5))
        );
        assert_eq!(
            (declared.job.as_deref(), declared.rank_by_slurm),
            (Some("4711"), false)
        );
        assert_eq!(declared.rendezvous.as_deref(), Some("n0:29500"));
        assert!(malformed.is_empty());
    }

    #[test]
    fn other_launchers() {
        let (slurm, _) = parse(&[
            "SLURM_PROCID=3",
            "SLURM_NTASKS=4",
            "SLURM_LOCALID=1",
            "SLURM_JOBID=9",
        ]);
        assert_eq!(
            (slurm.rank, slurm.world, slurm.local_rank, slurm.rank_by_slurm),
            (Some(3), Some(4), Some(1), true)
        );
        assert_eq!(slurm.job.as_deref(), Some("9"));
        let (mpi, _) = parse(&[
            "OMPI_COMM_WORLD_RANK=1",
            "OMPI_COMM_WORLD_SIZE=2",
            "OMPI_COMM_WORLD_LOCAL_RANK=1",
        ]);
        assert_eq!((mpi.rank, mpi.world, mpi.local_rank), (Some(1), Some(2), Some(1)));
        let (pmi, _) = parse(&["PMI_RANK=1", "PMI_SIZE=2"]);
        assert_eq!((pmi.rank, pmi.world), (Some(1), Some(2)));
    }

    #[test]
    fn malformed_values_are_named_and_left_out() {
        let (declared, malformed) = parse(&[
            "RANK=two",
            "SLURM_PROCID=1",
            "WORLD_SIZE=-4",
            "LOCAL_RANK=99999999999",
            "STALLSCOPE_JOB=\u{7}bell",
            "STALLSCOPE_JOB_KIND=mining",
            "STALLSCOPE_MODEL_FLOPS_PER_STEP=1e15",
            "CUDA_VISIBLE_DEVICES=0,banana,2",
        ]);
        assert_eq!(declared.rank, Some(1));
        assert_eq!(
            (declared.world, declared.local_rank, declared.job),
            (None, None, None)
        );
        assert_eq!((declared.kind, declared.model_flops_per_step), (None, None));
        assert_eq!(declared.visible, Some(vec![VisibleDevice::Index(0)]));
        let mut named = malformed;
        named.sort_unstable();
        assert_eq!(
            named,
            [
                "CUDA_VISIBLE_DEVICES",
                "LOCAL_RANK",
                "RANK",
                "STALLSCOPE_JOB",
                "STALLSCOPE_JOB_KIND",
                "STALLSCOPE_MODEL_FLOPS_PER_STEP",
                "WORLD_SIZE",
            ]
        );
    }

    #[test]
    fn a_world_that_does_not_hold_the_rank_is_refused() {
        let (declared, malformed) = parse(&["RANK=4", "WORLD_SIZE=4"]);
        assert_eq!((declared.rank, declared.world), (Some(4), None));
        assert_eq!(malformed, ["WORLD_SIZE"]);
    }

    #[test]
    fn visible_devices() {
        let visible = |value: &str| {
            parse(&[&format!("CUDA_VISIBLE_DEVICES={value}")])
                .0
                .visible
                .unwrap()
        };
        assert_eq!(
            visible("2, 0"),
            [VisibleDevice::Index(2), VisibleDevice::Index(0)]
        );
        assert_eq!(visible("1,-1,2"), [VisibleDevice::Index(1)]);
        assert!(visible("-1").is_empty());
        assert_eq!(
            visible("GPU-8932f937"),
            [VisibleDevice::Uuid("GPU-8932f937".to_owned())]
        );
        assert_eq!(
            visible("MIG-GPU-8932f937-d72c/3/0,MIG-0a1b"),
            [
                VisibleDevice::Mig {
                    gpu_uuid: Some("GPU-8932f937-d72c".to_owned())
                },
                VisibleDevice::Mig { gpu_uuid: None },
            ]
        );
        assert!(visible("").is_empty());
        assert_eq!(parse(&[]).0.visible, None);
    }

    #[test]
    fn bytes_that_are_no_text_are_refused_by_name() {
        let (declared, malformed) = parse_environ(b"RANK=\xff\xfe\0WORLD_SIZE=2\0");
        assert_eq!((declared.rank, declared.world), (None, Some(2)));
        assert_eq!(malformed[0].variable, "RANK");
    }

    const NAMES: [&str; 10] = [
        "RANK",
        "WORLD_SIZE",
        "LOCAL_RANK",
        "SLURM_PROCID",
        "SLURM_JOB_ID",
        "MASTER_ADDR",
        "MASTER_PORT",
        "CUDA_VISIBLE_DEVICES",
        "STALLSCOPE_JOB_KIND",
        "STALLSCOPE_MODEL_FLOPS_PER_STEP",
    ];

    proptest::proptest! {
        #[test]
        fn any_environment_is_survived(
            entries in proptest::collection::vec((0..NAMES.len(), proptest::collection::vec(0_u8.., 0..40)), 0..20),
        ) {
            let mut block = Vec::new();
            for (name, value) in &entries {
                block.extend_from_slice(NAMES[*name].as_bytes());
                block.push(b'=');
                block.extend_from_slice(value);
                block.push(0);
            }
            let (declared, malformed) = parse_environ(&block);
            proptest::prop_assert!(declared.rank.zip(declared.world).is_none_or(|(rank, world)| rank < world));
            proptest::prop_assert!(malformed.iter().all(|m| m.value.chars().count() <= 64));
        }

        #[test]
        fn any_device_list_is_survived(text in "[-0-9a-fGPUMI,/ ]{0,80}") {
            let _ = parse_environ(format!("CUDA_VISIBLE_DEVICES={text}").as_bytes());
        }
    }
}
