"""A mixture of experts in the place of a block's feed-forward."""

import dataclasses
import functools
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models import Context, Dense, FeedForwardConfig
from effscale.models.reports import AUX_LOSS
from effscale.models.validation import check, choice
from effscale.moe.decoding import by_kernels, kernels_serve
from effscale.moe.expert_choice import ExpertChoice
from effscale.moe.router import Router, RouterConfig
from effscale.moe.routing import Routing
from effscale.moe.run_experts import (
    by_buffers,
    by_sorted_rows,
    each_group,
    one_by_one,
)
from effscale.parallel import Exchange, auto_batch_axes, constrain, mesh_size
from kernels_pallas import dispatch

Dispatch = Literal["table", "one_hot", "dropless"]
Mix = Literal["weighted", "sum", "gated"]

FEW_TOKENS = 16
"""Of so few, buffers with a place for each cost less than sorting: reading the weights is what takes the time."""
COEFFICIENTS = {"weighted": 2, "sum": 0, "gated": 1}
"""Logits of each way to mix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """A feed-forward of several experts, of which each token takes k.

    Example:
        >>> import dataclasses
        >>> from effscale.models import MLPConfig, gpt2
        >>> from effscale.moe import MoEConfig, RouterConfig, with_experts
        >>> dense = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> moe = MoEConfig(num_experts=8, expert=MLPConfig(d_ff=64), router=RouterConfig(k=2))
        >>> config = with_experts(dense, moe)  # every second layer
    """

    num_experts: int
    """Experts, E."""
    expert: FeedForwardConfig
    """Each of them."""
    router: RouterConfig = RouterConfig()
    """How tokens choose."""
    shared: FeedForwardConfig | None = None
    """A feed-forward that every token takes besides: the dense part of a residual MoE, or a shared expert."""
    mix: Mix = "weighted"
    """How the shared part is added: ``weighted``: both parts weighted by a softmax of two logits for each token, as DeepSpeed's
    ``use_residual`` does it; ``sum``: as they are, as the paper writes it; ``gated``: the shared part times a sigmoid, as Qwen2-MoE."""
    dispatch: Dispatch | None = None
    """How tokens get to their experts: ``table``: gathered into a buffer for each expert; ``one_hot``: the same by products with one-hot
    arrays, the slow reference; ``dropless``: sorted by expert, for routers without a capacity. None: ``dropless`` where the
    router's capacity factor is None and there are more than a few tokens, otherwise ``table``."""
    groups: int | None = None
    """Groups of rows of the batch that are routed apart from each other, each with capacities of its own; None: one on each device that
    has rows of its own, as DeepSpeed does it. A number makes results independent of the mesh; it should be a multiple of the devices that share
    the batch. Outside training, a batch that it does not divide makes as many groups as it can."""
    exchange: Exchange = Exchange()
    """How tokens travel between devices that hold different experts."""

    def __post_init__(self):
        check(self, self.num_experts >= 1, "num_experts", "at least 1")
        k = self.router.k
        if k > self.num_experts:
            raise ValueError(
                f"RouterConfig.k must be at most num_experts={self.num_experts} of MoEConfig, got {k}"
            )
        choice(self, "mix", typing.get_args(Mix))
        if self.dispatch is not None:
            choice(self, "dispatch", typing.get_args(Dispatch))
            by_tokens = self.router.chosen_by == "tokens"
            check(self, by_tokens, "dispatch", "None where RouterConfig.chosen_by='experts'")
        check(self, self.groups is None or self.groups >= 1, "groups", "at least 1, or None")

    @property
    def points(self) -> tuple[str, ...]:
        """The points of the experts, whose arrays get a leading expert dimension."""
        return tuple(getattr(self.expert, "points", ()))

    def multiplications(self, d_model: int) -> int:
        """Multiplications of one token's forward pass: of the k experts that it takes, the router and the shared part."""
        parts = [self.expert] * self.router.k + ([] if self.shared is None else [self.shared])
        extra = 0 if self.shared is None else COEFFICIENTS[self.mix]
        each = sum(typing.cast(Any, part).multiplications(d_model) for part in parts)
        return each + d_model * (self.num_experts + extra)

    def build(self, d_model: int, *, std: float, out_std: float, rngs: "nnx.Rngs") -> "MoE":
        """Return the module; ``std`` and ``out_std`` are of the initial inner and output weights."""
        return MoE(self, d_model, std=std, out_std=out_std, rngs=rngs)


class MoE(nnx.Module):
    """Router, experts with their parameters stacked, and the shared part."""

    def __init__(
        self, config: MoEConfig, d_model: int, *, std: float, out_std: float, rngs: nnx.Rngs
    ):
        self.router = Router(config.router, d_model, config.num_experts, std=std, rngs=rngs)
        parts = {"std": std, "out_std": out_std}
        build = lambda r: config.expert.build(d_model, **parts, rngs=r)
        self.experts = _stacked(jax.vmap(build)(rngs.split(config.num_experts)))
        shared, mix = config.shared, config.mix
        self.shared = None if shared is None else shared.build(d_model, **parts, rngs=rngs)
        options = {"bias": mix == "weighted", "std": std, "axes": ("embed", None), "rngs": rngs}
        logits = 0 if shared is None else COEFFICIENTS[mix]
        self.coefficient = Dense(d_model, logits, **options) if logits else None
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        """Return the output, and a report: the auxiliary loss, the router's statistics, and what was asked for."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        groups = _groups(self.config.groups, x.shape[0], training=key is not None)
        tokens = constrain(x.reshape(groups, -1, x.shape[-1]), "batch", None, None)
        used = None if context.real is None else context.real.reshape(groups, -1)
        group_keys = None if keys[0] is None else jax.random.split(keys[0], groups)
        # While decoding, a token must not be dropped for the sake of other rows.
        route = functools.partial(self.router, drops=not context.cached)
        routing, aux, found = each_group(route, tokens, used, group_keys)
        y, captured = self._experts(tokens, routing, context, keys[1])
        y = constrain(y.reshape(x.shape), "batch", "seq", "embed_act")
        if self.shared is not None:
            y = self._mixed(x, y, self.shared(x, context, keys[2])[0])
        # A group of much padding weighs less than a full one.
        choices = routing.sizes.sum(-1).astype(jnp.float32)
        share = choices / jnp.maximum(choices.sum(), 1)
        report = jax.tree.map(lambda a: jnp.tensordot(share, a, 1), {AUX_LOSS: aux, **found})
        return y, report | captured

    def for_decoding(self) -> "MoE":
        """Return the same layer with each expert's arrays beside the stack, so that few tokens read the weights of their own experts alone.

        Decoding asks for it, of layers that are not stacked. It takes the experts' memory twice. On CPUs a product with a part of a
        stack copies that part first; elsewhere the stack alone does.
        """
        if dispatch.platform() != "cpu" or isinstance(self.experts, nnx.Dict):
            return self
        # The first dimension is the layer's.
        take = lambda e: jax.tree.map(lambda a: a[:, e], self.experts)
        apart = [take(e) for e in range(self.config.num_experts)]
        layer = jax.tree.map(lambda a: a, self)
        # Without the barrier the compiler may slice at each token what it was given whole.
        apart = nnx.List(jax.lax.optimization_barrier(apart))
        layer.experts = nnx.Dict(stack=self.experts, apart=apart)
        return layer

    def _experts(
        self,
        tokens: Array,
        routing: Routing | ExpertChoice,
        context: Context,
        key: PRNGKeyArray | None,
    ) -> tuple[Array, dict[str, Array]]:
        config, experts = self.config, self.experts
        if isinstance(routing, ExpertChoice):
            whole = experts["stack"] if isinstance(experts, nnx.Dict) else experts
            return by_buffers(
                whole, tokens, routing, context, key, by="table", exchange=config.exchange
            )
        if isinstance(experts, nnx.Dict):
            groups, *items = routing.experts.shape
            few = groups == 1 and 2 * math.prod(items) <= config.num_experts
            if few and key is None and not self._captures(context):
                return one_by_one(experts["apart"], tokens, routing, context), {}
            experts = experts["stack"]
        by = config.dispatch
        plain = by is None and context.cached and key is None and not self._captures(context)
        if plain and kernels_serve(experts, tokens, routing):
            return by_kernels(experts, tokens, routing), {}
        if by is None:
            many = tokens.shape[1] > FEW_TOKENS
            by = "dropless" if many and routing.capacity is None else "table"
        if by == "dropless":
            # Sorted rows hide from a caller which rows are whose.
            if not self._captures(context):
                return by_sorted_rows(experts, tokens, routing, context, key), {}
            by = "table"
        return by_buffers(experts, tokens, routing, context, key, by=by, exchange=config.exchange)

    def _captures(self, context: Context) -> bool:
        return any(name in self.config.points for name, _ in context.capture)

    def _mixed(self, x: Array, y: Array, shared: Array) -> Array:
        if self.coefficient is None:
            return y + shared
        logits = self.coefficient(x).astype(jnp.float32)
        if self.config.mix == "gated":
            return y + shared * jax.nn.sigmoid(logits).astype(x.dtype)
        pair = jax.nn.softmax(logits).astype(x.dtype)
        return y * pair[..., :1] + shared * pair[..., 1:]


def _stacked(experts: Any) -> Any:
    """Names the leading dimension of each parameter: ``experts``, which the mesh's axis of that name divides."""
    for _, variable in nnx.to_flat_state(nnx.state(experts)):
        axes = variable.get_metadata().get("axes", ())
        variable.set_metadata("axes", ("experts", *axes))
    return experts


def _groups(given: int | None, batch: int, *, training: bool) -> int:
    """How many groups of rows are routed apart: as given, or one on each device that has rows of its own."""
    if given is None:
        return math.prod(mesh_size(axis) for axis in auto_batch_axes(batch))
    if training and batch % given:
        raise ValueError(
            f"MoEConfig.groups={given} does not divide the {batch} rows of this batch: choose a divisor, or batches of a multiple"
        )
    return math.gcd(given, batch)
