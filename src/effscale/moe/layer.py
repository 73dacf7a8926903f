"""A mixture of experts as the feed-forward of a block."""

import dataclasses
import functools
import math
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from effscale.models import Context, Dense
from effscale.models.config import FeedForwardConfig
from effscale.models.name_patterns import BY_NAME
from effscale.models.reports import AUX_LOSS
from effscale.moe.decoding import by_kernels, kernels_serve
from effscale.moe.router import Router, RouterConfig
from effscale.moe.routing import ExpertChoice, Routing
from effscale.moe.run_experts import (
    by_buffers,
    by_sorted_rows,
    each_group,
    one_by_one,
)
from effscale.options import Options, PositiveInt, check
from effscale.parallel import Exchange, constrain
from effscale.parallel.expert_exchange import mesh_size
from effscale.parallel.rules import auto_batch_axes
from kernels_pallas import dispatch

Dispatch = Literal["table", "one_hot", "dropless"]
Mix = Literal["weighted", "sum", "gated"]

FEW_TOKENS = 16
"""Up to this number of tokens, buffers with room for all of them cost less than sorting, as most of the time is spent
on reading weights."""
COEFFICIENTS = {"weighted": 2, "sum": 0, "gated": 1}
"""The number of logits of each way to mix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEConfig(Options):
    """A mixture of experts: a feed-forward of several experts, k of which process each token.

    Example:
        >>> import dataclasses
        >>> from effscale.models import MLPConfig, gpt2
        >>> from effscale.moe import MoEConfig, RouterConfig, with_experts
        >>> dense = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> moe = MoEConfig(num_experts=8, expert=MLPConfig(d_ff=64), router=RouterConfig(k=2))
        >>> config = with_experts(dense, moe)  # every second layer
    """

    num_experts: PositiveInt
    """The number of experts E."""
    expert: FeedForwardConfig
    """The feed-forward of each expert."""
    router: RouterConfig = RouterConfig()
    """The router."""
    shared: FeedForwardConfig | None = None
    """An additional feed-forward for every token: the dense part of a residual MoE, or a shared expert."""
    mix: Mix = "weighted"
    """How to add the shared part. ``weighted`` weights both parts by a softmax of two logits for each token, like DeepSpeed's
    ``use_residual``; ``sum`` adds them, as in the paper; ``gated`` multiplies the shared part by a sigmoid, as in Qwen2-MoE."""
    dispatch: Dispatch | None = None
    """How to move tokens to their experts. ``table`` gathers them into a buffer for each expert; ``one_hot`` does the
    same by products with one-hot arrays, as a slow reference; ``dropless`` sorts them by expert, for routers without a
    capacity. None selects ``dropless`` if the router's capacity factor is None and there are more than a few tokens,
    otherwise ``table``."""
    groups: PositiveInt | None = None
    """The number of groups of batch rows that are routed separately, each with its own capacities. None uses one group
    per device that has its own rows, as in DeepSpeed. A fixed number makes results independent of the mesh; it should
    be a multiple of the number of devices that share the batch. Outside training, a batch that it does not divide uses
    the largest possible number of groups."""
    exchange: Exchange = Exchange()
    """How to exchange tokens between devices with different experts."""

    def __post_init__(self):
        super().__post_init__()
        k = self.router.k
        if k > self.num_experts:
            raise ValueError(
                f"RouterConfig.k must be at most num_experts={self.num_experts} of MoEConfig, got {k}"
            )
        by_tokens = self.dispatch is None or self.router.chosen_by == "tokens"
        check(self, by_tokens, "dispatch", "None with RouterConfig.chosen_by='experts'")

    @property
    def points(self) -> tuple[str, ...]:
        """The capture points of the experts, whose arrays get a leading expert dimension."""
        return tuple(getattr(self.expert, "points", ()))

    @property
    def causal(self) -> bool:
        """Whether the output at a token is independent of later tokens; experts that choose among tokens see all of them."""
        return self.router.chosen_by == "tokens"

    def multiplications(self, d_model: int) -> int:
        """Return the multiplications of one token's forward pass: of its k experts, the router and the shared part."""
        parts = [self.expert] * self.router.k + ([] if self.shared is None else [self.shared])
        extra = 0 if self.shared is None else COEFFICIENTS[self.mix]
        each = sum(typing.cast(Any, part).multiplications(d_model) for part in parts)
        return each + d_model * (self.num_experts + extra)

    def build(self, d_model: int, *, std: float, out_std: float, rngs: "nnx.Rngs") -> "MoE":
        """Create the module; ``std`` and ``out_std`` are the standard deviations of the initial inner and output weights."""
        return MoE(self, d_model, std=std, out_std=out_std, rngs=rngs)


class MoE(nnx.Module):
    """The module of a mixture of experts: router, experts with stacked parameters, and the shared part."""

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
        if self.coefficient is not None:
            self.coefficient.kernel.set_metadata(BY_NAME, "coefficient")
        self.config = config

    def __call__(
        self,
        x: Float[Array, "batch seq d_model"],
        context: Context,
        key: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, "batch seq d_model"], dict[str, Array]]:
        """Return the output, and a report: the auxiliary loss, the router's statistics, and captured values."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        groups = _groups(self.config.groups, x.shape[0], training=key is not None)
        tokens = constrain(x.reshape(groups, -1, x.shape[-1]), "batch", None, None)
        used = None if context.real is None else context.real.reshape(groups, -1)
        group_keys = None if keys[0] is None else jax.random.split(keys[0], groups)
        # While decoding, a token must not be dropped because of other rows.
        route = functools.partial(self.router, drops=not context.cached)
        routing, aux, found = each_group(route, tokens, used, group_keys)
        y, captured = self._experts(tokens, routing, context, keys[1])
        y = constrain(y.reshape(x.shape), "batch", "seq", "embed_act")
        if self.shared is not None:
            y = self._mixed(x, y, self.shared(x, context, keys[2])[0])
        # A group with much padding weighs less than a full one.
        choices = routing.sizes.sum(-1).astype(jnp.float32)
        share = choices / jnp.maximum(choices.sum(), 1)
        report = jax.tree.map(lambda a: jnp.tensordot(share, a, 1), {AUX_LOSS: aux, **found})
        return y, report | captured

    def for_decoding(self) -> "MoE":
        """Return the same layer with separate arrays for each expert in addition to the stack.

        With few tokens, it reads only the weights of their experts.

        Decoding calls it for layers that are not stacked. It doubles the memory of the experts. On CPUs, a product with a
        part of a stack first copies that part; on other platforms the stack is enough.
        """
        if dispatch.platform() != "cpu" or isinstance(self.experts, nnx.Dict):
            return self
        # The first dimension is that of layers.
        take = lambda e: jax.tree.map(lambda a: a[:, e], self.experts)
        apart = [take(e) for e in range(self.config.num_experts)]
        layer = jax.tree.map(lambda a: a, self)
        # Without the barrier the compiler may slice the stack again at each token.
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
            # With sorted rows a caller could not tell which row belongs to which expert.
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
    """Name the leading dimension of each parameter ``experts``, which the mesh axis of that name divides."""
    for _, variable in nnx.to_flat_state(nnx.state(experts)):
        axes = variable.get_metadata().get("axes", ())
        variable.set_metadata("axes", ("experts", *axes))
    return experts


def _groups(given: int | None, batch: int, *, training: bool) -> int:
    """Return the number of groups of rows that are routed separately: as given, or one per device that has its own rows."""
    if given is None:
        return math.prod(mesh_size(axis) for axis in auto_batch_axes(batch))
    if training and batch % given:
        raise ValueError(
            f"MoEConfig.groups must divide the {batch} rows of a batch, got {given}. Use a divisor, or batches that are a multiple."
        )
    return math.gcd(given, batch)
