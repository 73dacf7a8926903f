"""Time products with packed weights, compared with float arrays and with a copy of the bytes that must be read.

    python benchmarks/quantized_matmul.py

Candidates take turns in one process, with the implementation that `None` selects on this machine: kernels on a TPU or
a Hopper GPU, plain jnp elsewhere. `float` is the product of the inputs with a float array of their dtype, including
bias and activation.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import harness
import jax
import jax.numpy as jnp

from benchmarks.kernels import packed_matmul as packed_shapes
from benchmarks.kernels import quantized_matmul as quantized_shapes
from kernels_pallas import packed_matmul, quantized_matmul

REPEATS = 15


def contestants(op: Callable[..., Any], shape: Any) -> dict[str, Callable[[], Any]]:
    """Return functions without arguments that return when their arrays are ready."""
    operands = jax.jit(shape.operands)(jax.random.key(0))
    packed = jax.jit(functools.partial(op, bits=shape.bits, activation=jax.nn.silu))
    dense = jax.random.normal(jax.random.key(1), (shape.d_out, shape.d_in)).astype(shape.dtype)

    @jax.jit
    def of_floats(x, weight, bias):
        y = jnp.einsum("ti,oi->to", x, weight, preferred_element_type=jnp.float32)
        return jax.nn.silu(y + bias[None].astype(jnp.float32)).astype(x.dtype)

    copy = jax.jit(lambda x: x + jnp.ones((), x.dtype))
    moved = jnp.zeros(operands.weight.size // 8)  # four bytes are read and four are written
    return {
        "packed": lambda: jax.block_until_ready(packed(*operands)),
        "float": lambda: jax.block_until_ready(of_floats(operands.x, dense, operands.bias)),
        "copy": lambda: jax.block_until_ready(copy(moved)),
    }


def main() -> None:
    """Print a table."""
    rows = [("op", "shape", "packed us", "x float", "GFLOP/s", "copy of the codes us")]
    cases = [(quantized_matmul, shape) for shape in quantized_shapes.with_tag("bench")]
    cases += [(packed_matmul, shape) for shape in packed_shapes.with_tag("bench")]
    for op, shape in cases:
        functions = contestants(op, shape)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(REPEATS + 2):
            for name, function in functions.items():
                began = time.perf_counter()
                function()
                times[name].append(time.perf_counter() - began)
        medians = {name: statistics.median(values[2:]) for name, values in times.items()}
        operations = 2 * shape.rows * shape.d_in * shape.d_out
        rows.append(
            (
                op.__name__,
                shape.name,
                f"{1e6 * medians['packed']:.0f}",
                f"{medians['float'] / medians['packed']:.2f}",
                f"{operations / medians['packed'] / 1e9:.0f}",
                f"{1e6 * medians['copy']:.0f}",
            )
        )
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(harness.table(rows))


if __name__ == "__main__":
    main()
