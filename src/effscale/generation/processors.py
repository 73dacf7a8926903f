"""Transformations of the logits before a token is drawn, and the order in which they are applied.

``process`` and ``warp`` define that order. Each step is a function of logits, and options that are off are skipped.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from effscale.generation.config import SamplingConfig


class History(NamedTuple):
    """The contents of the rows when their next token is chosen, as passed to custom processors.

    Attributes:
        tokens: Prompt and answer so far; columns from ``filled`` on are undefined.
        mask: True at the real tokens of the prompt and at those of the answer so far.
        step: Number of new tokens so far.
        filled: Number of filled columns of ``tokens``: those of the prompt, including padding, plus ``step``.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    step: Int[Array, ""]
    filled: Int[Array, ""]


LogitsProcessor = Callable[[Float[Array, "batch vocab"], History], Float[Array, "batch vocab"]]
"""A pure function of float32 logits and the history that JAX can trace; it returns the new logits."""


def process(
    logits: Float[Array, "batch vocab"],
    history: History,
    config: SamplingConfig,
    processors: Sequence[LogitsProcessor] = (),
    *,
    seen: Bool[Array, "batch vocab"] | None = None,
) -> Float[Array, "batch vocab"]:
    """Apply everything before the temperature, in the order of transformers.

    Args:
        logits: The model's logits, float32.
        history: The contents of the rows.
        config: Which options are on.
        processors: Custom functions, applied last.
        seen: Which tokens occur in each row; needed only with a repetition penalty.

    Raises:
        ValueError: While tracing: a processor returns something other than logits of the same shape.
    """
    if config.biases:
        logits = add_bias(logits, config.biases)
    if seen is not None:
        logits = penalize(logits, seen, config.repetition_penalty)
    if config.no_repeat_ngram_size:
        logits = forbid_repeated_ngrams(logits, history, config.no_repeat_ngram_size)
    if config.min_new_tokens and config.stop_token_ids:
        early = history.step < config.min_new_tokens
        logits = forbid(logits, np.asarray(config.stop_token_ids), early)
    for processor in processors:
        logits = _checked(processor, processor(logits, history), logits)
    return logits


def warp(
    logits: Float[Array, "batch vocab"], config: SamplingConfig
) -> Float[Array, "batch vocab"]:
    """Apply temperature and the filters after it, in the order of transformers; a temperature of 0 changes nothing."""
    if config.temperature == 0:
        return logits
    logits = logits / config.temperature
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = keep_min_p(logits, config.min_p)
    return logits


def may_forbid_all(config: SamplingConfig, processors: Sequence[LogitsProcessor]) -> bool:
    """Return whether ``process`` can exclude every token."""
    return bool(
        processors
        or config.no_repeat_ngram_size
        or (config.min_new_tokens and config.stop_token_ids)
        or any(bias == -math.inf for _, bias in config.biases)
    )


def add_bias(
    logits: Float[Array, "batch vocab"], biases: Sequence[tuple[int, float]]
) -> Float[Array, "batch vocab"]:
    """Add a value to the logits of each listed token, in every row."""
    bias = np.zeros(logits.shape[-1], logits.dtype)
    for token, value in biases:
        bias[token : token + 1] = value  # an id outside the vocabulary has no effect
    return logits + bias[None]


def penalize(
    logits: Float[Array, "batch vocab"], seen: Bool[Array, "batch vocab"], penalty: float
) -> Float[Array, "batch vocab"]:
    """Make tokens that were already seen less likely; see ``SamplingConfig``."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def forbid(
    logits: Float[Array, "batch vocab"], ids: Int[np.ndarray, "ids"], when: Bool[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Set the logits of some tokens to minus infinity in every row while ``when`` is true."""
    named = np.isin(np.arange(logits.shape[-1]), ids)
    return jnp.where(named[None] & when, -jnp.inf, logits)


def forbid_repeated_ngrams(
    logits: Float[Array, "batch vocab"], history: History, size: int
) -> Float[Array, "batch vocab"]:
    """Set the logit of each token to minus infinity that would complete ``size`` tokens which the row already contains.

    All places of a row are compared with its last ``size - 1`` tokens at the same time, so shapes do not change from token to
    token. Padding never counts as part of a repetition; transformers treats it as tokens.
    """
    tokens, mask = history.tokens, history.mask
    batch, total = tokens.shape
    places = total - size + 1
    if places < 1:
        return logits
    begin = history.filled - (size - 1)
    last = jax.lax.dynamic_slice_in_dim(tokens, begin, size - 1, 1)
    last_real = jax.lax.dynamic_slice_in_dim(mask, begin, size - 1, 1).all(1) & (begin >= 0)
    repeated = last_real[:, None] & mask[:, size - 1 :]
    for i in range(size - 1):
        same = tokens[:, i : i + places] == last[:, i : i + 1]
        repeated &= same & mask[:, i : i + places]
    rows = jnp.arange(batch)[:, None]
    ends = jnp.zeros(logits.shape, bool).at[rows, tokens[:, size - 1 :]].max(repeated)
    return jnp.where(ends, -jnp.inf, logits)


def keep_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """Set all but the ``k`` largest logits of a row to minus infinity (ties with the last are kept)."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][:, -1:]
    return jnp.where(logits < threshold, -jnp.inf, logits)


def keep_top_p(logits: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Set the logits outside the smallest set with probability at least ``p`` to minus infinity; one token always remains.

    Of equally likely tokens at the boundary, those with larger ids remain, as in transformers' ``TopPLogitsWarper``.
    """
    vocab = logits.shape[-1]
    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    ascending, order = jax.lax.sort((logits, index), num_keys=1)
    totals = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    first = jnp.minimum((totals <= 1 - p).sum(-1, keepdims=True), vocab - 1)
    least = jnp.take_along_axis(ascending, first, -1)
    tied = (logits == least) & (index >= jnp.take_along_axis(order, first, -1))
    return jnp.where((logits > least) | tied, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "batch vocab"], p: float) -> Float[Array, "batch vocab"]:
    """Set the logits of tokens less than ``p`` times as probable as the row's most likely one to minus infinity."""
    threshold = logits.max(-1, keepdims=True) + math.log(p)
    return jnp.where(logits < threshold, -jnp.inf, logits)


def _checked(processor: LogitsProcessor, new: Array, old: Array) -> Array:
    if getattr(new, "shape", None) != old.shape:
        name = getattr(processor, "__name__", repr(processor))
        given = getattr(new, "shape", type(new).__name__)
        raise ValueError(
            f"the processor {name} must return logits of shape {old.shape}, got {given}"
        )
    return new.astype(old.dtype)
