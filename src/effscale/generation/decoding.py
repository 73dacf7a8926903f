"""Autoregressive generation: one prefill, then one compiled loop over a cache."""

import dataclasses
import typing
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from effscale.generation.sampling import SamplingConfig, choose, penalize
from effscale.models import (
    Transformer,
    empty_cache,
    for_decoding,
    grow_cache,
    matmul,
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
    """What :func:`decode` and :func:`effscale.generation.generate` return.

    Attributes:
        tokens: Prompt and answer; ``pad_id`` after the end of a row.
        mask: True at the prompt's real tokens and at the answer's, its stop token included.
        num_new: Length of each answer, its stop token included.
        failed: Whether a row ended because its logits became NaN or infinite.
        log_probs: For each new token its log-probability under ``softmax(logits / temperature)`` (temperature 1 where greedy),
            before penalty and filters, in float32; 0 after the end of a row. None unless they were asked for.
    """

    tokens: Int[Array, "batch total"]
    mask: Bool[Array, "batch total"]
    num_new: Int[Array, "batch"]
    failed: Bool[Array, "batch"]
    log_probs: Float[Array, "batch new"] | None = None


@jax.jit(static_argnames=("config", "log_probs"))
def decode(
    model: Transformer,
    prompt: Int[Array, "batch seq"],
    config: SamplingConfig,
    *,
    attention_mask: Shaped[Array, "batch seq"] | None = None,
    key: PRNGKeyArray | None = None,
    log_probs: bool = False,
) -> Generated:
    """Continues each row of a prompt that lies on the devices: :func:`effscale.generation.generate` without its checks.

    Nothing goes to the host, so it can be part of a compiled loop, such as that of reinforcement learning. Token ids must lie
    in the vocabulary, and padding on the left.

    Decoding needs each layer's weights as separate arrays, so a stacked model is copied at each call. To copy it only once, give
    ``effscale.models.unroll(model)``.

    Args:
        model: A causal model with a head named ``lm``.
        prompt: Token ids.
        config: Length, filters and stop tokens.
        attention_mask: Nonzero at real tokens; None: all are real.
        key: For sampling; may be left out only when greedy.
        log_probs: Whether to return the new tokens' log-probabilities, which costs one pass over the logits of each token.

    Returns:
        Tokens, masks and lengths; see :class:`Generated`.

    Raises:
        ValueError: While tracing: ``key`` is missing, or the prompt and ``max_new_tokens`` exceed the model's positions.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2, unroll
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=32)
        >>> model = unroll(Transformer(tiny, rngs=nnx.Rngs(0)))
        >>> greedy = SamplingConfig(max_new_tokens=5, temperature=0.0)
        >>> decode(model, jnp.array([[3, 1, 4]]), greedy, log_probs=True).log_probs.shape
        (1, 5)
    """
    if key is None:
        if not config.greedy:
            raise ValueError(
                "sampling needs a key, such as jax.random.key(0); temperature=0 needs none"
            )
        key = jax.random.key(0)  # nothing is drawn
    mask = jnp.ones(prompt.shape) if attention_mask is None else attention_mask
    mask = mask.astype(bool)
    batch, length = prompt.shape
    total = length + config.max_new_tokens
    model = for_decoding(unroll(model))  # once, outside the loop
    rows = jnp.arange(batch)
    stops = jnp.asarray(config.stop_ids, jnp.int32)

    def next_logits(hidden: Float[Array, "batch d_model"]) -> Float[Array, "batch vocab"]:
        x, _, bias = model.heads["lm"].linear(hidden, model.embed)
        logits = matmul(x, table).astype(jnp.float32)
        return logits if bias is None else logits + bias.astype(jnp.float32)[None]

    def append(carry: _Carry, hidden: Float[Array, "batch d_model"]) -> _Carry:
        logits = next_logits(hidden)
        # One reduction tells: a maximum is NaN if any logit is, and minus infinity only if all are.
        failed = ~carry.finished & ~jnp.isfinite(logits.max(-1))
        raw = logits
        if carry.seen is not None:
            logits = penalize(logits, carry.seen, config.repetition_penalty)
        token = choose(logits, config, jax.random.fold_in(key, carry.step))
        log_probs = carry.log_probs
        if log_probs is not None:
            new = jnp.where(carry.finished, 0.0, _log_prob(raw, token, config))
            log_probs = jax.lax.dynamic_update_slice_in_dim(log_probs, new[:, None], carry.step, 1)
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
            log_probs=log_probs,
        )

    def body(carry: _Carry) -> _Carry:
        # The tokens of finished rows are padding, which routers ignore.
        unfinished = ~carry.finished[:, None]
        encoded = model.encode(carry.token[:, None], attention_mask=unfinished, cache=carry.cache)
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
        log_probs=jnp.zeros((batch, config.max_new_tokens), jnp.float32) if log_probs else None,
    )
    carry = append(start, encoded.hidden[:, -1])
    for end in ends:
        carry = carry._replace(cache=grow_cache(carry.cache, end))
        more = lambda c, end=end: (c.step < end - length) & ~c.finished.all()
        carry = jax.lax.while_loop(more, body, carry)
    answered = jnp.arange(config.max_new_tokens)[None] < carry.num_new[:, None]
    whole = jnp.concatenate([mask, answered], 1)
    return Generated(carry.tokens, whole, carry.num_new, carry.failed, carry.log_probs)


def _log_prob(
    logits: Float[Array, "batch vocab"], token: Int[Array, "batch"], config: SamplingConfig
) -> Float[Array, "batch"]:
    if not config.greedy:
        logits = logits / config.temperature
    chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)


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
    log_probs: Array | None


def _stages(length: int, new: int) -> list[int]:
    """Sizes of the cache: it grows a few times, so that early tokens do not read slots that are still empty."""
    count = max(1, min(STAGES, new // STAGE_TOKENS))
    return [length + new * (i + 1) // count for i in range(count)]
