"""Hopper GPUs: a Mosaic GPU kernel of 8-bit products, followed by scales, bias and activation.

XLA quantizes the rows and fuses this with the computation that makes them. Two warpgroups each multiply one tile of rows, in
registers, by the weights of the same outputs, which a third warpgroup loads.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int8, Int32

from kernels_pallas.manual_axes import result_type, varying_axes
from kernels_pallas.quantized_matmul.reference import finish, quantize_rows

# Sizes of one warpgroup: 64 rows and 128 outputs; and the 128 bytes of a row that one copy swizzles.
_ROWS, _OUTPUTS, _BYTES = 64, 128, 128
_STAGES = 4


def why_not(x: Any, weight: Any, bits: int) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    (d_out, d_in), dtype = weight.shape, x.dtype
    if bits != 8:
        return f"weights have {bits} bits, and the kernel supports 8"
    if d_in % _BYTES or d_out % _OUTPUTS:
        return (
            f"weight {weight.shape} must have multiples of {_OUTPUTS} outputs and {_BYTES} inputs"
        )
    if dtype not in (jnp.float32, jnp.bfloat16):
        return f"x is {dtype}, and the kernel supports float32 and bfloat16"
    return None


def load_vector(ref: Any, layout: Any) -> Any:
    """Load a vector from global memory, by plain loads."""
    # Before jax 0.12, there is an index argument.
    index = {"idx": ()} if "idx" in inspect.signature(plgpu.load).parameters else {}
    return plgpu.load(ref, **index, layout=layout, optimized=False)


def _kernel(codes, weight, *more, vectors: tuple[str, ...], activation: Any) -> None:
    """Run the kernel; ``more`` is a vector for each of these names, the result, and shared memory for it."""
    *given, out, out_smem = more
    by_name = dict(zip(vectors, given, strict=True))
    steps = codes.shape[1] // _BYTES
    row = pl.ds(jax.lax.axis_index("rows") * 2 * _ROWS, 2 * _ROWS)
    output = pl.ds(jax.lax.axis_index("outputs") * _OUTPUTS, _OUTPUTS)
    group = jax.lax.axis_index("group")
    own = pl.ds(group * _ROWS, _ROWS)
    transforms = (plgpu.TilingTransform((8, _BYTES)), plgpu.SwizzleTransform(128))

    def block(size: int) -> Any:
        return plgpu.BlockSpec(
            (size, _BYTES), lambda step: (0, step), transforms=transforms, memory_space=plgpu.SMEM
        )

    def multiply(_, codes_smem, weight_smem, sums):
        plgpu.wgmma(sums, codes_smem.at[own], weight_smem.transpose((1, 0)))
        plgpu.wgmma_wait(0)
        return sums

    def compute(run):
        @functools.partial(pl.run_scoped, sums=plgpu.ACC((_ROWS, _OUTPUTS), jnp.int32))
        def _(sums):
            run(sums)
            shape = (_ROWS, _OUTPUTS)
            vector = lambda ref, where, axis: jax.lax.broadcast_in_dim(
                load_vector(ref.at[where], plgpu.Layout.WGMMA.reduce(axis)).astype(jnp.float32),
                shape,
                (1 - axis,),
            )
            of_rows = lambda name: vector(by_name[name].at[row], own, 1)
            of_outputs = lambda name: vector(by_name[name], output, 0)
            y = sums[...].astype(jnp.float32) * of_rows("row_scale")
            if "row_zero" in by_name:
                y = y + of_rows("row_zero") * of_outputs("code_sums")
            y = y * of_outputs("scale")
            if "bias" in by_name:
                y = y + of_outputs("bias")
            out_smem[group] = finish(y, None, activation).astype(out.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_smem.at[group], out.at[row, output].at[own])
            plgpu.wait_smem_to_gmem(0)

    pipeline = plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(steps,),
        memory_registers=40,
        in_specs=[block(2 * _ROWS), block(_OUTPUTS)],
        wg_axis="group",
        num_compute_wgs=2,
        max_concurrent_steps=min(_STAGES, steps),
        compute_context=compute,
    )
    pipeline(codes.at[row], weight.at[output])


def quantized_matmul(
    x: Float[Array, "rows d_in"],
    weight: Int8[Array, "d_out bytes"],
    scale: Float[Array, " d_out"],
    bias: Float[Array, " d_out"] | None,
    code_sums: Int32[Array, " d_out"] | None = None,
    *,
    bits: int,
    activation: Callable[[Array], Array] | None,
    interpret: Any = None,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.quantized_matmul``; ``interpret`` as in ``plgpu.kernel``."""
    assert bits == 8, "why_not rejects other numbers of bits"
    rows, d_out = x.shape[0], weight.shape[0]
    padded = jnp.pad(x, ((0, -rows % (2 * _ROWS)), (0, 0)))
    codes, row_scale, row_zero = quantize_rows(padded, symmetric=code_sums is None)
    vectors = {
        "row_scale": row_scale,
        "row_zero": row_zero,
        "scale": scale,
        "bias": bias,
        "code_sums": None if code_sums is None else code_sums.astype(jnp.float32),
    }
    vectors = {name: vector for name, vector in vectors.items() if vector is not None}
    axes = varying_axes(x, weight, scale, bias, code_sums)
    grid = codes.shape[0] // (2 * _ROWS), d_out // _OUTPUTS
    swizzled = 128 // x.dtype.itemsize
    out = plgpu.kernel(
        functools.partial(_kernel, vectors=tuple(vectors), activation=activation),
        out_type=result_type((codes.shape[0], d_out), x.dtype, axes),
        grid=grid,
        grid_names=("rows", "outputs"),
        num_threads=3,
        thread_name="group",
        scratch_types=[
            plgpu.SMEM(
                (2, _ROWS, _OUTPUTS),
                x.dtype,
                transforms=(plgpu.TilingTransform((8, swizzled)), plgpu.SwizzleTransform(128)),
            )
        ],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        interpret=interpret,
    )(codes, weight, *vectors.values())
    return out[:rows]
