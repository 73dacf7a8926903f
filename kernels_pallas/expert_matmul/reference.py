"""Plain jnp: a sorted copy of the tokens, ``grouped_matmul``, and a sum over each token's rows."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_pallas.grouped_matmul import grouped_matmul


class Rows(NamedTuple):
    """The token and weight of each row, sorted by group; see ``kernels_pallas.expert_matmul.sort_rows``."""

    token: Int[Array, " rows"]
    weight: Float[Array, " rows"]


def sort_rows(
    experts: Int[Array, "tokens k"],
    positions: Int[Array, "tokens k"],
    weights: Float[Array, "tokens k"],
    sizes: Int[Array, " groups"],
) -> Rows:
    """See ``kernels_pallas.expert_matmul.sort_rows``."""
    starts = jnp.append(jnp.cumsum(sizes) - sizes, experts.size)
    number = jnp.minimum(experts, sizes.shape[0])
    # Choices without a group are sent past the last row, where nothing is written.
    row = jnp.where(experts < sizes.shape[0], starts[number] + positions, experts.size)
    place = lambda a: jnp.zeros(a.size, a.dtype).at[row].set(a, mode="drop")
    token = jnp.broadcast_to(jnp.arange(len(experts), dtype=jnp.int32)[:, None], experts.shape)
    return Rows(place(token), place(weights))


def gather_matmul(
    x: Float[Array, "tokens d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    source: Int[Array, " rows"],
    bias: Float[Array, "groups d_out"] | None,
    gate: Float[Array, "groups d_in d_out"] | None,
    gate_bias: Float[Array, "groups d_out"] | None,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "rows d_out"]:
    """See ``kernels_pallas.expert_matmul.gather_matmul``."""
    rows = x[source]
    product = lambda weight, bias: grouped_matmul(rows, weight, sizes, bias).astype(jnp.float32)
    up = product(weight, bias)
    y = finish(up, None if gate is None else product(gate, gate_bias), activation)
    real = jnp.arange(source.shape[0]) < sizes.sum()
    return jnp.where(real[:, None], y, 0).astype(x.dtype)


def matmul_scatter(
    h: Float[Array, "rows d_in"],
    weight: Float[Array, "groups d_in d_out"],
    sizes: Int[Array, " groups"],
    target: Int[Array, " rows"],
    scale: Float[Array, " rows"],
    bias: Float[Array, "groups d_out"] | None,
    num_tokens: int,
) -> Float[Array, "tokens d_out"]:
    """See ``kernels_pallas.expert_matmul.matmul_scatter``."""
    y = grouped_matmul(h, weight, sizes, bias).astype(jnp.float32)
    # Rows without a group must not be multiplied by zero, because their contents are undefined.
    real = jnp.arange(target.shape[0]) < sizes.sum()
    y = y * jnp.where(real, scale, 0)[:, None]
    total = jnp.zeros((num_tokens, weight.shape[2]), jnp.float32)
    return total.at[target].add(y, mode="drop").astype(h.dtype)


def finish(
    up: Float[Array, "..."],
    gate: Float[Array, "..."] | None,
    activation: Callable[[Array], Array] | None,
) -> Float[Array, "..."]:
    """Apply what follows the products, in float32: the activation, or the activation of the gate times the other product."""
    act = (lambda y: y) if activation is None else activation
    return act(up) if gate is None else act(gate) * up
