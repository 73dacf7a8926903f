"""Pallas TPU kernel: packed weights stream through VMEM once, and their dequantized form never leaves it.

Inputs of each scale have a separate product, which is then multiplied by the scale. This is cheaper than multiplying the
codes, because there are few rows. A product takes whole registers of 128 lanes. Narrower groups share one: the rows are
then used once for each group of a register, with zeros in place of the other groups' inputs.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int8

from kernels_pallas import dispatch
from kernels_pallas.manual_axes import result_type, varying_axes
from kernels_pallas.packed_codes import VMEM_BUDGET, VMEM_LIMIT, inputs_of_planes, planes_of_tile
from kernels_pallas.quantized_matmul.reference import finish

_LANES = 128
MAX_ROWS = 128


def why_not(x: Any, weight: Any, groups: int, bits: int) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    if reason := dispatch.small_vmem():
        return reason
    (rows, d_in), width = x.shape, weight.shape[1]
    if rows > MAX_ROWS:
        return f"x has {rows} rows, and the kernel supports at most {MAX_ROWS}"
    if groups > 1:
        size = d_in // groups
        if size % _LANES and _LANES % size:
            return f"groups of {size} inputs neither divide {_LANES} nor are a multiple of it"
        if width % size:
            return f"groups of {size} inputs do not divide the {width} inputs of a plane"
    if _outputs(rows, width, groups, bits, x.dtype.itemsize) is None:
        return f"d_in={d_in} leaves no room for a tile in VMEM"
    return None


def _outputs(rows: int, width: int, groups: int, bits: int, itemsize: int) -> int | None:
    """Return the maximum number of outputs per tile that fit in VMEM."""
    planes = 8 // bits
    chunk, shares, padded = _chunks(rows, width, groups, bits, itemsize)
    wide = pl.cdiv(width, chunk) * chunk
    inputs = 2 * planes * shares * padded * wide * itemsize
    for outputs in (512, 256, 128):
        weights = 2 * outputs * wide
        codes = outputs * chunk * (4 + 2 * planes + 2 * (4 + itemsize))  # words, codes, floats
        scales = 2 * 2 * 4 * outputs * groups
        results = 4 * 4 * shares * padded * outputs
        if inputs + weights + codes + scales + results <= VMEM_BUDGET:
            return outputs
    return None


def _chunks(rows: int, width: int, groups: int, bits: int, itemsize: int) -> tuple[int, int, int]:
    """Return the bytes of a row in one product, the number of groups that share it, and rows as whole registers."""
    size = width * (8 // bits) // groups
    padded = pl.cdiv(rows, 32 // itemsize) * (32 // itemsize)
    if groups == 1:
        return pl.cdiv(width, _LANES) * _LANES, 1, padded
    return max(size, _LANES), max(1, _LANES // size), padded


def _kernel(
    x_ref, weight_ref, scale_ref, *more, bits, width, chunk, shares, with_zero, activation
) -> None:
    """Run the kernel; ``more`` is the zero points and the bias, if present, and the result."""
    *rest, out_ref = more
    zero_ref = rest.pop(0) if with_zero else None
    bias = rest[0][...] if rest else None
    planes, rows, wide = x_ref.shape
    groups, dtype = scale_ref.shape[0], x_ref.dtype
    size = width * planes // groups
    precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None

    def some_bytes(step, total):
        where = pl.ds(pl.multiple_of(step * chunk, _LANES), chunk)
        for plane, codes in enumerate(planes_of_tile(weight_ref[:, where], bits)):
            inputs = _shared_out(x_ref[plane, :, where], size, shares, width - step * chunk)
            products = jax.lax.dot_general(
                inputs.astype(dtype),
                codes.astype(jnp.float32).astype(dtype),
                (((1,), (1,)), ((), ())),
                preferred_element_type=jnp.float32,
                precision=precision,
            )
            for share in range(shares):
                own = slice(share * rows, (share + 1) * rows)
                # Positions past the last group have zeros as inputs.
                group = jax.lax.div(plane * width + step * chunk, size) + share
                group = pl.ds(jnp.minimum(group, groups - 1), 1)
                total += products[own] * scale_ref[group, :]
                if zero_ref is not None:
                    sums = jnp.sum(inputs[own], axis=1, keepdims=True)
                    total += sums * zero_ref[group, :]
        return total

    total = jnp.zeros(out_ref.shape, jnp.float32)
    total = jax.lax.fori_loop(0, wide // chunk, some_bytes, total)
    out_ref[...] = finish(total, bias, activation).astype(out_ref.dtype)


def _shared_out(x: Array, size: int, shares: int, valid: Any) -> Array:
    """Return the inputs of a chunk in float32, repeated for each group that shares it, with only that group's; ``valid`` are real."""
    x = x.astype(jnp.float32)
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    x = jnp.where(lane < valid, x, 0.0)
    if shares == 1:
        return x
    first = [share * size for share in range(shares)]
    own = [jnp.where((lane >= start) & (lane < start + size), x, 0.0) for start in first]
    return jnp.concatenate(own, axis=0)


def packed_matmul(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, "groups d_out"],
    zero: Float[Array, "groups d_out"] | None,
    bias: Float[Array, " d_out"] | None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
    interpret: Any = False,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.packed_matmul``; ``interpret`` as in ``pl.pallas_call``."""
    rows, (d_out, width), groups = x.shape[0], weight.shape, scale.shape[0]
    planes, itemsize = 8 // bits, x.dtype.itemsize
    chunk, shares, padded = _chunks(rows, width, groups, bits, itemsize)
    outputs = _outputs(rows, width, groups, bits, itemsize)
    assert outputs is not None, "why_not rejects such widths"
    wide = pl.cdiv(width, chunk) * chunk
    of_groups = pl.BlockSpec((groups, outputs), lambda j: (0, j))
    row = pl.BlockSpec((1, outputs), lambda j: (0, j))
    zeros, biases = ([] if a is None else [a] for a in (zero, bias))
    kernel = functools.partial(
        _kernel,
        bits=bits,
        width=width,
        chunk=chunk,
        shares=shares,
        with_zero=zero is not None,
        activation=activation,
    )
    return pl.pallas_call(
        kernel,
        grid=(pl.cdiv(d_out, outputs),),
        in_specs=[
            pl.BlockSpec((planes, padded, wide), lambda j: (0, 0, 0)),
            pl.BlockSpec((outputs, wide), lambda j: (j, 0)),
            of_groups,
            *(of_groups for _ in zeros),
            *(row for _ in biases),
        ],
        out_specs=pl.BlockSpec((padded, outputs), lambda j: (0, j)),
        out_shape=result_type((rows, d_out), x.dtype, varying_axes(x, weight, scale, zero, bias)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * shares * x.size * d_out,
            transcendentals=0,
            bytes_accessed=weight.size
            + 4 * scale.size * (1 + len(zeros))
            + (x.size + rows * d_out) * itemsize,
        ),
        interpret=interpret,
    )(
        inputs_of_planes(x, weight),
        weight,
        scale,
        *zeros,
        *(bias[None] for bias in biases),
    )
