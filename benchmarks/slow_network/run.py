"""Seconds and bytes of training on hosts with a slow network between them, uncompressed and with 1-bit compression.

    sudo python benchmarks/slow_network/run.py
    sudo python benchmarks/slow_network/run.py --hosts 2 --rates 200mbit --steps 24 --out figures.json

The schedule has the papers' fractions of warmup: one sixth for 1-bit LAMB (1,000 of 5,993 steps), 23 of 152 for 1-bit
Adam, and 12.5 of 152 for the first stage of 0/1 Adam, whose interval between exchanges doubles every 32.678 of 152.
Optimizers without phases run only part of the steps, because all their steps are alike.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))

import harness
import network

SHARES = {"onebit_lamb": 1000 / 5993, "onebit_adam": 23 / 152, "zero_one_adam": 12.5 / 152}
SCALER = 32.678 / 152
OPTIMIZERS = ("adam", "adam_bfloat16", "onebit_adam", "zero_one_adam", "lamb", "onebit_lamb")


class Hosts:
    """One process per host; all get the same orders."""

    def __init__(self, count: int):
        self.count = count
        script = str(pathlib.Path(__file__).with_name("host.py"))
        self.processes = []
        for i in range(count):
            environment = {
                **os.environ,
                "EFFSCALE_COORDINATOR": f"{network.address(0)}:12355",
                "EFFSCALE_NUM_PROCESSES": str(count),
                "EFFSCALE_PROCESS_ID": str(i),
                "JAX_PLATFORMS": "cpu",
                "TF_CPP_MIN_LOG_LEVEL": "3",
                # With one process per core, more threads per process do not help.
                "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false",
            }
            self.processes.append(
                subprocess.Popen(
                    [*network.inside(i), sys.executable, script],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=environment,
                )
            )

    def order(self, **order: Any) -> dict[str, Any]:
        """Return the answer of host 0, with the seconds of each step from the slowest host."""
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
        answers = []
        for process in self.processes:
            assert process.stdout is not None
            # gloo reports on standard output that it is connected.
            line = next((line for line in process.stdout if line.startswith("{")), None)
            if line is None:
                raise RuntimeError("a host ended; its messages are above")
            answers.append(json.loads(line))
        slowest = [max(step) for step in zip(*(a["seconds"] for a in answers), strict=True)]
        return answers[0] | {"seconds": slowest}

    def close(self) -> None:
        """End all processes."""
        for process in self.processes:
            process.kill()
            process.wait()


def measure(
    count: int, rates: list[str], steps: int, optimizers: list[str]
) -> list[dict[str, Any]]:
    """Return one record for each optimizer and rate."""
    records = []
    with network.hosts(count):
        machines = Hosts(count)
        try:
            for name in optimizers:
                order = {
                    "optimizer": name,
                    "warmup": max(2, round(steps * SHARES.get(name, 0.0))),
                    "scaler": max(1, round(steps * SCALER)),
                }
                machines.order(**order, steps=1)
                for rate in rates:
                    network.limit(count, None if rate == "unlimited" else rate)
                    run = steps if name in SHARES else max(4, steps // 6)
                    answer = machines.order(**order, steps=run)
                    record = summary(answer, steps) | {
                        "hosts": count,
                        "rate": rate,
                        "optimizer": name,
                    }
                    records.append(record)
                    print(json.dumps(record), file=sys.stderr, flush=True)
                network.limit(count, None)
        finally:
            machines.close()
    return records


def summary(answer: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return medians of each phase, identified by the bytes by formula, and of the whole schedule."""
    phases: dict[float, list[int]] = {}
    for i, sent in enumerate(answer["formula"]):
        phases.setdefault(sent, []).append(i)
    # Over the whole run, because part of what a step sends may leave during the next one.
    seen, sent = sum(answer["bytes"]), sum(answer["formula"])
    if not 0.99 * sent <= seen <= 1.1 * sent + 20_000 * len(answer["seconds"]):
        raise RuntimeError(f"a host sent {seen:,.0f} bytes, but the formula predicts {sent:,.0f}")
    # Optimizers with one phase ran only part of the steps.
    scale = steps / len(answer["seconds"])
    return {
        "phases": [
            {
                "formula_bytes": sent,
                "steps": len(where),
                "seconds": statistics.median(answer["seconds"][i] for i in where),
                "bytes": statistics.median(answer["bytes"][i] for i in where),
            }
            for sent, where in sorted(phases.items(), reverse=True)
        ],
        "total_seconds": scale * sum(answer["seconds"]),
        "total_bytes": scale * sum(answer["bytes"]),
        "parameters": answer["parameters"],
        "loss": answer["loss"],
    }


def show(records: list[dict[str, Any]]) -> str:
    """Format the table."""
    rows = [("hosts", "rate", "optimizer", "seconds per step, by phase", "end to end", "MB sent")]
    for r in records:
        phases = ", ".join(f"{p['seconds']:.3f} ({p['steps']})" for p in r["phases"])
        rows.append(
            (
                str(r["hosts"]),
                r["rate"],
                r["optimizer"],
                phases,
                f"{r['total_seconds']:.1f}",
                f"{r['total_bytes'] / 1e6:.1f}",
            )
        )
    lines = [harness.table(rows), ""]
    for hosts, rate in sorted({(r["hosts"], r["rate"]) for r in records}):
        at = {r["optimizer"]: r for r in records if (r["hosts"], r["rate"]) == (hosts, rate)}
        for fast, slow in (
            ("onebit_lamb", "lamb"),
            ("onebit_adam", "adam"),
            ("onebit_adam", "adam_bfloat16"),
            ("zero_one_adam", "onebit_adam"),
        ):
            if fast in at and slow in at:
                time = at[slow]["total_seconds"] / at[fast]["total_seconds"]
                volume = at[slow]["total_bytes"] / at[fast]["total_bytes"]
                lines.append(
                    f"{hosts} hosts, {rate}: {fast} is {time:.2f}x as fast end to end as {slow}, with {volume:.2f}x less volume"
                )
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--hosts", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--rates", nargs="+", default=["100mbit", "200mbit", "1gbit", "unlimited"])
    parser.add_argument("--steps", type=int, default=60, help="number of steps of the schedule")
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--out", type=pathlib.Path, help="a file for the figures, as JSON")
    args = parser.parse_args()
    if reason := network.why_not():
        print(f"slow_network is skipped: {reason}")
        return
    records = [r for n in args.hosts for r in measure(n, args.rates, args.steps, args.optimizers)]
    if args.out:
        args.out.write_text(json.dumps(records, indent=1))
    print(show(records))


if __name__ == "__main__":
    main()
