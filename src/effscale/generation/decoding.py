"""Autoregressive generation: one prefill, then one compiled loop over a cache."""

import dataclasses
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation.sampling import SamplingConfig, choose, penalize
from effscale.models import (
    TokenInputs,
    Transformer,
    empty_cache,
    grow_cache,
    transpose,
    unroll,
)

# Each size of the cache is compiled on its own: at most so many, each for at least so many tokens.
STAGES = 4
STAGE_TOKENS = 32


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What :func:`generate` returns.

    Attributes:
        tokens: Prompt and answer; ``pad_id`` after the end of a row.
        mask: True at the prompt's real tokens and at the answer's, its stop token included.
        num_new: Length of each answer, its stop token included.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    num_new: Int[Array, "batch"]


def generate(
    model: Transformer,
    prompt: Any,
    config: SamplingConfig | None = None,
    *,
    attention_mask: Any = None,
    key: PRNGKeyArray | None = None,
) -> Generated:
    """Continues each row of ``prompt``.

    Args:
        model: A causal model with a head named ``lm``.
        prompt: Token ids of shape ``(batch, seq)``, padded on the left; :func:`left_pad` makes one from lists.
        config: Length, filters and stop tokens.
        attention_mask: ``(batch, seq)``, nonzero at real tokens; None: all are real.
        key: For sampling; may be left out only when greedy. The same key gives the same tokens, and a row's tokens
            do not depend on the other rows.

    Returns:
        Tokens of shape ``(batch, seq + max_new_tokens)``, their mask, and each answer's length.

    Raises:
        ValueError: If the model is not causal or has no ``lm`` head, prompt and answer exceed its positions, a prompt
            is empty or padded on the right, a token id is out of range, or a key is missing.

    Example:
        >>> import jax
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=32)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> out = generate(model, [[3, 1, 4]], SamplingConfig(max_new_tokens=5, temperature=0.0))
        >>> out.tokens.shape
        (1, 8)
    """
    config = SamplingConfig() if config is None else config
    prompt = np.asarray(prompt, np.int32)
    mask = (
        np.ones(prompt.shape, bool)
        if attention_mask is None
        else np.asarray(attention_mask).astype(bool)
    )
    _check(model, prompt, mask, config, key)
    return _generate(model, prompt, mask, jax.random.key(0) if key is None else key, config)


def _check(
    model: Transformer, prompt: np.ndarray, mask: np.ndarray, config: SamplingConfig, key: Any
) -> None:
    inputs = model.config.inputs
    if not (model.config.causal and "lm" in model.heads and isinstance(inputs, TokenInputs)):
        raise ValueError("generate needs a causal model with a head named 'lm'")
    if prompt.ndim != 2 or prompt.shape[1] == 0:
        raise ValueError(
            f"prompt of shape {prompt.shape}: must be (batch, seq) with seq at least 1"
        )
    if mask.shape != prompt.shape:
        raise ValueError(
            f"attention_mask of shape {mask.shape}: must be that of the prompt, {prompt.shape}"
        )
    if not mask[:, -1].all():
        rows = np.flatnonzero(~mask[:, -1])[:5].tolist()
        raise ValueError(
            f"rows {rows} of the prompt are padded on the right or empty; pad on the left (see left_pad)"
        )
    vocab = inputs.vocab_size
    wrong = [
        i
        for i in (int(prompt.min()), int(prompt.max()), config.pad_id, *config.stop_ids)
        if not 0 <= i < vocab
    ]
    if wrong:
        raise ValueError(f"token id {wrong[0]} is outside the model's vocabulary of {vocab}")
    total, limit = prompt.shape[1] + config.max_new_tokens, model.config.max_length
    if limit is not None and total > limit:
        raise ValueError(
            f"a prompt of {prompt.shape[1]} and max_new_tokens={config.max_new_tokens} make {total} tokens, but the model "
            f"has {limit} positions; at most {max(limit - prompt.shape[1], 0)} new tokens fit"
        )
    if key is None and not config.greedy:
        raise ValueError(
            "sampling needs a key, such as jax.random.key(0); temperature=0 needs none"
        )


@jax.jit(static_argnames="config")
def _generate(
    model: Transformer, prompt: Array, mask: Array, key: PRNGKeyArray, config: SamplingConfig
) -> Generated:
    batch, length = prompt.shape
    total = length + config.max_new_tokens
    model = unroll(model)  # once, outside the loop
    rows = jnp.arange(batch)
    stops = jnp.asarray(config.stop_ids, jnp.int32)
    penalized = config.repetition_penalty != 1.0

    def next_token(hidden: Float[Array, "batch d_model"], seen: Any, step: Array) -> Array:
        x, _, bias = model.heads["lm"].linear(hidden, model.embed)
        logits = (x @ table.astype(x.dtype)).astype(jnp.float32)
        if bias is not None:
            logits = logits + bias.astype(jnp.float32)[None]
        if penalized:
            logits = penalize(logits, seen, config.repetition_penalty)
        return choose(logits, config, jax.random.fold_in(key, step))

    def append(carry: _Carry, hidden: Float[Array, "batch d_model"]) -> _Carry:
        token = next_token(hidden, carry.seen, carry.step)
        token = jnp.where(carry.finished, config.pad_id, token)
        return _Carry(
            step=carry.step + 1,
            cache=carry.cache,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                carry.tokens, token[:, None], length + carry.step, 1
            ),
            finished=carry.finished | (token[:, None] == stops[None]).any(1),
            num_new=carry.num_new + (~carry.finished).astype(jnp.int32),
            seen=None if carry.seen is None else carry.seen.at[rows, token].set(True),
            token=token,
        )

    def body(carry: _Carry) -> _Carry:
        encoded = model.encode(carry.token[:, None], cache=carry.cache)
        return append(carry._replace(cache=encoded.cache), encoded.hidden[:, -1])

    ends = _stages(length, config.max_new_tokens)
    cache = empty_cache(model.config, batch, ends[0])
    encoded = model.encode(prompt, attention_mask=mask, cache=cache)
    # The head's weight, transposed once rather than read against its rows at each token.
    weight = model.heads["lm"].linear(encoded.hidden[:, -1], model.embed)[1]
    table = jax.lax.optimization_barrier(transpose(weight))
    tokens = jnp.full((batch, total), config.pad_id, jnp.int32)
    seen = None
    if penalized:
        seen = jnp.zeros((batch, weight.shape[0]), bool)
        seen = seen.at[rows[:, None], prompt].max(mask)
    start = _Carry(
        step=jnp.int32(0),
        cache=encoded.cache,
        tokens=jax.lax.dynamic_update_slice_in_dim(tokens, prompt, 0, 1),
        finished=jnp.zeros(batch, bool),
        num_new=jnp.zeros(batch, jnp.int32),
        seen=seen,
        token=prompt[:, -1],
    )
    carry = append(start, encoded.hidden[:, -1])
    for end in ends:
        carry = carry._replace(cache=grow_cache(carry.cache, end))
        more = lambda c, end=end: (c.step < end - length) & ~c.finished.all()
        carry = jax.lax.while_loop(more, body, carry)
    answered = jnp.arange(config.max_new_tokens)[None] < carry.num_new[:, None]
    return Generated(carry.tokens, jnp.concatenate([mask, answered], 1), carry.num_new)


class _Carry(NamedTuple):
    """What the loop hands from token to token."""

    step: Array
    cache: Any
    tokens: Array
    finished: Array
    num_new: Array
    seen: Array | None
    token: Array


def _stages(length: int, new: int) -> list[int]:
    """Sizes of the cache: it grows a few times, so that early tokens do not read slots that are still empty."""
    count = max(1, min(STAGES, new // STAGE_TOKENS))
    return [length + new * (i + 1) // count for i in range(count)]


def left_pad(
    rows: list[list[int]], pad_id: int = 0
) -> tuple[Int[np.ndarray, "batch seq"], Bool[np.ndarray, "batch seq"]]:
    """Token lists of several lengths as one array, padded on the left, and its mask.

    Raises:
        ValueError: If there is no row or a row is empty.

    Example:
        >>> left_pad([[5, 6, 7], [8]])[0].tolist()
        [[5, 6, 7], [0, 0, 8]]
    """
    if not rows or not all(rows):
        raise ValueError("left_pad needs at least one row, and no row may be empty")
    width = max(map(len, rows))
    tokens = np.array([[pad_id] * (width - len(row)) + list(row) for row in rows], np.int32)
    mask = np.array([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return tokens, mask
