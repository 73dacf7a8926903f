"""Autoregressive generation: one prefill, then one compiled loop over a cache."""

import dataclasses
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation.sampling import SamplingConfig, choose, penalize
from effscale.models import Transformer, empty_cache, grow_cache, transpose, unroll

# Each size of the cache is compiled on its own: at most so many, each for at least so many tokens.
STAGES = 4
STAGE_TOKENS = 32


@typing.no_type_check  # JAX makes it of shapes and placeholders, too
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Generated:
    """What :func:`effscale.generation.generate` returns.

    Attributes:
        tokens: Prompt and answer; ``pad_id`` after the end of a row.
        mask: True at the prompt's real tokens and at the answer's, its stop token included.
        num_new: Length of each answer, its stop token included.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    num_new: Int[Array, "batch"]


@jax.jit(static_argnames="config")
def decode(
    model: Transformer,
    prompt: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    config: SamplingConfig,
) -> tuple[Generated, Int[Array, ""]]:
    """Continues each row; its arguments are those of :func:`effscale.generation.generate`, and must be valid.

    Returns:
        What was generated, and the first row whose logits became NaN or infinite, which ended it; -1 without one.
    """
    batch, length = prompt.shape
    total = length + config.max_new_tokens
    model = unroll(model)  # once, outside the loop
    rows = jnp.arange(batch)
    stops = jnp.asarray(config.stop_ids, jnp.int32)

    def next_logits(hidden: Float[Array, "batch d_model"]) -> Float[Array, "batch vocab"]:
        x, _, bias = model.heads["lm"].linear(hidden, model.embed)
        logits = (x @ table.astype(x.dtype)).astype(jnp.float32)
        return logits if bias is None else logits + bias.astype(jnp.float32)[None]

    def append(carry: _Carry, hidden: Float[Array, "batch d_model"]) -> _Carry:
        logits = next_logits(hidden)
        # One reduction tells: a maximum is NaN if any logit is, and minus infinity only if all are.
        failed = ~carry.finished & ~jnp.isfinite(logits.max(-1))
        if carry.seen is not None:
            logits = penalize(logits, carry.seen, config.repetition_penalty)
        token = choose(logits, config, jax.random.fold_in(key, carry.step))
        token = jnp.where(carry.finished, config.pad_id, token)
        return _Carry(
            step=carry.step + 1,
            cache=carry.cache,
            tokens=jax.lax.dynamic_update_slice_in_dim(
                carry.tokens, token[:, None], length + carry.step, 1
            ),
            finished=carry.finished | failed | (token[:, None] == stops[None]).any(1),
            failed=carry.failed | failed,
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
    if config.repetition_penalty != 1.0:
        seen = jnp.zeros((batch, weight.shape[0]), bool)
        seen = seen.at[rows[:, None], prompt].max(mask)
    start = _Carry(
        step=jnp.int32(0),
        cache=encoded.cache,
        tokens=jax.lax.dynamic_update_slice_in_dim(tokens, prompt, 0, 1),
        finished=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
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
    generated = Generated(carry.tokens, jnp.concatenate([mask, answered], 1), carry.num_new)
    return generated, jnp.where(carry.failed.any(), jnp.argmax(carry.failed), -1).astype(jnp.int32)


class _Carry(NamedTuple):
    """What the loop hands from token to token."""

    step: Array
    cache: Any
    tokens: Array
    finished: Array
    failed: Array
    num_new: Array
    seen: Array | None
    token: Array


def _stages(length: int, new: int) -> list[int]:
    """Sizes of the cache: it grows a few times, so that early tokens do not read slots that are still empty."""
    count = max(1, min(STAGES, new // STAGE_TOKENS))
    return [length + new * (i + 1) // count for i in range(count)]
