"""The 64-GPU job with one slow worker: its operator spans, and what its slowness cost by replaying the pipeline.

Usage: straggler.py spans TRACE.parquet STEPS   one line per operator of the first STEPS steps, ns from the step's begin
       straggler.py what-if TRACE.parquet STEPS slowdown and share of the slowest worker, and what each worker alone is
                                                to blame for in the first STEPS steps, as JSON

The replay knows the order of micro-batches on each stage, which stage waits for which, and who meets in the collectives
before and after: it shares no code with the product, and none with the simulator whose results were published with the
trace. Like that one it takes as ideal the mean of compute and the median of communication after the last had come.
"""

import json
import sys

import pandas as pd

FORWARD, BACKWARD = "forward-compute", "backward-compute"


def load(path):
    frame = pd.read_parquet(path)
    frame["optype"] = frame["optype"].astype(str)
    return frame


def spans(path, steps):
    frame = load(path)
    kept = sorted(frame["step"].unique())[:steps]
    for row in frame[frame["step"].isin(kept)].sort_values(["step", "rank", "start_ts"]).itertuples():
        start_ns, length_ns = round(row.start_ts * 1e9), round(row.duration * 1e9)
        print(f"{row.step},{row.rank},{row.dp_rank},{row.stage},{row.optype},{start_ns},{length_ns}")


def pipeline(order, seconds, hop, begin):
    """When each stage of one pipeline is done: `order[stage]` lists (operator, micro-batch), `begin` its first moment."""
    done, clock, position = {}, list(begin), [0] * len(order)
    while any(at < len(operators) for at, operators in zip(position, order)):
        for stage, operators in enumerate(order):
            while position[stage] < len(operators):
                operator, batch = key = operators[position[stage]]
                other = stage - 1 if operator == FORWARD else stage + 1
                ready = 0.0
                if 0 <= other < len(order):
                    if (operator, batch, other) not in done:
                        break
                    ready = done[operator, batch, other] + hop
                clock[stage] = max(clock[stage], ready) + seconds[stage][key]
                done[operator, batch, stage] = clock[stage]
                position[stage] += 1
    return clock


# What surrounds the pipeline, in order, with the workers that meet in it: (operator, columns equal on all of them).
BEFORE = [("params-all-gather", ["step", "stage"])]
AFTER = [
    ("layernorm-grads-all-reduce", None),
    ("embedding-grads-all-reduce", ["step", "dp_rank"]),
    ("grads-reduce-scatter", ["step", "stage"]),
    ("optimizer-clip-main-grad", ["step"]),
    ("optimizer", None),
]


def around(frame, operator, meets):
    """What an operator took by (step, dp, stage) after its last worker had come; and the median of that."""
    rows = frame[frame["optype"] == operator].copy()
    begun = rows["start_ts"] if meets is None else rows.groupby(meets)["start_ts"].transform("max")
    rows["took"] = (rows["start_ts"] + rows["duration"] - begun).clip(lower=0.0)
    return rows.set_index(["step", "dp_rank", "stage"])["took"].to_dict(), float(rows["took"].median())


def meet(clock, took, columns):
    """Clocks by (dp, stage) after an operator that starts when the last of its workers has come."""
    key = {None: lambda dp, stage: (dp, stage), "dp_rank": lambda dp, _: dp, "stage": lambda _, stage: stage}.get(
        None if columns is None else columns[-1], lambda dp, stage: 0
    )
    last = {}
    for worker in took:
        last[key(*worker)] = max(last.get(key(*worker), 0.0), clock[worker])
    return {worker: last[key(*worker)] + took[worker] if worker in took else at for worker, at in clock.items()}


def what_if(path, steps):
    frame = load(path)
    p2p = frame[frame["optype"].str.endswith(("-send", "-recv"))]
    # The shortest of them waited for nobody: the price of a hop itself.
    hop = float(p2p["duration"].quantile(0.05))
    compute = frame[frame["optype"].isin([FORWARD, BACKWARD])].sort_values("start_ts")
    mean = compute.groupby("optype")["duration"].mean().to_dict()
    by_worker = compute.groupby(["dp_rank", "stage"])["duration"].sum()
    slowest = by_worker.idxmax()
    surroundings = {operator: around(frame, operator, meets) for operator, meets in BEFORE + AFTER}

    pipelines = {}
    for (step, dp, stage), group in compute.groupby(["step", "dp_rank", "stage"]):
        keys = list(zip(group["optype"], group["seq_id"]))
        pipelines.setdefault(step, {}).setdefault(dp, {})[stage] = (keys, dict(zip(keys, group["duration"])))

    def step_seconds(ideal, steps=None):
        """Mean step when the workers that `ideal` picks compute as the mean does and communicate as the median does."""
        ends = []
        for step in sorted(pipelines)[:steps]:
            replicas = pipelines[step]

            def run(clock, operators):
                for operator, columns in operators:
                    own, median = surroundings[operator]
                    took = {
                        (dp, stage): median if ideal(dp, stage) else own[step, dp, stage]
                        for dp, stage in clock
                        if (step, dp, stage) in own
                    }
                    clock = meet(clock, took, columns)
                return clock

            clock = run({(dp, stage): 0.0 for dp, stages in replicas.items() for stage in stages}, BEFORE)
            for dp, stages in replicas.items():
                numbers = sorted(stages)
                seconds = [
                    {key: mean[key[0]] if ideal(dp, stage) else took for key, took in stages[stage][1].items()}
                    for stage in numbers
                ]
                begin = [clock[dp, stage] for stage in numbers]
                done = pipeline([stages[stage][0] for stage in numbers], seconds, hop, begin)
                clock.update({(dp, stage): at for stage, at in zip(numbers, done)})
            ends.append(max(run(clock, AFTER).values()))
        return sum(ends) / len(ends)

    original = step_seconds(lambda dp, stage: False)
    ideal = step_seconds(lambda dp, stage: True)
    mended = step_seconds(lambda dp, stage: (dp, stage) == slowest)
    few = step_seconds(lambda dp, stage: False, steps)
    slowed = few - step_seconds(lambda dp, stage: True, steps)
    ranks = frame.groupby(["dp_rank", "stage"])["rank"].first().to_dict()
    print(
        json.dumps(
            {
                "slowest": [int(part) for part in slowest],
                "slowdown": original / ideal,
                "share_of_slowest": (original - mended) / (original - ideal),
                "share_by_rank": {
                    int(rank): (few - step_seconds(lambda dp, stage: (dp, stage) == worker, steps)) / slowed
                    for worker, rank in ranks.items()
                },
                "mean_seconds": {
                    f"{dp},{stage},{operator}": float(mean)
                    for (dp, stage, operator), mean in compute.groupby(["dp_rank", "stage", "optype"])["duration"]
                    .mean()
                    .items()
                },
            }
        )
    )


def main():
    task, path, *rest = sys.argv[1:]
    if task == "spans":
        spans(path, int(rest[0]))
    else:
        what_if(path, int(rest[0]))


if __name__ == "__main__":
    main()
