"""Where the GPU time of traces went, by decimal arithmetic: one JSON object, by file, of integer nanoseconds.

Each instant between the first and the last GPU event is in the first of these that is running: compute, communication
(a kernel named nccl or rccl), a copy or a fill; else it is idle. Usage: sweep.py TRACE.json.gz ...
"""

import gzip
import json
import sys
from decimal import Decimal

RUNNING = {"compute": 0, "exposed_comm": 1, "exposed_memory": 2}


def nanoseconds(microseconds):
    scaled = Decimal(microseconds) * 1000
    assert scaled == int(scaled), f"{microseconds} us has parts of nanoseconds"
    return int(scaled)


def kind(event):
    category = event.get("cat", "").lower()
    # Kineto's names since 2022, and those before.
    if category in ("gpu_memcpy", "gpu_memset", "memcpy", "memset"):
        return "exposed_memory"
    if category != "kernel":
        return None
    name = event["name"].lower()
    return "exposed_comm" if "nccl" in name or "rccl" in name else "compute"


def sweep(path):
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        events = json.load(file, parse_float=str, parse_int=str)["traceEvents"]
    edges = []
    for event in events:
        of = kind(event) if event.get("ph") == "X" else None
        if of:
            begin = nanoseconds(event["ts"])
            edges += [(begin, 1, RUNNING[of]), (begin + nanoseconds(event["dur"]), -1, RUNNING[of])]
    edges.sort()
    running, times = [0, 0, 0], [0, 0, 0, 0]
    for (at, change, of), (until, _, _) in zip(edges, edges[1:] + edges[-1:]):
        running[of] += change
        first = next((kind for kind in range(3) if running[kind]), 3)
        times[first] += until - at
    names = ("compute_ns", "exposed_comm_ns", "exposed_memory_ns", "idle_ns")
    return {"total_ns": edges[-1][0] - edges[0][0], "sweep": dict(zip(names, times))}


def main():
    print(json.dumps({path: sweep(path) for path in sys.argv[1:]}))


if __name__ == "__main__":
    main()
