"""Hopper GPUs: a Mosaic GPU kernel that dequantizes in registers on the way to the matrix units.

The product is transposed: a warpgroup computes 64 outputs, whose codes are the left operand, and the few rows of the
inputs are the right one.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8

from kernels_pallas.manual_axes import result_type, varying_axes
from kernels_pallas.packed_codes import unpack_planes
from kernels_pallas.quantized_matmul.gpu import load_vector
from kernels_pallas.quantized_matmul.reference import finish

_OUTPUTS = 64
# Bytes of a weight's row per step, and inputs of each plane: 128 bytes of bfloat16, which one copy swizzles.
_CHUNK = 64
_TILED = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_STAGES = 4
MAX_ROWS = 64


def why_not(x: Any, weight: Any, groups: int, bits: int) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    (rows, d_in), (d_out, width) = x.shape, weight.shape
    if x.dtype != jnp.bfloat16:
        return f"x is {x.dtype}, and the kernel supports bfloat16"
    if rows > MAX_ROWS:
        return f"x has {rows} rows, and the kernel supports at most {MAX_ROWS}"
    if width % _CHUNK or d_out % (2 * _OUTPUTS):
        return f"weight {weight.shape} must have multiples of {2 * _OUTPUTS} outputs and of {_CHUNK} bytes"
    if groups > 1 and (d_in // groups) % _CHUNK:
        return f"groups of {d_in // groups} inputs are not a multiple of {_CHUNK}"
    return None


def _kernel(x, weight, scale, *more, bits: int, with_zero: bool, activation: Any) -> None:
    """Run the kernel; ``more`` is the zero points with the inputs' sums and the bias, if present, the result, and shared memory."""
    *rest, out, codes_smem, out_smem = more
    zero, input_sums = (rest.pop(0), rest.pop(0)) if with_zero else (None, None)
    planes, rows, width = x.shape
    groups = scale.shape[0]
    size = width * planes // groups
    output = pl.ds(jax.lax.axis_index("outputs") * 2 * _OUTPUTS, 2 * _OUTPUTS)
    group = jax.lax.axis_index("group")
    own = pl.ds(group * _OUTPUTS, _OUTPUTS)
    shape = (_OUTPUTS, rows)

    def of_outputs(ref):
        loaded = load_vector(ref.at[output].at[own], plgpu.Layout.WGMMA.reduce(1))
        return jax.lax.broadcast_in_dim(loaded.astype(jnp.float32), shape, (0,))

    def of_rows(ref):
        loaded = load_vector(ref, plgpu.Layout.WGMMA.reduce(0))
        return jax.lax.broadcast_in_dim(loaded, shape, (1,))

    def multiply(indices, x_smem, weight_smem, total):
        (step,) = indices
        packed = weight_smem[own].astype(jnp.int32)
        for plane, codes in enumerate(unpack_planes(packed, bits)):
            codes_smem[group] = codes.astype(jnp.float32).astype(x.dtype)
            plgpu.commit_smem()

            def product(sums, plane=plane):
                inputs = x_smem.at[plane].transpose((1, 0))
                plgpu.wgmma(sums, codes_smem.at[group], inputs)
                plgpu.wgmma_wait(0)
                return sums[...]

            part = pl.run_scoped(product, plgpu.ACC(shape, jnp.float32))
            which = jax.lax.div(plane * width + step * _CHUNK, size)
            total = total + part * of_outputs(scale.at[which])
            if zero is not None and input_sums is not None:
                total += of_outputs(zero.at[which]) * of_rows(input_sums.at[plane, step])
        return total

    def compute(run):
        start = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
        y = run(start)
        if rest:
            y = y + of_outputs(rest[0])
        out_smem[group] = finish(y, None, activation).astype(out.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem.at[group], out.at[output].at[own])
        plgpu.wait_smem_to_gmem(0)

    pipeline = plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(width // _CHUNK,),
        memory_registers=40,
        in_specs=[
            plgpu.BlockSpec(
                (planes, rows, _CHUNK),
                lambda step: (0, 0, step),
                transforms=_TILED,
                memory_space=plgpu.SMEM,
            ),
            plgpu.BlockSpec(
                (2 * _OUTPUTS, _CHUNK),
                lambda step: (0, step),
                transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(64)),
                memory_space=plgpu.SMEM,
            ),
        ],
        wg_axis="group",
        num_compute_wgs=2,
        max_concurrent_steps=min(_STAGES, width // _CHUNK),
        compute_context=compute,
    )
    pipeline(x, weight.at[output])


def packed_matmul(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, "groups d_out"],
    zero: Float[Array, "groups d_out"] | None,
    bias: Float[Array, " d_out"] | None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
    interpret: Any = None,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.packed_matmul``; ``interpret`` as in ``plgpu.kernel``."""
    rows, (d_out, width) = x.shape[0], weight.shape
    padded = jnp.pad(x, ((0, -rows % 8), (0, 0)))
    planes = padded.reshape(-1, 8 // bits, width).transpose(1, 0, 2)
    input_sums = planes.reshape(*planes.shape[:2], -1, _CHUNK).sum(3, dtype=jnp.float32)
    zeros = [] if zero is None else [zero, input_sums.transpose(0, 2, 1)]
    biases = [] if bias is None else [bias]
    out = plgpu.kernel(
        functools.partial(_kernel, bits=bits, with_zero=zero is not None, activation=activation),
        out_type=result_type(
            (d_out, planes.shape[1]), x.dtype, varying_axes(x, weight, scale, zero, bias)
        ),
        grid=(d_out // (2 * _OUTPUTS),),
        grid_names=("outputs",),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM((2, _OUTPUTS, _CHUNK), x.dtype, transforms=_TILED),
            plgpu.SMEM((2, _OUTPUTS, planes.shape[1]), x.dtype),
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(planes, weight, scale, *zeros, *biases)
    return out.T[:rows]
