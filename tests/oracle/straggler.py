"""The 64-GPU job with one slow worker: its operator spans, and what its slowness cost by replaying the pipeline.

Usage: straggler.py spans TRACE.parquet STEPS   one line per operator of the first STEPS steps, ns from the step's begin
       straggler.py what-if TRACE.parquet       slowdown and share of the slowest worker as JSON

The replay knows the order of micro-batches on each stage and which stage waits for which, nothing else: it shares no
code with the product, and none with the simulator whose results were published with the trace.
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


def pipeline(order, seconds, hop):
    """When the last stage of one pipeline is done: `order[stage]` lists (operator, micro-batch)."""
    done, clock, position = {}, [0.0] * len(order), [0] * len(order)
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
    return max(clock)


def what_if(path):
    frame = load(path)
    p2p = frame[frame["optype"].str.endswith(("-send", "-recv"))]
    # The shortest of them waited for nobody: the price of a hop itself.
    hop = float(p2p["duration"].quantile(0.05))
    compute = frame[frame["optype"].isin([FORWARD, BACKWARD])].sort_values("start_ts")
    mean = compute.groupby("optype")["duration"].mean().to_dict()
    by_worker = compute.groupby(["dp_rank", "stage"])["duration"].sum()
    slowest = by_worker.idxmax()

    pipelines = {}
    for (step, dp, stage), group in compute.groupby(["step", "dp_rank", "stage"]):
        keys = list(zip(group["optype"], group["seq_id"]))
        pipelines.setdefault(step, {}).setdefault(dp, {})[stage] = (keys, dict(zip(keys, group["duration"])))

    def step_seconds(ideal):
        ends = []
        for replicas in pipelines.values():
            step_ends = []
            for dp, stages in replicas.items():
                order = [stages[stage][0] for stage in sorted(stages)]
                seconds = [
                    {key: mean[key[0]] if ideal(dp, stage) else took for key, took in stages[stage][1].items()}
                    for stage in sorted(stages)
                ]
                step_ends.append(pipeline(order, seconds, hop))
            ends.append(max(step_ends))
        return sum(ends) / len(ends)

    original = step_seconds(lambda dp, stage: False)
    ideal = step_seconds(lambda dp, stage: True)
    mended = step_seconds(lambda dp, stage: (dp, stage) == slowest)
    print(
        json.dumps(
            {
                "slowest": [int(part) for part in slowest],
                "slowdown": original / ideal,
                "share_of_slowest": (original - mended) / (original - ideal),
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
        what_if(path)


if __name__ == "__main__":
    main()
