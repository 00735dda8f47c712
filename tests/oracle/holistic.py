"""What HolisticTraceAnalysis makes of traces: one JSON object, by file, of its temporal breakdown in microseconds.

Usage: holistic.py TRACE.json.gz ...
"""

import json
import logging
import sys
import warnings


def breakdown(path):
    """Idle, compute and other time of the one rank in the file, last profiler step included."""
    from hta.trace_analysis import TraceAnalysis

    # The rank is only a key here; the trace's own header is not asked.
    analysis = TraceAnalysis(trace_files={0: path}, trace_dir="", include_last_profiler_step=True)
    row = analysis.get_temporal_breakdown(visualize=False).iloc[0]
    times = {name: row[f"{name}_time(us)"] for name in ("idle", "compute", "non_compute", "kernel")}
    assert all(time == int(time) for time in times.values()), f"{path} has parts of microseconds: {times}"
    return {name: int(time) for name, time in times.items()}


def main():
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    print(json.dumps({path: breakdown(path) for path in sys.argv[1:]}))


if __name__ == "__main__":
    main()
