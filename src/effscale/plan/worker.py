"""The compilation process: it reads a job as JSON from stdin and writes the results as a line of JSON.

libtpu writes to stderr and takes over the process, so each compilation runs in a separate one.
"""

import json
import math
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from effscale.command.line import out_of_device_memory
from effscale.parallel import shardings
from effscale.parallel.machines import machine
from effscale.parallel.program_cost import collective_sums, total_memory, work
from effscale.plan.cases import Case
from effscale.plan.steps import lower
from effscale.training.saved import config_from_json

MARK = "effscale.scale "


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
        "total": total_memory(compiled),
        "operations": costs.get("flops"),
        "accessed": costs.get("bytes accessed"),
        "collectives": collective_sums(text, mesh.shape),
        **work(text),
    }


def _bytes(tree: Any, mesh: jax.sharding.Mesh) -> int:
    """Return the bytes per device of a tree of shapes; shapes without a sharding follow the rules."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh)), strict=True)
    return sum(
        math.prod((x.sharding or sharding).shard_shape(x.shape)) * x.dtype.itemsize
        for x, sharding in leaves
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    )


def main() -> None:
    """Compile the case on stdin."""
    case = config_from_json(Case, json.load(sys.stdin))
    print(MARK + json.dumps(compile_case(case)), flush=True)


if __name__ == "__main__":
    main()
