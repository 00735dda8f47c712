//! Real traces and recordings, damaged in thousands of ways: nothing panics, whatever is accepted sums exactly, and no
//! more records come out than the text can hold.
//!
//! The targets are those of `tests/fuzz`; here they are driven without a fuzzer, always in the same way.

#[path = "../../../tests/fuzz/targets.rs"]
mod targets;

use std::io::Read;
use std::path::Path;

use flate2::read::MultiGzDecoder;
use stallscope::answers::recordings;
use stallscope::observation::{Collective, CollectiveFunction, Fact, ProcessKey, SyncTarget, Thread};
use stallscope::record::{Recorder, Replay};
use stallscope_proto::frame;

use super::path;
use super::straggler::{MS, facts, observation, reading};

/// Values that have broken readers before.
const TOKENS: [&str; 16] = [
    "NaN",
    "-Infinity",
    "-1",
    "0",
    "null",
    "\"",
    "\\",
    "{",
    "}",
    "[[[[[[[[",
    "]",
    "18446744073709551615",
    "9223372036854775807.999",
    "1e308",
    "\u{0}",
    "\"kernel\"",
];
/// Between two events, as Kineto writes them.
const BETWEEN: &str = "
  },
  {";
/// Events of each kind that an excerpt holds.
const EVENTS: usize = 48;

/// Steele and Vigna's splitmix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % bound.max(1) as u64).unwrap_or(0)
    }

    fn range(&mut self, length: usize) -> std::ops::Range<usize> {
        let from = self.below(length);
        let longest = 1 << self.below(11);
        from..(from + 1 + self.below(longest)).min(length)
    }
}

/// One damage: a flipped bit, a cut, a piece doubled, removed or taken from elsewhere, a number or a token replaced.
fn damage(bytes: &mut Vec<u8>, other: &[u8], random: &mut Random) {
    if bytes.is_empty() {
        return;
    }
    let range = random.range(bytes.len());
    match random.below(7) {
        0 => bytes[range.start] ^= 1 << random.below(8),
        1 => bytes.truncate(range.start),
        2 => {
            let piece = bytes[range.clone()].to_vec();
            bytes.splice(range.start..range.start, piece);
        }
        3 => drop(bytes.drain(range)),
        4 => {
            let piece = other[random.range(other.len())].to_vec();
            bytes.splice(range, piece);
        }
        5 => {
            // A number, where one begins nearby: most bytes of a trace are not its times.
            let from = (range.start..bytes.len()).find(|at| bytes[*at].is_ascii_digit());
            let from = from.unwrap_or(range.start);
            let digits = bytes[from..]
                .iter()
                .take_while(|byte| byte.is_ascii_digit())
                .count();
            let token = TOKENS[random.below(TOKENS.len())];
            bytes.splice(from..from + digits, token.bytes());
        }
        _ => {
            let token = TOKENS[random.below(TOKENS.len())];
            bytes.splice(range.start..range.start, token.bytes());
        }
    }
}

fn drive(seeds: &[Vec<u8>], rounds: usize, target: fn(&[u8])) {
    let mut random = Random(20_240_229);
    for round in 0..rounds {
        let mut bytes = seeds[round % seeds.len()].clone();
        let other = &seeds[random.below(seeds.len())];
        for _ in 0..=random.below(4) {
            damage(&mut bytes, other, &mut random);
        }
        let kept = bytes.clone();
        let outcome = std::panic::catch_unwind(|| target(&bytes));
        if let Err(panic) = outcome {
            let file = std::env::temp_dir().join(format!("stallscope-mutation-{round}"));
            std::fs::write(&file, kept).expect("the input kept");
            eprintln!("round {round} panicked; its input is in {}", file.display());
            std::panic::resume_unwind(panic);
        }
    }
}

/// Header, some operators, some kernels and the end of a trace, as its writer wrote them.
fn excerpt(name: &str) -> Vec<u8> {
    let mut text = String::new();
    let file = std::fs::File::open(path(name)).expect("trace");
    MultiGzDecoder::new(file).read_to_string(&mut text).expect("text");
    let events: Vec<&str> = text.split(BETWEEN).collect();
    let kernel = |event: &str| event.contains("\"cat\": \"kernel\"") || event.contains("\"cat\": \"Kernel\"");
    let first = events.iter().position(|event| kernel(event)).expect("a kernel");
    let (operators, kernels) = (&events[..EVENTS.min(first)], &events[first..]);
    let [kernels, end] = [&kernels[..EVENTS], &kernels[kernels.len() - 2..]];
    [operators, kernels, end].concat().join(BETWEEN).into_bytes()
}

#[test]
fn damaged_traces_do_no_harm() {
    let seeds = [
        "kineto-resnet50/workers-0.pt.trace.json.gz",
        "hta/ns_resolution.json.gz",
        "dlrm-8-ranks/worker0.json.gz",
        "mi300/resnet_act_checkpoint.json.gz",
    ];
    let seeds = seeds.map(excerpt);
    for seed in &seeds {
        assert!(targets::trace_records(seed) > 0, "a seed holds GPU records");
    }
    drive(&seeds, 400, targets::trace);
}

/// A small job as an agent records it, and the bodies of its frames.
fn recordings() -> (Vec<u8>, Vec<u8>) {
    let process = ProcessKey {
        pid: 1_000,
        start_ticks: 1,
    };
    let thread = Thread {
        process,
        tid: process.pid,
    };
    let step = |at: u64| {
        let begin = at * 100 * MS;
        let launches = Fact::LaunchRun {
            thread,
            stream: 1,
            kernels: 200,
            graphs: 0,
        };
        let all_reduce = Fact::Collective(Collective {
            thread,
            comm: 1,
            function: CollectiveFunction::AllReduce,
            count: 1 << 20,
            datatype: 9,
            peer: None,
            stream: 2,
            result: Some(0),
        });
        let sync = Fact::Sync {
            thread,
            target: SyncTarget::Context,
            result: 0,
        };
        [
            observation(
                begin,
                begin + 100 * MS,
                Fact::Gpu(Box::new(reading(process.pid, 0, 600_000, 300_000))),
            ),
            observation(begin + MS, begin + 20 * MS, launches),
            observation(begin + 21 * MS, begin + 22 * MS, all_reduce),
            observation(begin + 23 * MS, begin + 80 * MS, sync),
        ]
    };
    let mut log = vec![observation(0, 0, Fact::Process(Box::new(facts(process, 0))))];
    log.extend((1..60).flat_map(step));
    let file = tempfile::NamedTempFile::new().expect("a file");
    let mut recorder = Recorder::create(file.path(), "node0").expect("a recording");
    for batch in log.chunks(16) {
        recorder.write(batch).expect("a batch");
    }
    recorder.finish().expect("a whole recording");
    let framed = std::fs::read(file.path()).expect("the recording");
    let mut decoder = frame::Decoder::default();
    decoder.push(&framed);
    let mut bodies = Vec::new();
    while let Some(body) = decoder.next_body().expect("a frame") {
        let length = u16::try_from(body.len()).expect("a short body");
        bodies.extend_from_slice(&length.to_le_bytes());
        bodies.extend_from_slice(&body);
    }
    (framed, bodies)
}

#[test]
fn damaged_recordings_do_no_harm() {
    let (framed, bodies) = recordings();
    let whole = Replay::new(framed.as_slice(), Path::new("seed")).expect("a recording");
    let document = recordings::document_of(whole).expect("a report");
    assert!(document.jobs[0].gpus[0].steps.count > 0, "the seed holds steps");
    let framed = [framed];
    drive(&framed, 300, targets::recording);
    drive(&framed, 300, targets::frames);
    // What a faulty writer would frame: damage that the checksums do not show.
    drive(&[bodies], 500, targets::bodies);
}
