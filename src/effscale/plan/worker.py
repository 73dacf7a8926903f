"""The compilation process: it reads a job as JSON from stdin and writes the results as a line of JSON.

libtpu writes to stderr and takes over the process, so each compilation runs in a separate one.
"""

import json
import math
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from effscale.parallel import collectives, shardings
from effscale.parallel.program_text import lines, times
from effscale.plan.cases import Case
from effscale.plan.machines import machine
from effscale.plan.steps import lower
from effscale.study.command import out_of_device_memory
from effscale.training.saved import config_from_json

MARK = "effscale.scale "
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KERNEL = re.compile(r'custom_call_target="tpu_custom_call"')


def compile_case(case: Case) -> dict[str, Any]:
    """Compile a program and read the compiler's figures; sizes are in bytes per chip. For a program that needs too much memory, return
    ``refused`` with the compiler's message.
    """
    where = machine(case.topology)
    mesh = case.mesh.build(where.target.devices()[: where.count])
    began = time.perf_counter()
    program = lower(case, mesh)
    traced, busy = time.perf_counter(), time.process_time()
    try:
        compiled = program.lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if not out_of_device_memory(error):
            raise
        return {"refused": str(error).splitlines()[0]}
    done, worked = time.perf_counter(), time.process_time() - busy
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None  # all compilers used here report both
    assert text is not None
    costs = compiled.cost_analysis() or {}
    return {
        "trace_seconds": traced - began,
        "compile_seconds": done - traced,
        "processor_seconds": worked,
        **{name: _bytes(tree, mesh) for name, tree in program.parts.items()},
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "total": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "operations": costs.get("flops"),
        "accessed": costs.get("bytes accessed"),
        "collectives": _traffic(text, mesh.shape),
        **_work(text),
    }


def _bytes(tree: Any, mesh: jax.sharding.Mesh) -> int:
    """Return the bytes per device of a tree of shapes; shapes without a sharding follow the rules."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh)), strict=True)
    return sum(
        math.prod((x.sharding or sharding).shard_shape(x.shape)) * x.dtype.itemsize
        for x, sharding in leaves
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def _traffic(text: str, mesh: Mapping[str, int]) -> list[dict[str, Any]]:
    """Return the bytes that a chip sends in a step, by kind of collective, mesh axes and branch (the number of the innermost ``lax.cond`` or
    ``lax.switch`` branch around it, or None).
    """
    found: dict[tuple[str, tuple[str, ...], int], list[float]] = {}
    for collective in collectives(text):
        axes, branches = collective.axes(mesh), collective.branches
        if not axes:  # a group of one device
            continue
        row = found.setdefault((collective.kind, axes, branches[-1] if branches else -1), [0, 0.0])
        row[0] += collective.times
        row[1] += collective.times * collective.sent
    return [
        {
            "kind": kind,
            "axes": list(axes),
            "branch": None if branch < 0 else branch,
            "times": count,
            "sent": sent,
        }
        for (kind, axes, branch), (count, sent) in sorted(found.items())
    ]


def _work(text: str) -> dict[str, int]:
    """Return the cycles that the compiler expects for its operations, and the number of kernels, which have no expected cycles. Operations in
    loops count as often as they run.
    """
    runs = times(text)
    total = {"cycles": 0, "kernels": 0}
    for computation, line in lines(text):
        count = runs.get(computation, 1)
        if match := _CYCLES.search(line):
            total["cycles"] += count * int(match[1])
        if _KERNEL.search(line):
            total["kernels"] += count
    return total


def main() -> None:
    """Compile the case on stdin."""
    case = config_from_json(Case, json.load(sys.stdin))
    print(MARK + json.dumps(compile_case(case)), flush=True)


if __name__ == "__main__":
    main()
