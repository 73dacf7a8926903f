"""How the next token is chosen from logits."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.models.validation import check


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
    stop_ids: tuple[int, ...] = ()
    """A row ends with the first of these that it draws."""
    pad_id: int = 0
    """Fills rows that have ended."""

    def __post_init__(self):
        check(self, self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        check(self, self.temperature >= 0, "temperature", "0 (greedy) or above")
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
    """Minus infinity at all but the fewest tokens whose probabilities sum to at least ``p``; one always stays."""
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    threshold = jnp.where(before < p, ordered, jnp.inf).min(-1, keepdims=True)
    return jnp.where(logits < threshold, -jnp.inf, logits)


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
