"""How the next token is chosen from logits."""

import dataclasses
from collections.abc import Iterable
from typing import SupportsIndex

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation.prompts import integers
from effscale.models.validation import check, is_finite, is_integer


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Which tokens may follow, and when a row ends.

    The filters act in this order: repetition penalty, temperature, ``top_k``, ``top_p``.

    Example:
        >>> SamplingConfig(temperature=0.8, top_k=50).greedy
        False
    """

    max_new_tokens: int = 128
    """Tokens after the prompt, at most."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token always."""
    top_k: int | None = None
    """Only the ``k`` most likely tokens may follow; None: all."""
    top_p: float = 1.0
    """Only the fewest tokens whose probabilities reach ``p`` may follow (Holtzman et al., 2019); 1: all."""
    repetition_penalty: float = 1.0
    """Tokens already in the row (prompt included) have a positive logit divided by it, a negative one multiplied
    (Keskar et al., 2019, section 4.1); 1: nothing."""
    stop_ids: SupportsIndex | Iterable[SupportsIndex] = ()
    """A row ends with the first of these that it draws. May be one id or any list, tuple or array of them, and is kept as a tuple."""
    pad_id: int = 0
    """Fills rows that have ended."""

    def __post_init__(self):
        # JAX needs a config that is hashable, and numbers that adapt to the type of the logits.
        for name in ("max_new_tokens", "top_k", "pad_id"):
            value = getattr(self, name)
            optional = name == "top_k" and value is None
            check(self, optional or is_integer(value), name, "an integer")
            object.__setattr__(self, name, None if optional else int(value))
        for name in ("temperature", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            check(self, is_finite(value), name, "a finite number")
            object.__setattr__(self, name, float(value))
        stops = integers(self.stop_ids)
        wanted = "an integer, or a list, tuple or array of integers"
        check(self, stops is not None and stops.ndim <= 1, "stop_ids", wanted)
        object.__setattr__(self, "stop_ids", () if stops is None else tuple(stops.ravel().tolist()))
        check(self, self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        sensible = self.temperature == 0 or self.temperature >= 1e-6
        check(self, sensible, "temperature", "0 (greedy), or at least 1e-6")
        check(self, self.top_k is None or self.top_k >= 1, "top_k", "at least 1, or None")
        check(self, 0 < self.top_p <= 1, "top_p", "in (0, 1]")
        check(self, self.repetition_penalty > 0, "repetition_penalty", "above 0")
        check(self, self.pad_id >= 0, "pad_id", "a token id")

    @property
    def greedy(self) -> bool:
        """Whether no randomness is involved."""
        return self.temperature == 0 or self.top_k == 1


def penalize(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: float
) -> Float[Array, "batch vocab"]:
    """Makes tokens already seen less likely; see :class:`SamplingConfig`."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """Minus infinity at all but the ``k`` largest logits of a row (ties with the last are kept)."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Minus infinity at all but the fewest tokens whose probabilities sum to at least ``p``; one always stays.

    Of equally likely tokens at the edge, those with the larger ids stay, as in transformers' ``TopPLogitsWarper``.
    """
    vocab = logits.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    ascending, order = jax.lax.sort((logits, index), num_keys=1)
    totals = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    first = jnp.minimum((totals <= 1 - p).sum(-1, keepdims=True), vocab - 1)
    least = jnp.take_along_axis(ascending, first, -1)
    tied = (logits == least) & (index >= jnp.take_along_axis(order, first, -1))
    return jnp.where((logits > least) | tied, logits, -jnp.inf)


def likeliest(logits: Float[Array, "batch vocab"]) -> Int[Array, "batch"]:
    """The first index of each row's maximum, as ``argmax``: as two plain reductions, which CPUs run in vectors."""
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    last = logits.shape[-1] - 1
    return jnp.where(logits == logits.max(-1, keepdims=True), index, last).min(-1)


def choose(
    logits: Float[Array, "batch vocab"], config: SamplingConfig, key: PRNGKeyArray
) -> Int[Array, "batch"]:
    """Draws one token a row. A row's draw depends on ``key`` and its index, not on the other rows.

    Args:
        logits: Unnormalized log-probabilities, penalized already where there is a penalty.
        config: Temperature and filters.
        key: Not used when greedy.

    Returns:
        Token ids, int32.
    """
    if config.greedy:
        return likeliest(logits)
    logits = logits / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(keys, logits).astype(jnp.int32)
