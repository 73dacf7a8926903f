"""The compiled loop over new tokens, in parts: the beginning, one token, and a given number of tokens."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from effscale.generation.config import SamplingConfig
from effscale.generation.processors import History, LogitsProcessor, may_forbid_all, process, warp
from effscale.generation.sampling import choose
from effscale.models import Transformer, empty_cache, matmul, unroll
from effscale.models.stacking import for_decoding
from effscale.models.weights import transpose

# Each size of the cache is compiled separately: at most STAGES sizes, each for at least this many tokens.
STAGES = 4
STAGE_TOKENS = 32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that a compiled loop depends on."""

    config: SamplingConfig
    """Sampling options."""
    processors: tuple[LogitsProcessor, ...] = ()
    """Custom functions of the logits."""
    log_probs: bool = False
    """Whether to keep the log-probabilities of the new tokens."""
    logits: bool = False
    """Whether to keep the model's logits for each new token."""
    scores: bool = False
    """Whether to keep the scores that each new token was drawn from."""


class Constants(NamedTuple):
    """The values that the loop reads but does not change."""

    model: Transformer
    table: Any
    mask: Bool[Array, "batch seq"]
    key: PRNGKeyArray


class Carry(NamedTuple):
    """The values that the loop passes from token to token; None if the plan does not need them."""

    step: Int[Array, ""]
    cache: Any
    tokens: Int[Array, "batch total"]
    finished: Bool[Array, "batch"]
    failed: Bool[Array, "batch"]
    num_new: Int[Array, "batch"]
    token: Int[Array, "batch"]
    seen: Bool[Array, "batch vocab"] | None
    log_probs: Float[Array, "batch new"] | None
    logits: Float[Array, "batch new vocab"] | None
    scores: Float[Array, "batch new vocab"] | None


def ready(model: Transformer) -> Transformer:
    """Return the model in the form that the loop reads; arrays already in that form are not copied."""
    return for_decoding(unroll(model))


def begin(
    model: Transformer,
    prompt: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    plan: Plan,
) -> tuple[Constants, Carry]:
    """Read the prompt and draw the first token of each row, with a model prepared by ``ready``."""
    config = plan.config
    length, new = prompt.shape[1], config.max_new_tokens
    cache = empty_cache(model.config, prompt.shape[0], stages(length, new)[0])
    encoded = model.encode(prompt, attention_mask=mask, cache=cache)
    hidden = encoded.hidden[:, -1]
    # Transpose the head's weight once, because reading it against its row order at each token is slower.
    weight = model.heads["lm"].linear(hidden, model.embed)[1]
    table = jax.lax.optimization_barrier(transpose(weight))
    hidden, cache, prompt, mask = _repeated(
        (hidden, encoded.cache, prompt, mask), config.num_return_sequences
    )
    batch, vocab = prompt.shape[0], weight.shape[0]
    seen = None
    if config.repetition_penalty != 1.0:
        seen = jnp.zeros((batch, vocab), bool)
        seen = seen.at[jnp.arange(batch)[:, None], prompt].max(mask)
    room = lambda wanted, *shape: jnp.zeros((batch, new, *shape), jnp.float32) if wanted else None
    tokens = jnp.full((batch, length + new), config.pad_token_id, jnp.int32)
    carry = Carry(
        step=jnp.int32(0),
        cache=cache,
        tokens=jax.lax.dynamic_update_slice_in_dim(tokens, prompt, 0, 1),
        finished=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
        num_new=jnp.zeros(batch, jnp.int32),
        token=prompt[:, -1],
        seen=seen,
        log_probs=room(plan.log_probs),
        logits=room(plan.logits, vocab),
        scores=room(plan.scores, vocab),
    )
    constants = Constants(model, table, mask, key)
    return constants, append(constants, carry, hidden, plan)


def advance(constants: Constants, carry: Carry, until: int | Int[Array, ""], plan: Plan) -> Carry:
    """Draw tokens until each row has ``until`` of them or has ended; the cache must have room for them."""

    def body(carry: Carry) -> Carry:
        # Tokens of finished rows count as padding, which routers ignore.
        unfinished = ~carry.finished[:, None]
        encoded = constants.model.encode(
            carry.token[:, None], attention_mask=unfinished, cache=carry.cache
        )
        carry = carry._replace(cache=encoded.cache)
        return append(constants, carry, encoded.hidden[:, -1], plan)

    more = lambda carry: (carry.step < until) & ~carry.finished.all()
    return jax.lax.while_loop(more, body, carry)


def append(
    constants: Constants, carry: Carry, hidden: Float[Array, "batch d_model"], plan: Plan
) -> Carry:
    """Draw one token for each row from the hidden states of the last token."""
    config = plan.config
    raw = _logits(constants, hidden)
    # One reduction is enough: a maximum is NaN if any logit is, and minus infinity only if all are.
    failed = ~jnp.isfinite(raw.max(-1))
    history = _history(constants, carry)
    logits = process(raw, history, config, plan.processors, seen=carry.seen)
    if may_forbid_all(config, plan.processors):
        failed |= ~jnp.isfinite(logits.max(-1))
    failed &= ~carry.finished
    token = choose(logits, config, jax.random.fold_in(constants.key, carry.step))

    def kept(room: Array | None, new: Array) -> Array | None:
        """Write the values of this token into the array of all tokens; rows that have ended keep 0."""
        if room is None:
            return None
        ended = jnp.expand_dims(carry.finished, range(1, new.ndim))
        new = jnp.where(ended, 0.0, new)
        return jax.lax.dynamic_update_slice_in_dim(room, new[:, None], carry.step, 1)

    log_probs = None if carry.log_probs is None else _log_prob(raw, token, config)
    chosen = jnp.where(carry.finished, config.pad_token_id, token)
    stops = jnp.asarray(config.stop_token_ids, jnp.int32)
    rows = jnp.arange(chosen.shape[0])
    return Carry(
        step=carry.step + 1,
        cache=carry.cache,
        tokens=jax.lax.dynamic_update_slice_in_dim(
            carry.tokens, chosen[:, None], history.filled, 1
        ),
        finished=carry.finished | failed | (chosen[:, None] == stops[None]).any(1),
        failed=carry.failed | failed,
        num_new=carry.num_new + (~carry.finished).astype(jnp.int32),
        token=chosen,
        seen=None if carry.seen is None else carry.seen.at[rows, chosen].set(True),
        log_probs=None if log_probs is None else kept(carry.log_probs, log_probs),
        logits=kept(carry.logits, raw),
        scores=None if carry.scores is None else kept(carry.scores, warp(logits, config)),
    )


def stages(length: int, new: int) -> list[int]:
    """Return the sizes of the cache: it grows in a few stages, so that early tokens do not read slots that are still empty."""
    count = max(1, min(STAGES, new // STAGE_TOKENS))
    return [length + new * (i + 1) // count for i in range(count)]


def answered(carry: Carry, new: int) -> Bool[Array, "batch new"]:
    """Return a mask that is True at the answers' tokens so far."""
    return jnp.arange(new)[None] < carry.num_new[:, None]


def _repeated(tree: Any, times: int) -> Any:
    """Repeat each row of all arrays ``times`` times in succession; the cache's slot count is unchanged."""
    if times == 1:
        return tree
    return jax.tree.map(lambda a: jnp.repeat(a, times, axis=0) if a.ndim else a, tree)


def _logits(
    constants: Constants, hidden: Float[Array, "batch d_model"]
) -> Float[Array, "batch vocab"]:
    x, _, bias = constants.model.heads["lm"].linear(hidden, constants.model.embed)
    logits = matmul(x, constants.table).astype(jnp.float32)
    return logits if bias is None else logits + bias.astype(jnp.float32)[None]


def _history(constants: Constants, carry: Carry) -> History:
    length = constants.mask.shape[1]
    new = carry.tokens.shape[1] - length
    mask = jnp.concatenate([constants.mask, answered(carry, new)], 1)
    return History(carry.tokens, mask, carry.step, length + carry.step)


def _log_prob(
    logits: Float[Array, "batch vocab"], token: Int[Array, "batch"], config: SamplingConfig
) -> Float[Array, "batch"]:
    if not config.greedy:
        logits = logits / config.temperature
    chosen = jnp.take_along_axis(logits, token[:, None], 1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
