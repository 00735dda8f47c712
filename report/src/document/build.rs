//! From the analysis to the document.

use std::cmp::Reverse;
use std::collections::BTreeMap;

use stallscope_attribution::budget::Budget;
use stallscope_attribution::cause::Place;
use stallscope_attribution::facts::RecordGap;
use stallscope_attribution::job::{self, FlopsSource, GpuSummary, JobAnalysis, Tier};
use stallscope_attribution::leaf::{Class, Leaf};
use stallscope_attribution::peaks;
use stallscope_attribution::reading::Reading;
use stallscope_attribution::time::Window;

use super::{
    Activity, Blame, Clocks, Document, Evidence, Gap, Gpu, Job, KernelTime, Links, MfuSource, Period,
    Recovers, Rollup, RuledOut, SCHEMA, Steps, Sweep, Verdict, Where,
};
use crate::share::{Points, Share};

impl Document {
    /// The report of several jobs, the one with the most GPU time first.
    #[must_use]
    pub fn from_analyses<'a>(analyses: impl IntoIterator<Item = &'a JobAnalysis>) -> Self {
        let mut analyses: Vec<&JobAnalysis> = analyses.into_iter().collect();
        analyses.sort_by_key(|analysis| Reverse(gpu_time_ns(analysis)));
        let weakest = analyses
            .iter()
            .map(|analysis| analysis.tier)
            .max_by_key(|tier| weakness(*tier));
        Self {
            schema: SCHEMA.to_owned(),
            tier: weakest.map(|tier| tier.name().to_owned()).unwrap_or_default(),
            links: Links::of_jobs(&analyses),
            jobs: analyses.into_iter().map(Job::from).collect(),
        }
    }
}

impl From<&JobAnalysis> for Document {
    fn from(analysis: &JobAnalysis) -> Self {
        Self::from_analyses([analysis])
    }
}

fn gpu_time_ns(analysis: &JobAnalysis) -> u128 {
    analysis
        .gpus
        .iter()
        .map(|gpu| u128::from(gpu.total.window_ns()))
        .sum()
}

const fn weakness(tier: Tier) -> u8 {
    match tier {
        Tier::Activity => 0,
        Tier::ProbesAndCounters => 1,
        Tier::Probes => 2,
    }
}

impl From<&JobAnalysis> for Job {
    fn from(analysis: &JobAnalysis) -> Self {
        let gpus: Vec<Gpu> = analysis.gpus.iter().map(Gpu::from).collect();
        let how = analysis.work.efficiency.as_ref();
        Self {
            job: analysis.job.clone(),
            kind: analysis.kind.clone(),
            tier: analysis.tier.name().to_owned(),
            observed: analysis.observed.map(Period::from),
            mfu_points: analysis.mfu_ppm.map(|ppm| Points { ppm }),
            mfu_source: mfu_source(analysis),
            hfu_points: how.and_then(|how| how.hfu_ppm).map(|ppm| Points { ppm }),
            mfu_convention: how.map(|how| how.convention.clone()),
            peak: how.map(|how| how.peak.clone()).or_else(|| peak(analysis)),
            kernels: analysis.work.kernels.iter().map(KernelTime::from).collect(),
            notes: analysis.work.notes.clone(),
            clocks: analysis.work.clocks.map(Clocks::from),
            total: Rollup::over(&gpus),
            nodes: by_node(&gpus),
            gpus,
            blame: analysis.blame.iter().map(Blame::from).collect(),
            verdicts: analysis.verdicts.iter().map(Verdict::from).collect(),
            gaps: analysis.gaps.iter().map(Gap::from).collect(),
        }
    }
}

fn mfu_source(analysis: &JobAnalysis) -> MfuSource {
    let source = analysis.work.efficiency.as_ref().map(|how| how.source);
    match (analysis.mfu_ppm, source, analysis.mfu_declared) {
        (None, ..) => MfuSource::Unknown,
        (_, Some(FlopsSource::Declared), _) | (_, None, true) => MfuSource::DeclaredFlops,
        (_, Some(FlopsSource::OperatorShapes), _) => MfuSource::OperatorShapes,
        (_, Some(FlopsSource::TensorActivity), _) | (_, None, false) => MfuSource::TensorActivity,
    }
}

/// The row of the peaks table behind the MFU, when all GPUs are of one kind.
fn peak(analysis: &JobAnalysis) -> Option<String> {
    analysis.mfu_ppm?;
    let mut rows = analysis
        .gpus
        .iter()
        .map(|gpu| peaks::find(0, &gpu.subject.device));
    let row = rows.next()??;
    rows.all(|other| other.is_some_and(|other| other.names == row.names))
        .then(|| {
            let gflops = row.peak_gflops;
            format!(
                "{}.{} TFLOP/s bf16: {}",
                gflops / 1000,
                gflops / 100 % 10,
                row.source
            )
        })
}

impl From<&job::KernelTime> for KernelTime {
    fn from(of: &job::KernelTime) -> Self {
        Self {
            class: of.class.to_owned(),
            time_ns: of.time_ns,
            count: of.count,
        }
    }
}

impl From<job::ClockAlignment> for Clocks {
    fn from(of: job::ClockAlignment) -> Self {
        Self {
            count: of.clocks,
            error_ns: of.error_ns,
        }
    }
}

/// The sums of the GPUs of each node.
pub(crate) fn by_node(gpus: &[Gpu]) -> BTreeMap<String, Rollup> {
    let mut nodes: BTreeMap<&str, Vec<&Gpu>> = BTreeMap::new();
    for gpu in gpus {
        nodes.entry(&gpu.node).or_default().push(gpu);
    }
    nodes
        .into_iter()
        .map(|(node, gpus)| (node.to_owned(), Rollup::over(gpus)))
        .collect()
}

impl From<&GpuSummary> for Gpu {
    fn from(summary: &GpuSummary) -> Self {
        let total = &summary.total;
        let intervals = total.intervals().iter();
        Self {
            rank: summary.subject.rank,
            node: summary.subject.node.clone(),
            device: summary.subject.device.clone(),
            gpu: summary.subject.gpu,
            pci: summary.subject.pci.clone(),
            total_ns: total.window_ns(),
            sweep: Sweep::from(total),
            budget: Leaf::ALL
                .iter()
                .map(|leaf| (leaf.name().to_owned(), total.leaf_ns(*leaf)))
                .collect(),
            intervals: intervals
                .map(|i| (i.leaf.name().to_owned(), [i.low_ns, i.high_ns]))
                .collect(),
            unmeasured: unmeasured(total),
            steps: Steps {
                method: summary.method.name().to_owned(),
                count: summary.steps,
                period_calls: summary.period_calls,
                median_ns: summary.median_step_ns,
            },
            activity: summary.activity.value().map(Activity::from),
            activity_missing: match &summary.activity {
                Reading::Value(_) => None,
                Reading::NotMeasured => Some("not measured".to_owned()),
                Reading::Unsupported => Some("not supported by device or driver".to_owned()),
                Reading::Failed(why) => Some(why.clone()),
            },
        }
    }
}

/// Residuals are left out: they are what remains, never measured themselves.
fn unmeasured(budget: &Budget) -> Vec<String> {
    let missing = Leaf::ALL
        .iter()
        .filter(|leaf| !budget.is_measured(**leaf) && leaf.class().residual() != **leaf)
        .map(|leaf| leaf.name().to_owned());
    missing.collect()
}

impl From<&Budget> for Sweep {
    fn from(budget: &Budget) -> Self {
        Self {
            compute_ns: budget.class_ns(Class::Compute).into(),
            exposed_comm_ns: budget.class_ns(Class::Comm).into(),
            exposed_memory_ns: budget.class_ns(Class::Memory).into(),
            idle_ns: budget.class_ns(Class::Idle).into(),
        }
    }
}

impl From<Window> for Period {
    fn from(window: Window) -> Self {
        Self {
            start_unix_ns: window.start_ns(),
            end_unix_ns: window.end_ns(),
        }
    }
}

impl From<&stallscope_attribution::facts::Activity> for Activity {
    fn from(activity: &stallscope_attribution::facts::Activity) -> Self {
        Self {
            driver_utilisation: Share {
                ppm: activity.busy_ppm,
            },
            sm: Share { ppm: activity.sm_ppm },
            occupancy: Share {
                ppm: activity.occupancy_ppm,
            },
            tensor: Share {
                ppm: activity.tensor_ppm,
            },
            hbm: Share {
                ppm: activity.dram_ppm,
            },
        }
    }
}

impl From<&job::Blame> for Blame {
    fn from(blame: &job::Blame) -> Self {
        Self {
            rank: blame.place.rank,
            node: blame.place.node.clone(),
            gpu: blame.place.gpu,
            cause: blame.cause.name().to_owned(),
            leaf: blame.leaf.name().to_owned(),
            cost_ns: blame.cost_ns,
        }
    }
}

impl From<&job::Verdict> for Verdict {
    fn from(verdict: &job::Verdict) -> Self {
        let mfu_points = verdict.recovers.mfu_centipoints.map(Points::from_centipoints);
        Self {
            cause: verdict.cause.name().to_owned(),
            place: Where::from(&verdict.place),
            share: Share {
                ppm: verdict.share_ppm,
            },
            cost_ns: verdict.cost_ns,
            mfu_points,
            confidence: verdict.confidence.name().to_owned(),
            evidence: verdict.evidence.iter().map(Evidence::from).collect(),
            ruled_out: verdict.ruled_out.iter().map(RuledOut::from).collect(),
            confirm: verdict.confirm.clone(),
            recovers: Recovers {
                gpu_ns: verdict.recovers.gpu_ns,
                low_gpu_ns: verdict.recovers.low_gpu_ns,
                high_gpu_ns: verdict.recovers.high_gpu_ns,
                mfu_points,
            },
            onset_unix_ns: verdict.onset_ns,
            first_seen_unix_ns: None,
        }
    }
}

impl From<&Place> for Where {
    fn from(place: &Place) -> Self {
        let Place {
            node,
            gpu,
            pci,
            rank,
            nic_port,
            link,
            process,
        } = place.clone();
        Self {
            node,
            gpu,
            pci,
            rank,
            nic_port,
            link,
            process,
        }
    }
}

impl From<&job::Evidence> for Evidence {
    fn from(evidence: &job::Evidence) -> Self {
        let job::Evidence {
            what,
            value,
            expected,
        } = evidence.clone();
        Self {
            what,
            value,
            expected,
        }
    }
}

impl From<&job::RuledOut> for RuledOut {
    fn from(ruled_out: &job::RuledOut) -> Self {
        Self {
            cause: ruled_out.cause.name().to_owned(),
            why: ruled_out.why.clone(),
        }
    }
}

impl From<&RecordGap> for Gap {
    fn from(gap: &RecordGap) -> Self {
        Self {
            node: gap.node.clone(),
            period: gap.window.map(Period::from),
            what: gap.what.clone(),
            count: gap.count,
        }
    }
}
