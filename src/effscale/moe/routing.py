"""The assignment of tokens to experts and to places in their buffers.

A router gives each token a score for each expert. ``top_k_routing`` turns the scores into a ``Routing``: the k experts of
each token, the weights of their outputs, and a place in each expert's buffer, as far as there is room.
``effscale.moe.dispatch`` moves tokens accordingly.

Experts can also choose their tokens, so that the load is even without a loss. A token is then chosen by several experts or by
none, depending on all tokens of its group, including later ones. So use it only for encoders and for models that read whole
inputs; a causal model trained with it cannot be decoded.
"""

import dataclasses
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

Priority = Literal["token", "choice", "random", "probability"]
Normalize = Literal["kept", "chosen", "none"]


@typing.no_type_check  # JAX also creates it from shapes and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """An assignment of tokens to experts. An *item* is a choice of a token: number ``token * k + choice``.

    Attributes:
        experts: The experts of each token, the most probable first; ``num_experts`` for padding.
        weights: The weight of each expert's output, float32; 0 if the item is dropped.
        kept: Whether the item has a place.
        positions: The place of the item in the buffer of its expert; meaningless if it is dropped.
        order: All items sorted by expert, and by priority within an expert. Padding is at the end.
        sizes: The number of items that chose each expert, before dropping.
        capacity: The number of rows in an expert's buffer; None if nothing is dropped.
    """

    experts: Int[Array, "tokens k"]
    weights: Float[Array, "tokens k"]
    kept: Bool[Array, "tokens k"]
    positions: Int[Array, "tokens k"]
    order: Int[Array, "items"]
    sizes: Int[Array, "experts"]
    capacity: int | None = dataclasses.field(metadata={"static": True})

    @property
    def num_experts(self) -> int:
        """The number of experts."""
        return self.sizes.shape[0]

    @property
    def buffer_rows(self) -> int:
        """The number of rows in an expert's buffer; without a capacity it is the number of tokens, as no token can choose an expert twice."""
        return self.experts.shape[0] if self.capacity is None else self.capacity

    @property
    def starts(self) -> Int[Array, "experts"]:
        """The position in ``order`` at which the items of each expert start."""
        return jnp.cumsum(self.sizes) - self.sizes


def expert_capacity(
    num_tokens: int, num_experts: int, factor: float, *, k: int = 1, min_capacity: int = 4
) -> int:
    r"""Return the number of rows in each expert's buffer: ``factor`` times its share of the items, rounded up.

    $$C = \min(T, \max(\lceil f k T / E \rceil, C_{min}))$$

    It is at most ``num_tokens``, as a token needs at most one place (DeepSpeed failed in this case until 2026).

    Args:
        num_tokens: The number T of tokens that are routed together.
        num_experts: The number E of experts.
        factor: The capacity factor f; 1 is enough if the load is even.
        k: The number of experts per token.
        min_capacity: The minimum capacity.

    Example:
        >>> expert_capacity(6, 3, 1.0, k=2)
        4
    """
    # In float32, like the original.
    share = np.float32(num_tokens / num_experts) * np.float32(k * factor)
    return min(num_tokens, max(math.ceil(float(share)), min_capacity))


def top_k_routing(
    probs: Float[Array, "tokens experts"],
    k: int = 1,
    *,
    capacity: int | None = None,
    scores: Float[Array, "tokens experts"] | None = None,
    used: Bool[Array, "tokens"] | None = None,
    priority: Priority | None = None,
    normalize: Normalize | None = None,
    key: PRNGKeyArray | None = None,
) -> Routing:
    """Assign each token to the k experts with the highest scores.

    Args:
        probs: The probability of each expert for each token, after the softmax (or sigmoid), in float32. Gradients flow
            through the weights computed from them; choices have no gradient.
        k: The number of experts per token.
        capacity: The number of rows in each expert's buffer; see ``expert_capacity``. Items without room are dropped.
            None drops nothing.
        scores: The scores used for the choice, such as logits with noise; None uses ``probs``.
        used: False at padding, which goes to no expert.
        priority: Which items get a place if an expert has too few. ``token``: earlier tokens; ``choice``: all first
            choices before all second ones, then earlier tokens; ``probability``: the most probable; ``random``: random
            token selection, which needs ``key``. With ``choice`` and ``probability``, later tokens can take the places of
            earlier ones. None follows DeepSpeed: ``random`` for k = 1 (``token`` without a key), ``choice`` for 2, and
            ``probability`` for more.
        normalize: How to normalize the weights of a token. ``kept``: the weights of its kept items sum to 1; ``chosen``:
            those of all k items sum to 1 before dropping; ``none``: they are the probabilities. None follows DeepSpeed:
            ``none`` for k = 1 (where a weight of 1 would give the router no gradient), otherwise ``kept``.
        key: The key for random token selection.

    Returns:
        The assignment.

    Raises:
        ValueError: k is above the number of experts, or ``priority="random"`` without a key.

    References:
        Rajbhandari et al., "DeepSpeed-MoE" (2022). https://arxiv.org/abs/2201.05596
        Lepikhin et al., "GShard" (2020), two experts. https://arxiv.org/abs/2006.16668
        Fedus et al., "Switch Transformers" (2021), one expert. https://arxiv.org/abs/2101.03961

    Example:
        >>> import jax, jax.numpy as jnp
        >>> probs = jax.nn.softmax(jnp.array([[2.0, 1.0, 0.0], [1.5, 1.0, 0.5], [3.0, 0.0, 1.0]]))
        >>> routing = top_k_routing(probs, capacity=2)
        >>> routing.experts[:, 0].tolist(), routing.kept[:, 0].tolist()
        ([0, 0, 0], [True, True, False])
    """
    _num_tokens, num_experts = probs.shape
    if not 1 <= k <= num_experts:
        raise ValueError(f"k must be from 1 to the number of experts, {num_experts}, got {k}")
    if priority is None:
        priority = _default_priority(k, key is not None)
    if priority == "random" and key is None:
        raise ValueError("priority='random' needs a key, such as jax.random.key(0)")
    if normalize is None:
        normalize = "none" if k == 1 else "kept"

    by = jax.lax.stop_gradient(probs if scores is None else scores)
    # Without the barrier XLA sorts all scores if a part of the choices (the first ones) is used elsewhere, ten times as slow on a CPU.
    experts = jax.lax.optimization_barrier(jax.lax.top_k(by, k)[1])
    chosen = jnp.take_along_axis(probs, experts, axis=1)
    if used is not None:
        experts = jnp.where(used[:, None], experts, num_experts)
    order, sizes, positions = _place(experts, num_experts, priority, chosen, key)
    real = experts < num_experts
    kept = real if capacity is None else real & (positions < capacity)
    weights = jnp.where(kept, chosen, 0.0)
    if normalize != "none":
        whole = jnp.where(kept if normalize == "kept" else real, chosen, 0.0)
        weights = weights / jnp.maximum(whole.sum(1, keepdims=True), jnp.finfo(jnp.float32).eps)
    return Routing(experts, weights, kept, positions, order, sizes, capacity)


def _default_priority(k: int, may_draw: bool) -> Priority:
    if k == 1:
        return "random" if may_draw else "token"
    return "choice" if k == 2 else "probability"


def _place(
    experts: Int[Array, "tokens k"],
    num_experts: int,
    priority: Priority,
    chosen: Float[Array, "tokens k"],
    key: Any,
) -> tuple[Int[Array, "items"], Int[Array, "experts"], Int[Array, "tokens k"]]:
    """Return the items sorted by expert and priority, the number of items of each expert, and the rank of each item in its expert."""
    num_tokens, k = experts.shape
    items = num_tokens * k
    number = jnp.arange(items, dtype=jnp.int32)
    if priority in ("token", "choice"):
        # The rank among all items: by token, or by choice. Sorting expert and rank as one number is three times as fast.
        rank = number if priority == "token" else (number % k) * num_tokens + number // k
        sort_by: tuple[Any, ...] = (rank,)
        packs = (num_experts + 1) * items < 2**31
    else:
        packs = False
        if priority == "random":
            sort_by = (jax.random.bits(key, (items,)),)
        else:
            sort_by = (-jax.lax.stop_gradient(chosen).reshape(-1),)
    flat = experts.reshape(-1).astype(jnp.int32)
    if packs:
        packed = jnp.sort(flat * items + sort_by[0])
        by_expert, rank = packed // items, packed % items
        order = rank if priority == "token" else (rank % num_tokens) * k + rank // num_tokens
    else:
        by_expert, _, order = jax.lax.sort((flat, *sort_by, number), num_keys=2, is_stable=True)
    sizes = (flat[:, None] == jnp.arange(num_experts)[None]).sum(0, dtype=jnp.int32)
    starts = jnp.append(jnp.cumsum(sizes) - sizes, sizes.sum())
    positions = (
        jnp.zeros(items, jnp.int32).at[order].set(number - starts[by_expert], unique_indices=True)
    )
    return order, sizes, positions.reshape(num_tokens, k)


@typing.no_type_check  # JAX also creates it from shapes and placeholders
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ExpertChoice:
    """An assignment of tokens to experts, by expert.

    Attributes:
        tokens: The tokens that each expert chose, the most probable first; ``num_tokens`` in rows that would contain padding.
        weights: The weight of the expert's output for each, float32; 0 in such rows.
        sizes: The number of tokens of each expert.
        num_tokens: The total number of tokens.
    """

    tokens: Int[Array, "experts capacity"]
    weights: Float[Array, "experts capacity"]
    sizes: Int[Array, "experts"]
    num_tokens: int = dataclasses.field(metadata={"static": True})

    def counts(self) -> Int[Array, "tokens"]:
        """Count the experts that chose each token."""
        zeros = jnp.zeros(self.num_tokens, jnp.int32)
        return zeros.at[self.tokens.reshape(-1)].add(1, mode="drop")


def expert_choice(
    probs: Float[Array, "tokens experts"],
    capacity: int,
    *,
    used: Bool[Array, "tokens"] | None = None,
) -> ExpertChoice:
    r"""Assign to each expert the tokens with the highest probability for it.

    $$y_t = \sum_{e:\, t \in \mathrm{TopK}(S^\top_e, C)} S_{t e}\, E_e(x_t)$$

    Args:
        probs: The probability of each expert for each token, S, float32. Gradients flow through the weights.
        capacity: The number of tokens per expert, C; ``effscale.moe.expert_capacity`` computes it from the mean number of
            experts per token.
        used: False at padding, which no expert chooses.

    Returns:
        The assignment.

    Raises:
        ValueError: The capacity is above the number of tokens.

    References:
        Zhou et al., "Mixture-of-Experts with Expert Choice Routing" (2022), section 3.2. https://arxiv.org/abs/2202.09368

    Example:
        >>> import jax.numpy as jnp
        >>> choice = expert_choice(jnp.array([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]]), capacity=2)
        >>> choice.tokens.tolist(), choice.counts().tolist()
        ([[0, 1], [2, 1]], [1, 2, 1])
    """
    num_tokens, _ = probs.shape
    if not 1 <= capacity <= num_tokens:
        raise ValueError(
            f"capacity must be from 1 to the number of tokens, {num_tokens}, got {capacity}"
        )
    by = jax.lax.stop_gradient(probs)
    if used is not None:
        by = jnp.where(used[:, None], by, -jnp.inf)
    scores, tokens = jax.lax.top_k(by.T, capacity)
    taken = scores > -jnp.inf
    weights = jnp.where(taken, jnp.take_along_axis(probs.T, tokens, axis=1), 0.0)
    tokens = jnp.where(taken, tokens, num_tokens).astype(jnp.int32)
    return ExpertChoice(tokens, weights, taken.sum(1, dtype=jnp.int32), num_tokens)
