"""Time both sides of the 1-bit exchange, compared with a copy of the same bytes, which is a lower bound.

    python benchmarks/sign_compress.py

Candidates take turns in one process. The copy reads and writes the same number of bytes as the operands and results
of the op, in float32 arrays.
"""

import functools
import statistics
import time

import harness
import jax
import jax.numpy as jnp

from benchmarks.kernels.sign_compress import Shape, with_tag
from kernels_pallas import sign_compress

REPEATS = 15


def contestants(shape: Shape) -> dict:
    """Return functions without arguments that return when their arrays are ready."""
    key = jax.random.key(0)
    compressed, averaged = shape.compressed(key), shape.averaged(key)
    compress = jax.jit(functools.partial(sign_compress.compress, size=shape.size))
    average = jax.jit(sign_compress.average)
    copy = jax.jit(lambda x: x + 1.0)
    found = {
        "compress": lambda: jax.block_until_ready(compress(*compressed)),
        "average": lambda: jax.block_until_ready(average(*averaged)),
    }
    for name, moved in zip(list(found), shape.moved(), strict=True):
        x = jnp.zeros(moved // 8)  # four bytes are read and four are written for each
        found[f"copy of {name}"] = functools.partial(lambda x: jax.block_until_ready(copy(x)), x)
    return found


def main() -> None:
    """Print a table."""
    rows = [("shape", "op", "ms", "of a copy", "GB/s")]
    for shape in with_tag("bench"):
        functions = contestants(shape)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(REPEATS + 2):
            for name, function in functions.items():
                began = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values[2:]) for name, values in times.items()}
        for name, moved in zip(("compress", "average"), shape.moved(), strict=True):
            seconds = medians[name]
            ratio = seconds / medians[f"copy of {name}"]
            rows.append(
                (
                    shape.name,
                    name,
                    f"{1e3 * seconds:.1f}",
                    f"{ratio:.2f}",
                    f"{moved / seconds / 1e9:.1f}",
                )
            )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(harness.table(rows))


if __name__ == "__main__":
    main()
