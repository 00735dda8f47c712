//! The probes on RDMA verbs, with a provider without a device: every post and byte, by queue pair, and who is at its other end.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use stallscope::observation::Fact;
use stallscope::sources::probes::{Attached, PostsError, ProbesConfig};
use stallscope::sources::procs::{LibraryKind, ProcessEvent};
use stallscope_attribution::facts::{DeviceEventKind, HardwareFact, QueuePair};
use stallscope_e2e::privileged;
use stallscope_e2e::tracer::{Puppet, Tracer, compile};
use stallscope_records::verbs::{MOST_PARTS, MOST_REQUESTS, offset};

/// More than the kernel's map holds.
const TOO_MANY: usize = 17_000;

/// The made-up library, its provider and a program that uses them.
struct Stand {
    folder: tempfile::TempDir,
}

impl Stand {
    /// With a provider that has no symbols, as distributions ship it, or with its local ones.
    fn build(stripped: bool) -> Result<Self> {
        let stand = Self {
            folder: tempfile::tempdir()?,
        };
        let shared: [&OsStr; 2] = ["-shared".as_ref(), "-fPIC".as_ref()];
        let versions = format!(
            "-Wl,--version-script={}/fixtures/verbs.map",
            env!("CARGO_MANIFEST_DIR")
        );
        let mut arguments = shared.to_vec();
        arguments.extend([versions.as_ref(), OsStr::new("-Wl,-soname,libibverbs.so.1")]);
        compile("verbs.c", &arguments, &stand.library())?;
        let mut arguments = shared.to_vec();
        arguments.extend(stripped.then_some(OsStr::new("-s")));
        let provider = stand.folder.path().join("libmlx5-rdmav34.so");
        compile("verbs_provider.c", &arguments, &provider)?;
        compile("verbs_job.c", &[stand.library().as_os_str()], &stand.job())?;
        Ok(stand)
    }

    fn library(&self) -> PathBuf {
        self.folder.path().join("libibverbs.so.1")
    }

    fn job(&self) -> PathBuf {
        self.folder.path().join("verbs_job")
    }

    fn start(&self) -> Result<Puppet> {
        Puppet::start(Command::new(self.job()).env("LD_LIBRARY_PATH", self.folder.path()))
    }

    /// A job, traced from before it does anything.
    fn traced(&self) -> Result<(Puppet, Tracer)> {
        let puppet = self.start()?;
        let mut tracer = Tracer::load(ProbesConfig::default())?;
        self.attach(&mut tracer, &puppet)?;
        tracer.trace(puppet.pid())?;
        Ok((puppet, tracer))
    }

    fn attach(&self, tracer: &mut Tracer, puppet: &Puppet) -> Result<Attached> {
        tracer.attach(LibraryKind::Verbs, &self.library(), puppet.pid())
    }
}

fn told(puppet: &mut Puppet, lines: &[&str]) -> Result<()> {
    for line in lines {
        let said = puppet.asked(line)?;
        ensure!(said == "done", "{line}: {said}");
    }
    Ok(())
}

/// Reads until the posts of the process are watched.
fn until_watched(tracer: &mut Tracer, pid: u32) -> Result<()> {
    tracer.drain_until(|tracer| {
        let of_it =
            |event: &ProcessEvent| matches!(event, ProcessEvent::PostsThrough { tgid, .. } if *tgid == pid);
        tracer.events.iter().any(of_it)
    })
}

fn facts(tracer: &Tracer) -> impl Iterator<Item = &QueuePair> {
    tracer
        .observations
        .iter()
        .filter_map(|observation| match &observation.fact {
            Fact::Hardware(facts) => match &facts.fact {
                HardwareFact::QueuePair(pair) => Some(pair),
                _ => None,
            },
            _ => None,
        })
}

/// All that was told of one queue pair: the last of what it is, and the sum of what it did.
fn sum(tracer: &Tracer, pid: u32, number: u32) -> Option<QueuePair> {
    facts(tracer)
        .filter(|pair| (pair.pid, pair.number) == (pid, number))
        .cloned()
        .reduce(|before, pair| QueuePair {
            posts: before.posts + pair.posts,
            posted_bytes: before.posted_bytes + pair.posted_bytes,
            cut_calls: before.cut_calls + pair.cut_calls,
            ..pair
        })
}

/// Posts, bytes and cut calls of a list of calls, each of some requests of some parts of some bytes.
fn truth(calls: &[[u64; 3]]) -> (u64, u64, u64) {
    let mut sums = (0, 0, 0);
    for &[requests, parts, bytes] in calls {
        let (most_requests, most_parts) = (u64::from(MOST_REQUESTS), u64::from(MOST_PARTS));
        let (seen, seen_parts) = (requests.min(most_requests), parts.min(most_parts));
        sums.0 += seen;
        sums.1 += seen * seen_parts * bytes;
        sums.2 += u64::from(requests > most_requests || parts > most_parts);
    }
    sums
}

fn counted(pair: &QueuePair) -> (u64, u64, u64) {
    (pair.posts, pair.posted_bytes, pair.cut_calls)
}

fn post_all(puppet: &mut Puppet, at: u32, calls: &[[u64; 3]]) -> Result<()> {
    for [requests, parts, bytes] in calls {
        told(puppet, &[&format!("post {at} {requests} {parts} {bytes}")])?;
    }
    Ok(())
}

#[test]
fn every_post_and_byte_is_counted_by_queue_pair_and_peer() -> Result<()> {
    if !privileged("every_post_and_byte_is_counted_by_queue_pair_and_peer") {
        return Ok(());
    }
    let stand = Stand::build(true)?;
    let (mut traced, mut other) = (stand.start()?, stand.start()?);
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    let attached = stand.attach(&mut tracer, &traced)?;
    ensure!(attached.failed.is_empty(), "{attached:?}");
    tracer.trace(traced.pid())?;
    told(&mut other, &["open", "make 0 901 2", "join 0 900 1 0"])?;
    told(&mut traced, &["open"])?;
    until_watched(&mut tracer, traced.pid())?;
    told(
        &mut traced,
        &[
            "make 0 501 2",
            "make 1 502 3",
            "make 2 503 4",
            "join 0 601 9 0",
            "join 1 602 0 4711",
        ],
    )?;

    let first = [
        [1, 1, 1_000],
        [3, 2, 512],
        [16, 4, 7],
        [1, 0, 9],
        [2, 1, 0xffff_ffff],
    ];
    let second = [[20, 1, 100], [1, 6, 10], [17, 5, 3], [5, 3, 11]];
    post_all(&mut traced, 0, &first)?;
    post_all(&mut traced, 1, &second)?;
    post_all(&mut other, 0, &first)?;
    told(&mut traced, &["race 2"])?;

    let pid = traced.pid();
    tracer.drain_until(|tracer| {
        let posts = |number| sum(tracer, pid, number).map_or(0, |pair| pair.posts);
        posts(501) >= 23 && posts(502) >= 38 && posts(503) >= 40_000
    })?;
    let pair = |number| sum(&tracer, pid, number).context("nothing of the queue pair");
    let (a, b, c) = (pair(501)?, pair(502)?, pair(503)?);
    ensure!(counted(&a) == truth(&first), "{a:?}");
    ensure!(counted(&b) == truth(&second), "{b:?}");
    ensure!(
        counted(&c) == (40_000, 120_000, 0),
        "two threads at a time: {c:?}"
    );
    let described = |pair: &QueuePair| {
        (
            pair.device.clone(),
            pair.port,
            pair.transport.clone(),
            pair.peer.clone(),
        )
    };
    ensure!(
        described(&a) == ("mlx5_7".into(), 2, "RC".into(), "::ffff:10.0.0.9".into()),
        "{a:?}"
    );
    ensure!(a.peer_number == 601 && !a.in_error && !a.posts_unseen, "{a:?}");
    ensure!(
        described(&b) == ("mlx5_7".into(), 2, "UC".into(), "lid 4711".into()),
        "{b:?}"
    );
    ensure!(b.peer_number == 602, "{b:?}");
    ensure!(
        described(&c) == ("mlx5_7".into(), 0, "UD".into(), String::new()),
        "{c:?}"
    );
    ensure!(
        facts(&tracer).all(|pair| pair.pid == pid),
        "of a process that is not traced"
    );
    ensure!(
        tracer.unwatched.is_empty() && tracer.lost() == 0,
        "{:?}",
        tracer.unwatched
    );
    Ok(())
}

#[test]
fn numbers_used_again_other_ways_to_post_and_events_are_told_apart() -> Result<()> {
    if !privileged("numbers_used_again_other_ways_to_post_and_events_are_told_apart") {
        return Ok(());
    }
    let stand = Stand::build(true)?;
    let (mut puppet, mut tracer) = stand.traced()?;
    let pid = puppet.pid();
    told(&mut puppet, &["open"])?;
    until_watched(&mut tracer, pid)?;
    // The heap gives the same address again, too.
    for peer in ["701", "702", "703"] {
        told(
            &mut puppet,
            &[
                "make 0 55 2",
                &format!("join 0 {peer} 1 0"),
                "post 0 4 1 25",
                "unmake 0",
            ],
        )?;
    }
    told(
        &mut puppet,
        &[
            "make 1 56 2",
            "join 1 61 4 0",
            "extend 1",
            "make 2 57 2",
            "join 2 58 3 0",
            "event 3 2 0",
            "event 10 -1 2",
            "event 8 -1 0",
        ],
    )?;
    tracer.drain(std::time::Duration::from_millis(100))?;
    // Two of each function, by the sizes that the program gives them.
    told(&mut puppet, &["parts 1", "parts 1"])?;
    tracer.drain_until(|tracer| sum(tracer, pid, 56).is_some_and(|pair| pair.posts >= 10))?;
    let extended = sum(&tracer, pid, 56).context("nothing of the extended one")?;
    ensure!(
        counted(&extended) == (10, 2 * (1_000 + (10 + 20) + 300 + (7 + 8 + 9) + 4 * 5), 2),
        "{extended:?}"
    );
    ensure!(extended.peer_number == 61, "{extended:?}");
    tracer.drain_until(|tracer| {
        sum(tracer, pid, 55).is_some_and(|pair| pair.posts >= 12) && sum(tracer, pid, 57).is_some()
    })?;
    let mut by_peer = BTreeMap::new();
    for pair in facts(&tracer).filter(|pair| pair.number == 55 && pair.posts > 0) {
        *by_peer.entry(pair.peer_number).or_insert(0) += pair.posted_bytes;
    }
    ensure!(
        by_peer == BTreeMap::from([(701, 100), (702, 100), (703, 100)]),
        "{by_peer:?}"
    );
    let broken = sum(&tracer, pid, 57).context("nothing of the broken one")?;
    ensure!(
        broken.in_error && !broken.posts_unseen,
        "an access error ends it: {broken:?}"
    );
    let events: Vec<_> = tracer
        .observations
        .iter()
        .filter_map(|observation| match &observation.fact {
            Fact::Hardware(facts) => match &facts.fact {
                HardwareFact::Event(event) => Some(event.kind.clone()),
                _ => None,
            },
            _ => None,
        })
        .collect();
    let verbs = |event, element| DeviceEventKind::Verbs {
        device: "mlx5_7".to_owned(),
        event,
        element,
    };
    ensure!(events == [verbs(3, 57), verbs(10, 2), verbs(8, 0)], "{events:?}");
    Ok(())
}

#[test]
fn queue_pairs_older_than_the_agent_are_found_when_they_are_posted_to() -> Result<()> {
    if !privileged("queue_pairs_older_than_the_agent_are_found_when_they_are_posted_to") {
        return Ok(());
    }
    let stand = Stand::build(false)?;
    let mut puppet = stand.start()?;
    told(
        &mut puppet,
        &["open", "make 0 81 2", "join 0 82 1 0", "post 0 1 1 999"],
    )?;
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    stand.attach(&mut tracer, &puppet)?;
    let pid = puppet.pid();
    tracer.trace(pid)?;
    ensure!(
        tracer.probes.look_for_posts(pid)? == 1,
        "the provider names what posts"
    );
    told(&mut puppet, &["post 0 2 1 50", "post 0 1 2 5"])?;
    tracer.drain_until(|tracer| sum(tracer, pid, 81).is_some_and(|pair| pair.posts >= 3))?;
    let pair = sum(&tracer, pid, 81).context("nothing of it")?;
    ensure!(counted(&pair) == (3, 110, 0), "{pair:?}");
    ensure!(
        pair.peer.is_empty() && pair.peer_number == 0,
        "nobody saw it join: {pair:?}"
    );
    ensure!(
        pair.device == "mlx5_7" && pair.transport == "RC" && !pair.posts_unseen,
        "{pair:?}"
    );

    tracer.probes.forget_process(pid);
    tracer.trace(pid)?;
    ensure!(
        tracer.probes.look_for_posts(pid)? == 1,
        "it was detached, and is attached again once"
    );
    told(&mut puppet, &["post 0 1 1 7"])?;
    tracer.drain_until(|tracer| sum(tracer, pid, 81).is_some_and(|pair| pair.posts >= 4))?;
    let pair = sum(&tracer, pid, 81).context("nothing of it")?;
    ensure!(counted(&pair) == (4, 117, 0), "{pair:?}");
    Ok(())
}

#[test]
fn contexts_that_lead_astray_are_named_and_nothing_is_probed_there() -> Result<()> {
    if !privileged("contexts_that_lead_astray_are_named_and_nothing_is_probed_there") {
        return Ok(());
    }
    let stand = Stand::build(true)?;
    let (mut puppet, mut tracer) = stand.traced()?;
    let pid = puppet.pid();
    told(
        &mut puppet,
        &["open", "nowhere", "anonymous", "elsewhere", "inside"],
    )?;
    tracer.drain_until(|tracer| tracer.unwatched.len() >= 3)?;
    let [anonymous, elsewhere, inside] = &tracer.unwatched[..] else {
        anyhow::bail!("{:?}", tracer.unwatched);
    };
    ensure!(anonymous.contains("no code of a file"), "{anonymous}");
    ensure!(
        elsewhere.contains("libc") && elsewhere.contains("no provider"),
        "{elsewhere}"
    );
    ensure!(
        inside.contains("mlx5") && inside.contains("no function"),
        "{inside}"
    );

    // A queue pair that is no memory, requests that are none; the right one goes on.
    told(&mut puppet, &["make 0 31 2", "freed 0", "post 0 1 1 100"])?;
    tracer.drain_until(|tracer| sum(tracer, pid, 31).is_some_and(|pair| pair.posts >= 2))?;
    let pair = sum(&tracer, pid, 31).context("nothing of it")?;
    ensure!(counted(&pair) == (2, 100, 1), "{pair:?}");
    ensure!(tracer.lost() == 1, "the one without memory: {}", tracer.lost());

    let address = tracer
        .events
        .iter()
        .find_map(|event| match event {
            ProcessEvent::PostsThrough { address, .. } => Some(*address),
            _ => None,
        })
        .context("no address")?;
    drop(puppet);
    let late = tracer.probes.watch_posts(pid, address + 2, 0);
    ensure!(
        matches!(late, Err(PostsError::Maps { .. } | PostsError::NoFile { .. })),
        "it died meanwhile: {late:?}"
    );
    Ok(())
}

#[test]
fn thousands_of_queue_pairs_are_bounded_and_those_without_room_counted() -> Result<()> {
    if !privileged("thousands_of_queue_pairs_are_bounded_and_those_without_room_counted") {
        return Ok(());
    }
    let stand = Stand::build(true)?;
    let (mut puppet, mut tracer) = stand.traced()?;
    let pid = puppet.pid();
    told(&mut puppet, &["open"])?;
    until_watched(&mut tracer, pid)?;
    told(&mut puppet, &[&format!("many {TOO_MANY}")])?;
    let lost = tracer.lost();
    ensure!((1..TOO_MANY as u64).contains(&lost), "{lost}");
    tracer.drain_until(|tracer| facts(tracer).count() as u64 >= TOO_MANY as u64 - lost)?;

    // Those of a process that is gone make room.
    puppet.ended()?;
    tracer.drain_until(|tracer| {
        let gone = |event: &ProcessEvent| *event == ProcessEvent::Exit { tgid: pid };
        tracer.events.iter().any(gone)
    })?;
    tracer.probes.forget_process(pid);
    let mut next = stand.start()?;
    let next_pid = next.pid();
    tracer.trace(next_pid)?;
    tracer.events.clear();
    told(&mut next, &["open", "make 0 41 2"])?;
    until_watched(&mut tracer, next_pid)?;
    std::thread::sleep(std::time::Duration::from_millis(2_100));
    tracer.drain(std::time::Duration::ZERO)?;
    told(&mut next, &["make 1 42 2", "post 1 1 1 8"])?;
    tracer.drain_until(|tracer| sum(tracer, next_pid, 42).is_some_and(|pair| pair.posts == 1))?;
    Ok(())
}

#[test]
fn offsets_are_those_of_the_header() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let known = [
        ("struct ibv_qp", "context", offset::CONTEXT),
        ("struct ibv_pd", "context", offset::CONTEXT),
        ("struct ibv_qp", "qp_num", offset::QP_NUM),
        ("struct ibv_qp", "qp_type", offset::QP_TYPE),
        ("struct ibv_context", "device", offset::DEVICE),
        ("struct ibv_context", "ops.post_send", offset::POST_SEND),
        ("struct ibv_device", "name", offset::DEVICE_NAME),
        ("struct ibv_qp_ex", "wr_set_inline_data", offset::EXTENDED_SETTERS),
        (
            "struct ibv_qp_ex",
            "wr_set_inline_data_list",
            offset::EXTENDED_SETTERS + 8,
        ),
        ("struct ibv_qp_ex", "wr_set_sge", offset::EXTENDED_SETTERS + 16),
        (
            "struct ibv_qp_ex",
            "wr_set_sge_list",
            offset::EXTENDED_SETTERS + 24,
        ),
        ("struct ibv_send_wr", "next", offset::WR_NEXT),
        ("struct ibv_send_wr", "sg_list", offset::WR_SGES),
        ("struct ibv_send_wr", "num_sge", offset::WR_SGE_COUNT),
        ("struct ibv_sge", "length", offset::SGE_LENGTH),
        ("struct ibv_qp_attr", "qp_state", offset::ATTR_STATE),
        ("struct ibv_qp_attr", "dest_qp_num", offset::ATTR_PEER_NUMBER),
        ("struct ibv_qp_attr", "ah_attr.grh.dgid", offset::ATTR_ADDRESS),
        ("struct ibv_qp_attr", "ah_attr.dlid", offset::ATTR_PEER_LID),
        ("struct ibv_qp_attr", "ah_attr.is_global", offset::ATTR_IS_GLOBAL),
        ("struct ibv_qp_attr", "port_num", offset::ATTR_PORT),
        ("struct ibv_async_event", "event_type", offset::EVENT_TYPE),
    ];
    let mut source = String::from("#include <infiniband/verbs.h>\n#include <stddef.h>\n");
    for (structure, field, at) in known {
        writeln!(
            source,
            "_Static_assert(offsetof({structure}, {field}) == {at}, \"{structure} {field}\");"
        )?;
    }
    let size = offset::SGE_BYTES;
    writeln!(
        source,
        "_Static_assert(sizeof(struct ibv_sge) == {size}, \"ibv_sge\");"
    )?;
    let file = folder.path().join("offsets.c");
    fs::write(&file, source)?;
    let said = Command::new("cc")
        .args(["-fsyntax-only", "-Wall"])
        .arg(&file)
        .output()?;
    ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    Ok(())
}

#[test]
fn the_real_library_has_every_function() -> Result<()> {
    if !privileged("the_real_library_has_every_function") {
        return Ok(());
    }
    let library = Path::new("/usr/lib/x86_64-linux-gnu/libibverbs.so.1");
    if !library.exists() {
        println!("skipped: the_real_library_has_every_function: libibverbs1 is not installed");
        return Ok(());
    }
    let mut tracer = Tracer::load(ProbesConfig::default())?;
    let attached = tracer.attach(LibraryKind::Verbs, library, std::process::id())?;
    // The last came with version 34 of the library.
    ensure!(
        attached.failed.is_empty() && attached.absent.is_empty(),
        "{attached:?}"
    );
    Ok(())
}
