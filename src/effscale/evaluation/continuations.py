"""Log-probabilities of continuations of a context."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

from effscale.models import Transformer, matmul
from effscale.models.config import SaysWhetherCausal
from effscale.models.weights import transpose

BUCKET = 32
"""The unit of padding: rows are padded to 1, 2, 3, 4, 6, 8, 12, ... times this number of tokens (continuations: a
quarter of it), so that few shapes are compiled."""


class ContinuationScores(NamedTuple):
    """The result of ``score_continuations``.

    Attributes:
        log_probs: The log-probability of each whole continuation, in nats.
        greedy: Whether each continuation is what greedy decoding would produce.
        cut: The number of contexts that were cut at the beginning.
    """

    log_probs: Shaped[np.ndarray, "items"]
    greedy: Shaped[np.ndarray, "items"]
    cut: int


def score_continuations(
    model: Any,
    contexts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    *,
    batch_size: int = 8,
    max_length: int | None = None,
) -> ContinuationScores:
    """Return the log-probabilities of continuations, each after its own context.

    Rows of similar length share a batch and are padded on the right, and each length is compiled once. Logits are computed only
    for the continuations.

    Args:
        model: A causal ``effscale.models.Transformer`` with a head named ``lm``; its weights may be packed. The experts of a
            mixture must have no capacity (``RouterConfig(eval_capacity_factor=None)``), as rows of a batch would compete for it.
            Or any other pytree that can be called: given token ids of shape ``(rows, length)``, padded on the right, it returns
            logits of shape ``(rows, length, vocab)``; for instance an nnx module, or ``jax.tree_util.Partial(apply, params)``.
        contexts: Token ids, at least one for each context, such as the token that begins a text.
        continuations: Token ids, one continuation for each context.
        batch_size: The number of rows in a batch.
        max_length: The maximum number of tokens that the model reads; a longer context loses its beginning. None uses the
            number of positions of a Transformer, and no limit for other models.

    Raises:
        ValueError: A context or continuation is empty, their numbers differ, a continuation has more than ``max_length``
            tokens, or the experts of the model choose their tokens, which depends on later tokens.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=64)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> score_continuations(model, [[1, 2], [1]], [[3], [4, 5]]).log_probs.shape
        (2,)
    """
    if len(contexts) != len(continuations):
        raise ValueError(
            f"continuations must have one entry for each of the {len(contexts)} contexts, got {len(continuations)}"
        )
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(model, Transformer):
        for number, block in enumerate(model.config.layers):
            part = block.feed_forward
            if isinstance(part, SaysWhetherCausal) and not part.causal:
                raise ValueError(
                    f"the feed-forward of layer {number} depends on later tokens (as experts with chosen_by='experts' do), so the probability of a continuation is undefined"
                )
    positions = model.config.max_length if isinstance(model, Transformer) else None
    limits = [limit for limit in (max_length, positions) if limit is not None]
    max_length = min(limits, default=None)
    rows, cut = [], 0
    for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
        if not len(context) or not len(continuation):
            empty = "context" if not len(context) else "continuation"
            raise ValueError(f"the {empty} of item {number} is empty")
        # The last token of a row is predicted but not read.
        ids = [*context, *continuation]
        if max_length is not None and len(ids) - 1 > max_length:
            if len(continuation) > max_length:
                raise ValueError(
                    f"the continuation of item {number} must have at most max_length={max_length} tokens, got {len(continuation)}"
                )
            ids, cut = ids[-max_length - 1 :], cut + 1
        rows.append((ids, len(continuation)))
    log_probs, greedy = np.zeros(len(rows), np.float32), np.zeros(len(rows), bool)
    order = sorted(range(len(rows)), key=lambda i: (-len(rows[i][0]), i))
    for start in range(0, len(order), batch_size):
        places = order[start : start + batch_size]
        found = _score(model, *_batch([rows[i] for i in places], batch_size, max_length))
        log_probs[places], greedy[places] = (np.asarray(x)[: len(places)] for x in found)
    return ContinuationScores(log_probs, greedy, cut)


def _batch(
    rows: Sequence[tuple[Sequence[int], int]], size: int, limit: int | None
) -> tuple[np.ndarray, ...]:
    """Return the tokens to read, the positions where continuations are predicted, the labels there, and which of these are real."""
    length = padded(max(len(ids) for ids, _ in rows) - 1, BUCKET)
    if limit is not None:
        length = min(length, limit)
    width = min(padded(max(count for _, count in rows), BUCKET // 4), length)
    tokens = np.zeros((size, length), np.int32)
    lengths = np.ones(size, np.int32)
    where, labels = (np.zeros((size, width), np.int32) for _ in range(2))
    real = np.zeros((size, width), bool)
    for row, (ids, count) in enumerate(rows):
        end = len(ids) - 1
        tokens[row, :end], lengths[row] = ids[:-1], end
        where[row, :count] = np.arange(end - count, end)
        labels[row, :count] = ids[-count:]
        real[row, :count] = True
    return tokens, lengths, where, labels, real


def padded(count: int, unit: int) -> int:
    """Return the smallest of 1, 2, 3, 4, 6, 8, 12, 16, ... units that is at least ``count``."""
    units = -(-count // unit)
    power = 1
    while True:
        for step in (power, power * 3 // 2):
            if step >= units:
                return step * unit
        power *= 2


@jax.jit
def _score(
    model: Any,
    tokens: Int[Array, "rows length"],
    lengths: Int[Array, "rows"],
    where: Int[Array, "rows width"],
    labels: Int[Array, "rows width"],
    real: Bool[Array, "rows width"],
) -> tuple[Float[Array, "rows"], Bool[Array, "rows"]]:
    if isinstance(model, Transformer):
        mask = jnp.arange(tokens.shape[1])[None] < lengths[:, None]
        hidden = model.encode(tokens, attention_mask=mask).hidden
        picked = jnp.take_along_axis(hidden, where[..., None], axis=1)
        x, weight, bias = model.heads["lm"].linear(picked, model.embed)
        table = transpose(weight)
        logits_of = lambda x: matmul(x, table, bias)
    else:
        x = jnp.take_along_axis(model(tokens), where[..., None], axis=1)
        logits_of = lambda logits: logits

    def of_row(inputs: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        x, labels, real = inputs
        logits = logits_of(x).astype(jnp.float32)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)[:, 0]
        said = (logits.argmax(1) == labels) | ~real
        return jnp.where(real, chosen, 0).sum(), said.all()

    return jax.lax.map(of_row, (x, labels, real))
