"""The router: scores of experts, noise, and their configuration."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from effscale.models import Dense
from effscale.models.name_patterns import BY_NAME
from effscale.moe import decoding
from effscale.moe.balance import (
    expert_choice_statistics,
    load_balance,
    nudge,
    router_statistics,
    z_loss,
)
from effscale.moe.routing import (
    ExpertChoice,
    Normalize,
    Priority,
    Routing,
    expert_capacity,
    expert_choice,
    top_k_routing,
)
from effscale.options import (
    NonNegativeFloat,
    NonNegativeInt,
    Options,
    PositiveFloat,
    PositiveInt,
    check,
)

Noise = Literal["jitter", "gumbel", "gumbel_second"]

JITTER = 1e-2
"""Jitter multiplies the router's input by a factor between 1 - JITTER and 1 + JITTER."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig(Options):
    """The router of a mixture. Defaults are those of DeepSpeed's ``MoE``, unless stated otherwise."""

    k: PositiveInt = 1
    """The number of experts per token; the mean number if experts choose."""
    chosen_by: Literal["tokens", "experts"] = "tokens"
    """Whether ``tokens`` choose their k experts, or ``experts`` choose the number of tokens for which they have room (``effscale.moe.routing.expert_choice``).
    The latter needs no loss to keep the load even, but looks at all tokens of a group together: it is not for causal models and cannot be decoded."""
    capacity_factor: PositiveFloat | None = 1.0
    """The capacity of each expert in training, as a multiple of its share of the choices.
    Choices beyond it are dropped: the token continues only along the residual stream.
    None drops nothing (DeepSpeed's ``drop_tokens=False``)."""
    eval_capacity_factor: PositiveFloat | None = 1.0
    """The capacity factor outside training, that is, without a key. Decoding with a cache never drops anything."""
    min_capacity: NonNegativeInt = 4
    """The minimum capacity of an expert, in tokens."""
    priority: Priority | None = None
    """Which tokens get a place if an expert has too few, see ``effscale.moe.top_k_routing``.
    None selects at random for k = 1 in training (DeepSpeed's ``use_rts``), first choices before second ones for k = 2, and by probability for more."""
    normalize: Normalize | None = None
    """How to normalize the weights of a token, see ``effscale.moe.top_k_routing``.
    None does not normalize for k = 1, and normalizes over the kept ones for more."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """How to convert logits to probabilities; ``sigmoid`` scores each expert separately, as in DeepSeek-V3."""
    scale: PositiveFloat = 1.0
    """A factor for all weights."""
    noise: Noise | None = None
    """The noise in training: ``jitter`` multiplies the router's input by 0.99 to 1.01; ``gumbel`` adds noise to the logits used for the choice (DeepSpeed's ``RSample``); ``gumbel_second`` adds it for all choices except the first. (For k = 2, DeepSpeed uses ``gumbel_second`` by default, also in evaluation; here nothing is random by default.)"""
    balance: NonNegativeFloat = 0.01
    """The coefficient of the load-balancing loss; DeepSpeed's scripts use 0.01."""
    balance_choices: Literal["first", "all"] | None = None
    """The choices that count in this loss. As in DeepSpeed, None counts the first for k up to 2, and all for more."""
    z_loss: NonNegativeFloat = 0.0
    """The coefficient of the router's z-loss; ST-MoE uses 0.001."""
    balance_by_bias: bool = False
    """Whether to add a bias to the scores used for the choice, and to nothing else. ``effscale.moe.with_balance_bias`` moves it towards an even load in each step, instead of a loss (``balance=0``), as in DeepSeek-V3.
    Without that optimizer, the optimizer of the other parameters would move the bias at its own rate, which is far too large."""

    def __post_init__(self):
        super().__post_init__()
        second = self.noise != "gumbel_second" or self.k >= 2
        wanted = f"used with k of at least 2, as k={self.k} has no second choice"
        check(self, second, "noise", wanted)
        of_inputs = self.noise in (None, "jitter")
        wanted = (
            "None or jitter with balance_by_bias, whose scores are probabilities instead of logits"
        )
        check(self, of_inputs or not self.balance_by_bias, "noise", wanted)
        if self.chosen_by == "tokens":
            return
        wanted = "a number with chosen_by='experts', which choose tokens up to their capacity"
        for name in ("capacity_factor", "eval_capacity_factor"):
            check(self, getattr(self, name) is not None, name, wanted)
        wanted = "None with chosen_by='experts', as it orders the choices of tokens"
        for name in ("priority", "normalize", "balance_choices"):
            check(self, getattr(self, name) is None, name, wanted)
        check(self, of_inputs, "noise", "None or jitter with chosen_by='experts'")
        wanted = "False with chosen_by='experts', whose load is even"
        check(self, not self.balance_by_bias, "balance_by_bias", wanted)

    def capacity(self, num_tokens: int, num_experts: int, *, training: bool) -> int | None:
        """Return the number of rows in each expert's buffer for ``num_tokens`` tokens; None if nothing is dropped."""
        factor = self.capacity_factor if training else self.eval_capacity_factor
        if factor is None:
            return None
        return expert_capacity(
            num_tokens, num_experts, factor, k=self.k, min_capacity=self.min_capacity
        )


class Router(nnx.Module):
    """The module of a router: a linear map to a logit for each expert, and the choice of experts, all in float32."""

    def __init__(
        self,
        config: RouterConfig,
        d_model: int,
        num_experts: int,
        *,
        std: float,
        rngs: nnx.Rngs,
    ):
        self.logits = Dense(
            d_model, num_experts, bias=False, std=std, axes=("embed", None), rngs=rngs
        )
        # Rounded logits would select other experts.
        self.logits.kernel.set_metadata(BY_NAME, "router")
        self.balance_bias = (
            nnx.Param(jnp.zeros(num_experts), axes=(None,)) if config.balance_by_bias else None
        )
        self.config = config

    def __call__(
        self,
        x: Float[Array, "tokens d_model"],
        used: Bool[Array, "tokens"] | None = None,
        key: PRNGKeyArray | None = None,
        *,
        drops: bool = True,
    ) -> tuple[Routing | ExpertChoice, Float[Array, ""], dict[str, Array]]:
        """Return the routing of tokens that share a capacity, the auxiliary loss, and statistics.

        Args:
            x: The tokens.
            used: False at padding.
            key: The key in training; None outside training, where nothing is random and ``eval_capacity_factor`` applies.
            drops: Whether experts have a capacity at all.

        Raises:
            ValueError: Experts choose tokens, but have no capacity.
        """
        config = self.config
        keys: Any = (None, None) if key is None else jax.random.split(key)
        noise_key, priority_key = keys
        noise: Any = None if key is None else config.noise
        x = x.astype(jnp.float32)
        if noise == "jitter":
            x = x * jax.random.uniform(noise_key, x.shape, minval=1 - JITTER, maxval=1 + JITTER)
        logits = self.logits(x)
        probs = jax.nn.softmax(logits) if config.score == "softmax" else jax.nn.sigmoid(logits)
        if config.chosen_by == "experts":
            return self._experts_choose(probs, logits, used, training=key is not None, drops=drops)
        scores: Any = logits if self.balance_bias is None else probs
        if self.balance_bias is not None:
            bias = jax.lax.stop_gradient(self.balance_bias.get_value())
            scores = scores + bias.astype(jnp.float32)[None]
        if noise in ("gumbel", "gumbel_second"):
            noisy = scores + jax.random.gumbel(noise_key, scores.shape)
            scores = noisy if noise == "gumbel" else _first_as_before(scores, noisy)
        usual = config.score == "softmax" and self.balance_bias is None
        if key is None and not drops and usual and decoding.kernel_routes(logits):
            divided = config.normalize != "none" if config.normalize else config.k > 1
            routing = decoding.route(logits, config.k, used, normalize=divided)
        else:
            routing = top_k_routing(
                probs,
                config.k,
                capacity=config.capacity(*probs.shape, training=key is not None) if drops else None,
                scores=scores,
                used=used,
                priority=config.priority
                if key is not None or config.priority != "random"
                else None,
                normalize=config.normalize,
                key=priority_key,
            )
        if config.scale != 1.0:
            routing = dataclasses.replace(routing, weights=config.scale * routing.weights)

        whole = self._distribution(probs)
        found = router_statistics(whole, routing, used)
        which = config.balance_choices or ("first" if config.k <= 2 else "all")
        counted = routing.experts[:, :1] if which == "first" else routing.experts
        balance = load_balance(whole, counted, used)
        found["balance"] = jax.lax.stop_gradient(balance)
        aux = config.balance * balance
        if self.balance_bias is not None:
            aux = aux + nudge(self.balance_bias.get_value().astype(jnp.float32), found["load"])
        if config.z_loss:
            aux = aux + config.z_loss * z_loss(logits, used)
        return routing, aux, found

    def _experts_choose(
        self, probs: Array, logits: Array, used: Array | None, *, training: bool, drops: bool
    ) -> tuple[ExpertChoice, Array, dict[str, Array]]:
        config = self.config
        capacity = config.capacity(*probs.shape, training=training)
        if capacity is None or not drops:
            raise ValueError(
                "RouterConfig.chosen_by='experts' cannot be decoded, as experts choose among all tokens together. Use chosen_by='tokens'."
            )
        routing = expert_choice(probs, capacity, used=used)
        if config.scale != 1.0:
            routing = dataclasses.replace(routing, weights=config.scale * routing.weights)
        found = expert_choice_statistics(self._distribution(probs), routing, used)
        aux = config.z_loss * z_loss(logits, used) if config.z_loss else jnp.float32(0)
        return routing, aux, found

    def _distribution(self, probs: Array) -> Array:
        """Return probabilities that sum to 1, for any score."""
        if self.config.score == "softmax":
            return probs
        return probs / jnp.maximum(probs.sum(-1, keepdims=True), jnp.finfo(jnp.float32).eps)


def _first_as_before(scores: Array, noisy: Array) -> Array:
    """Return noisy scores in which the highest score without noise stays the first."""
    first = jax.nn.one_hot(scores.argmax(-1), scores.shape[-1], dtype=bool)
    return jnp.where(first, jnp.inf, noisy)
