"""Pallas TPU kernel: one pass over the logits, a tile of tokens at a time.

Tokens lie along the lanes and experts along the sublanes, so that a layer of eight experts fills whole registers. The grid is
sequential: how many tokens before this tile chose each expert is a column of counts in VMEM, and how many within the tile is a product
with a triangle of ones, exact since the counts are small integers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from kernels_pallas.manual_axes import result_type, varying_axes
from kernels_pallas.top_k_gating.reference import Gating, at_least_epsilon

_LANES, _SUBLANES = 128, 8
_TILE = 256
# A tile of this many experts, with its temporaries, takes 20 MiB of VMEM.
_MAX_EXPERTS = 2048


def why_not(num_experts: int) -> str | None:
    """Return why the kernel does not support this many experts, or None."""
    if num_experts > _MAX_EXPERTS:
        return f"a tile of {num_experts} experts has no room in VMEM, which takes {_MAX_EXPERTS}"
    return None


def _kernel(
    logits_ref, used_ref, weights_ref, experts_ref, positions_ref, sizes_ref, counts_ref,
    *, k: int, num_tokens: int, num_experts: int, normalize: bool,
) -> None:  # fmt: skip
    """Run the kernel; ``counts_ref`` counts the tokens before this tile; ``used_ref`` is None if all tokens are real."""
    step = pl.program_id(0)

    @pl.when(step == 0)
    def _():
        counts_ref[...] = jnp.zeros_like(counts_ref)

    shape = logits_ref.shape
    expert = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    token = step * shape[1] + jax.lax.broadcasted_iota(jnp.int32, (1, shape[1]), 1)
    # The tile extends past the array and reads undefined values there.
    real = token < num_tokens
    if used_ref is not None:
        real = real & (used_ref[...] != 0)
    logits = jnp.where(expert < num_experts, logits_ref[...], -jnp.inf)
    powers = jnp.exp(logits - jnp.max(logits, axis=0, keepdims=True))
    total = jnp.sum(powers, axis=0, keepdims=True)

    free = expert < num_experts
    experts, weights = [], []
    for _ in range(k):
        rest = jnp.where(free, logits, -jnp.inf)
        best = free & (rest == jnp.max(rest, axis=0, keepdims=True))
        first = jnp.min(jnp.where(best, expert, num_experts - 1), axis=0, keepdims=True)
        mine = expert == first
        free = free & ~mine
        experts.append(first)
        power = jnp.sum(jnp.where(mine, powers, 0.0), axis=0, keepdims=True)
        weights.append(jnp.where(real, power / total, 0.0))
    if normalize:
        whole = at_least_epsilon(sum(weights[1:], start=weights[0]))
        weights = [weight / whole for weight in weights]

    choices = jnp.where(real & ~free & (expert < num_experts), 1.0, 0.0)
    square = (shape[1], shape[1])
    earlier = jax.lax.broadcasted_iota(jnp.int32, square, 0)
    earlier = earlier < jax.lax.broadcasted_iota(jnp.int32, square, 1)
    before = counts_ref[...] + jnp.dot(
        choices.astype(jnp.bfloat16),
        jnp.where(earlier, 1.0, 0.0).astype(jnp.bfloat16),
        preferred_element_type=jnp.float32,
    )
    for choice, (first, weight) in enumerate(zip(experts, weights, strict=True)):
        row = pl.ds(choice, 1)
        place = jnp.sum(jnp.where(expert == first, before, 0.0), axis=0, keepdims=True)
        weights_ref[row, :] = weight
        experts_ref[row, :] = jnp.where(real, first, num_experts)
        positions_ref[row, :] = jnp.where(real, place, 0.0).astype(jnp.int32)
    counts_ref[...] += jnp.sum(choices, axis=1, keepdims=True)
    sizes_ref[...] = counts_ref[...].astype(jnp.int32)


def top_k_gating(
    logits: Float[Array, "tokens experts"],
    used: Bool[Array, " tokens"] | None,
    *,
    k: int,
    normalize: bool,
    interpret: Any = False,
) -> Gating:
    """See ``kernels_pallas.top_k_gating``; ``interpret`` as in ``pl.pallas_call``."""
    num_tokens, num_experts = logits.shape
    wide = pl.cdiv(num_experts, _SUBLANES) * _SUBLANES
    tile = min(_TILE, pl.cdiv(num_tokens, _LANES) * _LANES)
    axes = varying_axes(logits, used)
    of_tokens = lambda rows: pl.BlockSpec((rows, tile), lambda i: (0, i))
    column = pl.BlockSpec((wide, 1), lambda i: (0, 0))
    given = None if used is None else used.astype(jnp.int32)[None]
    sizes = [((k, num_tokens), jnp.float32)] + 2 * [((k, num_tokens), jnp.int32)]
    weights, experts, positions, counts = pl.pallas_call(
        functools.partial(
            _kernel, k=k, num_tokens=num_tokens, num_experts=num_experts, normalize=normalize
        ),
        grid=(pl.cdiv(num_tokens, tile),),
        in_specs=[of_tokens(wide), None if used is None else of_tokens(1)],
        out_specs=[of_tokens(k), of_tokens(k), of_tokens(k), column],
        out_shape=[
            *(result_type(shape, dtype, axes) for shape, dtype in sizes),
            result_type((num_experts, 1), jnp.int32, axes),
        ],
        scratch_shapes=[pltpu.VMEM((wide, 1), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=num_tokens * num_experts * (2 * tile + 8 * k),
            transcendentals=num_tokens * num_experts,
            bytes_accessed=4 * num_tokens * (num_experts + 3 * k),
        ),
        interpret=interpret,
    )(logits.T, given)
    return Gating(weights.T, experts.T, positions.T, counts[:, 0])
