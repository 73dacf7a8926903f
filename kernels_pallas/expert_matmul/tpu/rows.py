"""Pallas TPU kernel of ``sort_rows``: a loop over numbers in scalar memory, because a scatter of so few numbers takes several operations."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from kernels_pallas.expert_matmul.reference import Rows
from kernels_pallas.expert_matmul.tpu import vmem
from kernels_pallas.manual_axes import result_type, varying_axes


def why_not(experts: Any) -> str | None:
    """Return why the kernel does not support these operands, or None."""
    return vmem.why_not_rows(experts.shape[0] * experts.shape[1])


def _kernel(
    experts_ref, positions_ref, weights_ref, sizes_ref, token_ref, weight_ref, starts_ref
) -> None:
    (k, tokens), groups, rows = experts_ref.shape, sizes_ref.shape[0], token_ref.shape[0]

    def write(row: Any, token: Any, weight: Any) -> None:
        token_ref[row] = token
        weight_ref[row] = weight

    def one_group(group: Any, total: Any) -> Any:
        starts_ref[group] = total
        return total + sizes_ref[group]

    def one_token(token: Any, _: Any) -> None:
        for choice in range(k):
            expert = experts_ref[choice, token]

            @pl.when(expert < groups)
            def _(choice=choice, expert=expert):
                row = starts_ref[expert] + positions_ref[choice, token]
                # Inconsistent inputs must not write past the end.
                write(jnp.clip(row, 0, rows - 1), token, weights_ref[choice, token])

    filled = jax.lax.fori_loop(0, groups, one_group, jnp.int32(0))
    nothing = jnp.int32(0), jnp.float32(0)
    jax.lax.fori_loop(jnp.clip(filled, 0, rows), rows, lambda row, _: write(row, *nothing), None)
    jax.lax.fori_loop(0, tokens, one_token, None)


def sort_rows(
    experts: Int[Array, "tokens k"],
    positions: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    sizes: Int[Array, " groups"],
    interpret: Any = False,
) -> Rows:
    """See ``kernels_pallas.expert_matmul.sort_rows``; ``interpret`` as in ``pl.pallas_call``."""
    axes = varying_axes(experts, positions, weights, sizes)
    numbers = pl.BlockSpec(memory_space=pltpu.SMEM)
    token, weight = pl.pallas_call(
        _kernel,
        in_specs=[numbers] * 4,
        out_specs=[numbers] * 2,
        out_shape=[result_type((experts.size,), kind, axes) for kind in (jnp.int32, jnp.float32)],
        scratch_shapes=[pltpu.SMEM(sizes.shape, jnp.int32)],
        interpret=interpret,
    )(*(a.T for a in (experts.astype(jnp.int32), positions.astype(jnp.int32), weights)), sizes)
    return Rows(token, weight)
