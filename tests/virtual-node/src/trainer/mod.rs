//! The training job's ranks: what they do is what a data-parallel training loop does, through the same libraries.

mod checkpoint;
mod delay;
pub(crate) mod driver;
mod kernels;
pub(crate) mod loader;
pub(crate) mod spans;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use anyhow::{Context, bail};
use virtual_node_state::clock::{burn, now_ns, thread_cpu_ns};
use virtual_node_state::control::{Control, RankControl};
use virtual_node_state::map::Shared;

use crate::plan::{Plan, STORE_PORT};
use delay::Delays;
use driver::{Collectives, Communicator, Device, Object};
use kernels::Kernels;
use loader::Loaders;
use spans::{Span, SpanKind, Spans};

/// The pinned buffer through which the device's memory goes to the host and back.
const HOST_BUFFER_BYTES: usize = 64 << 20;
/// Launches between two entries of the host's log.
const LAUNCHES_PER_SPAN: u32 = 8;

struct Trainer {
    plan: Plan,
    rank: u32,
    control: Shared<Control>,
    device: Device,
    comm: Communicator,
    compute: Object,
    comm_stream: Object,
    copy_stream: Object,
    bucket_ready: Vec<Object>,
    reduced: Object,
    batch_ready: Object,
    kernels: Kernels,
    /// Captured runs of launches, where the job replays graphs: pattern, count and graph.
    graphs: Vec<(Vec<Object>, u32, Object)>,
    staging: Object,
    batch: u64,
    gradients: u64,
    loss: Object,
    loaders: Loaders,
    spans: Spans,
}

/// Runs one rank to the end of the job.
pub(crate) fn run(dir: &Path, rank: u32) -> anyhow::Result<()> {
    let plan = Plan::read(dir)?;
    let (node, gpu) = plan.node_of(rank);
    crate::topology::enter(&node.netns, &plan.rank_cgroup(rank))?;
    let control = Shared::<Control>::open(&plan.control()).context("failed to map the job's control file")?;
    control.ranks[rank as usize].pid.store(std::process::id(), SeqCst);
    let loaders = Loaders::start(dir, rank, plan.scenario.job.workers, plan.scenario.job.prefetch)?;
    let device = Device::open(gpu)?;
    let collectives = Collectives::load()?;
    let id = share_id(&plan, rank, &collectives)?;
    let comm = collectives.join(plan.scenario.ranks(), id, rank)?;
    let job = &plan.scenario.job;
    let kernels = Kernels::load(&device, job, 1)?;
    let trainer = Trainer {
        compute: device.stream()?,
        comm_stream: device.stream()?,
        copy_stream: device.stream()?,
        bucket_ready: (0..job.buckets)
            .map(|_| device.event())
            .collect::<anyhow::Result<_>>()?,
        reduced: device.event()?,
        batch_ready: device.event()?,
        kernels,
        graphs: Vec::new(),
        staging: device.allocate_pinned(usize::try_from(job.sample_bytes())?)?,
        batch: device.allocate(usize::try_from(job.sample_bytes())?)?,
        gradients: device.allocate(60 << 30)?,
        loss: device.allocate_pinned(HOST_BUFFER_BYTES)?,
        spans: Spans::create(&spans::path(node, rank))?,
        control,
        device,
        comm,
        loaders,
        rank,
        plan,
    };
    trainer.train()
}

/// Rank 0 makes the communicator's id and hands it to the others, as a framework's store does.
fn share_id(plan: &Plan, rank: u32, collectives: &Collectives) -> anyhow::Result<[u8; 128]> {
    let address = SocketAddr::from((plan.nodes[0].ip, STORE_PORT));
    if rank == 0 {
        let id = collectives.unique_id()?;
        let listener = TcpListener::bind(address).context("failed to open the job's store")?;
        for _ in 1..plan.scenario.ranks() {
            listener.accept()?.0.write_all(&id)?;
        }
        return Ok(id);
    }
    for _ in 0..600 {
        if let Ok(mut stream) = TcpStream::connect_timeout(&address, Duration::from_secs(1)) {
            let mut id = [0; 128];
            stream
                .read_exact(&mut id)
                .context("the job's store closed early")?;
            return Ok(id);
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    bail!("rank 0 did not open the job's store within 30 s")
}

impl Trainer {
    fn knobs(&self) -> &RankControl {
        &self.control.ranks[self.rank as usize]
    }

    fn train(mut self) -> anyhow::Result<()> {
        let sync_every = self.plan.scenario.job.sync_every;
        let mut delays = Delays::default();
        for step in 0.. {
            if step >= self.control.stop_at_step.load(SeqCst) {
                break;
            }
            let begin = now_ns();
            if step == 0 {
                self.knobs().first_step_ns.store(begin, SeqCst);
            }
            self.knobs().steps.store(step + 1, SeqCst);
            self.step((step + 1) % sync_every == 0)?;
            let every = u64::from(self.knobs().checkpoint_every.load(SeqCst));
            if every > 0 && (step + 1) % every == 0 {
                self.checkpoint(step)?;
            }
            self.span(SpanKind::Step, begin, [step, delays.longest_ns(), 0])?;
            self.spans.flush()?;
        }
        self.device.synchronize_all()?;
        self.knobs().finished.store(1, SeqCst);
        self.comm.destroy()
    }

    fn span(
        &mut self,
        kind: SpanKind,
        start_ns: u64,
        [first, second, third]: [u64; 3],
    ) -> anyhow::Result<()> {
        let span = Span {
            kind,
            start_ns,
            end_ns: now_ns(),
            first,
            second,
            third,
        };
        self.spans.write(&span).context("failed to write the host's log")
    }

    fn step(&mut self, synchronise: bool) -> anyhow::Result<()> {
        let split = self.knobs().launch_split.load(Relaxed).max(1);
        if split != self.kernels.split {
            self.device.synchronize(self.compute)?;
            for (_, _, graph) in self.graphs.drain(..) {
                self.device.destroy_graph(graph)?;
            }
            self.device.unload(self.kernels.module)?;
            self.kernels = Kernels::load(&self.device, &self.plan.scenario.job, split)?;
        }
        let begin = now_ns();
        let batch = self.loaders.next()?;
        self.span(SpanKind::DataWait, begin, batch.account())?;

        let bytes = usize::try_from(self.plan.scenario.job.sample_bytes())?;
        self.device
            .copy_to_device(self.batch, self.staging, bytes, self.copy_stream)?;
        self.device.record(self.batch_ready, self.copy_stream)?;
        self.device.wait(self.compute, self.batch_ready)?;
        self.forward()?;
        self.backward()?;
        for bytes in self.offloaded() {
            self.device
                .copy_to_device(self.gradients, self.loss, bytes, self.compute)?;
        }
        self.run(
            &[self.kernels.optimiser],
            self.plan.scenario.job.optimiser_kernels,
        )?;
        for bytes in self.offloaded() {
            self.device
                .copy_to_host(self.loss, self.gradients, bytes, self.compute)?;
        }
        self.device
            .copy_to_host(self.loss, self.gradients, 4, self.compute)?;
        if synchronise {
            let (begin, delay) = (now_ns(), delay::own_ns());
            self.device.synchronize(self.compute)?;
            let delay_ns = delay::own_ns().saturating_sub(delay);
            self.span(SpanKind::Sync, begin, [delay_ns, 0, 0])?;
        }
        Ok(())
    }

    /// Sizes of the copies in which optimiser state goes one way.
    fn offloaded(&self) -> impl Iterator<Item = usize> + use<> {
        const MOST_MIB: u64 = HOST_BUFFER_BYTES as u64 >> 20;
        let mib = self.plan.scenario.job.offload_mib;
        (0..mib)
            .step_by(MOST_MIB as usize)
            .map(move |done| (mib - done).min(MOST_MIB) as usize * (1 << 20))
    }

    fn forward(&mut self) -> anyhow::Result<()> {
        // Two matrix products, then a normalisation or activation.
        let (gemm, other) = (self.kernels.forward_gemm, self.kernels.forward_other);
        self.run(&[gemm, gemm, other], self.plan.scenario.job.forward_kernels)
    }

    fn backward(&mut self) -> anyhow::Result<()> {
        let job = &self.plan.scenario.job;
        let (kernels, buckets) = (job.backward_kernels, job.buckets);
        let bucket_bytes = job.gradient_bytes() / u64::from(buckets);
        let (gemm, other) = (self.kernels.backward_gemm, self.kernels.backward_other);
        for bucket in 0..buckets {
            let share = kernels * (bucket + 1) / buckets - kernels * bucket / buckets;
            self.run(&[gemm, gemm, other], share)?;
            // The reduction of a bucket overlaps the rest of the backward pass on its own stream.
            let ready = self.bucket_ready[bucket as usize];
            self.device.record(ready, self.compute)?;
            self.device.wait(self.comm_stream, ready)?;
            self.comm
                .all_reduce(self.gradients, bucket_bytes, self.comm_stream)?;
        }
        self.device.record(self.reduced, self.comm_stream)?;
        self.device.wait(self.compute, self.reduced)
    }

    /// Runs `count` kernels: launched one by one, or all at once as a graph that is captured the first time.
    fn run(&mut self, pattern: &[Object], count: u32) -> anyhow::Result<()> {
        if !self.plan.scenario.job.graphs {
            return self.launch_run(pattern, count);
        }
        let known = self
            .graphs
            .iter()
            .find(|(of, kernels, _)| of == pattern && *kernels == count);
        let graph = match known {
            Some((_, _, graph)) => *graph,
            None => {
                self.device.begin_capture(self.compute)?;
                self.launch_run(pattern, count)?;
                let graph = self.device.end_capture(self.compute)?;
                self.graphs.push((pattern.to_vec(), count, graph));
                graph
            }
        };
        let (begin, cpu) = (now_ns(), thread_cpu_ns());
        burn(self.launch_cost_ns());
        self.device.launch_graph(graph, self.compute)?;
        self.span(SpanKind::Launch, begin, [thread_cpu_ns() - cpu, 0, 0])
    }

    /// Processor time of one launch.
    fn launch_cost_ns(&self) -> u64 {
        match self.knobs().launch_cost_ns.load(Relaxed) {
            0 => (self.plan.scenario.job.launch_us * 1e3) as u64,
            cost_ns => cost_ns,
        }
    }

    /// Launches `count` kernels, each cut into `split`, taking turns through `pattern`.
    fn launch_run(&mut self, pattern: &[Object], count: u32) -> anyhow::Result<()> {
        let cost_ns = self.launch_cost_ns();
        let split = self.kernels.split;
        let total = count * split;
        let (mut begin, mut cpu) = (now_ns(), thread_cpu_ns());
        for launch in 0..total {
            burn(cost_ns);
            self.device
                .launch(pattern[(launch / split) as usize % pattern.len()], self.compute)?;
            if (launch + 1) % LAUNCHES_PER_SPAN == 0 || launch + 1 == total {
                let used = thread_cpu_ns();
                self.span(SpanKind::Launch, begin, [used - cpu, 0, 0])?;
                (begin, cpu) = (now_ns(), used);
            }
        }
        Ok(())
    }

    fn checkpoint(&mut self, step: u64) -> anyhow::Result<()> {
        let begin = now_ns();
        // The weights come over in a burst; what is written is this rank's shard.
        for _ in 0..16 {
            self.device
                .copy_to_host(self.loss, self.gradients, HOST_BUFFER_BYTES, self.compute)?;
        }
        self.device.synchronize(self.compute)?;
        let bytes = self.knobs().checkpoint_bytes.load(SeqCst);
        checkpoint::write(&self.plan.data().join(format!("rank{}", self.rank)), bytes)?;
        self.span(SpanKind::Checkpoint, begin, [step, bytes, 0])
    }
}
