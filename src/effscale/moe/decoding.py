"""Kernels for experts with few tokens, which need few operations, on platforms that support them.

As in DeepSpeed-MoE's inference, the router's choice is one operation, which also computes a table of which token goes
where. The product that reads tokens gathers them by that table, and the product that computes the outputs weights and
sums them. Only the weights of chosen experts are read.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from effscale.models.activations import ACTIVATIONS
from effscale.models.mlp import MLP
from effscale.moe.routing import Routing
from kernels_pallas import dispatch, expert_matmul, top_k_gating
from kernels_pallas.expert_matmul import api as expert_api
from kernels_pallas.top_k_gating import api as gating_api

MOST_TOKENS = 256
"""With more tokens, the time is spent on products instead of weights, and XLA's kernel for sorted rows has larger tiles."""
WITHIN: dict[str, Callable[[Array], Array]] = {
    "gelu": lambda x: 0.5 * x * (1.0 + jax.lax.erf(x * 0.5**0.5))
}
"""Activations that the kernels compute with different operations, as they have no complementary error function."""


def kernel_routes(logits: Float[Array, "tokens experts"]) -> bool:
    """Return whether the choice is one kernel on the current platform."""
    return dispatch.platform() == "tpu" and gating_api.why_not("tpu", logits) is None


def route(
    logits: Float[Array, "tokens experts"],
    k: int,
    used: Bool[Array, "tokens"] | None,
    *,
    normalize: bool,
) -> Routing:
    """Return the routing without a capacity, like ``effscale.moe.top_k_routing`` of a softmax, with ``kernels_pallas.top_k_gating``.

    Positions in ``order`` that belong to no expert contain ``tokens * k``, which is not a valid item.
    """
    weights, experts, positions, sizes = top_k_gating(logits, k, used, normalize=normalize)
    items, real = experts.size, experts < sizes.shape[0]
    starts = jnp.append(jnp.cumsum(sizes) - sizes, items)
    place = jnp.where(real, starts[experts] + positions, items).reshape(-1)
    number = jnp.arange(items, dtype=jnp.int32)
    order = jnp.full(items, items, jnp.int32).at[place].set(number, mode="drop")
    return Routing(experts, weights, real, positions, order, sizes, None)


def kernels_serve(
    experts: Any, tokens: Float[Array, "groups tokens d_model"], routing: Routing
) -> bool:
    """Return whether ``by_kernels`` can run these experts on the current platform."""
    plain = type(experts) is MLP and all(
        isinstance(variable.get_value(), jax.Array)
        for _, variable in nnx.to_flat_state(nnx.state(experts))
    )
    groups, num_tokens, _ = tokens.shape
    few = groups == 1 and num_tokens <= MOST_TOKENS and routing.capacity is None
    if not (plain and few) or dispatch.platform() != "tpu":
        return False
    x, up, gate, down = tokens[0], *_kernels(experts)
    rows = jax.ShapeDtypeStruct((routing.experts[0].size, down.shape[1]), x.dtype)
    reasons = (
        expert_api.why_not_gather("tpu", x, up, rows, gate),
        expert_api.why_not_scatter("tpu", rows, down, num_tokens),
        expert_api.why_not_sort("tpu", routing.experts[0]),
    )
    return reasons == (None,) * 3


def by_kernels(
    experts: MLP,
    tokens: Float[Array, "1 tokens d_model"],
    routing: Routing,
    implementation: expert_api.Implementation | None = None,
) -> Float[Array, "1 tokens d_model"]:
    """Return the weighted sums of the experts' outputs for each token, with ``kernels_pallas.expert_matmul``.

    Args:
        experts: The experts with stacked parameters, all plain arrays.
        tokens: The tokens of a single group.
        routing: The routing of the group, without a capacity and with the leading dimension of groups.
        implementation: The implementation of the three ops.
    """
    x, by = tokens[0], {"implementation": implementation}
    cast: Callable[[Any], Any] = lambda a: None if a is None else a.astype(x.dtype)
    bias = lambda dense: (
        None if dense is None or dense.bias is None else cast(dense.bias.get_value())
    )
    up, gate, down = map(cast, _kernels(experts))
    chosen = (routing.experts[0], routing.positions[0], routing.weights[0])
    sizes = routing.sizes[0]
    rows = expert_matmul.sort_rows(*chosen, sizes, **by)
    activation = WITHIN.get(experts.activation, ACTIVATIONS[experts.activation])
    first = (x, up, sizes, rows.token, bias(experts.up), gate, bias(experts.gate))
    inner = expert_matmul.gather_matmul(*first, activation=activation, **by)
    last = (inner, down, sizes, rows.token, rows.weight, bias(experts.down))
    return expert_matmul.matmul_scatter(*last, num_tokens=len(x), **by)[None]


def _kernels(experts: MLP) -> tuple[Array, Array | None, Array]:
    """Return the stacked matrices: up, gate if there is one, and down."""
    gate = None if experts.gate is None else experts.gate.kernel.get_value()
    return experts.up.kernel.get_value(), gate, experts.down.kernel.get_value()
