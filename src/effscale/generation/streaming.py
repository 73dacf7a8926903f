"""Streaming: the loop of ``effscale.generation.decode``, a few tokens at a time."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray

from effscale.generation.checks import (
    checked_key,
    checked_mask,
    checked_processors,
    checked_prompt,
    refuse_failures,
)
from effscale.generation.config import SamplingConfig
from effscale.generation.decoding import Generated, gathered, key_for
from effscale.generation.loop import Carry, Constants, Plan, advance, begin, ready, stages
from effscale.generation.processors import LogitsProcessor
from effscale.models import Transformer
from effscale.models.cache import grow_cache
from effscale.options import is_integer

_advance = jax.jit(advance, static_argnames="plan", donate_argnames="carry")


class Chunk(NamedTuple):
    """The next tokens of each row.

    Attributes:
        tokens: The new tokens; ``pad_token_id`` in rows that have ended.
        mask: True at the tokens of the answers, including their stop tokens.
    """

    tokens: Int[np.ndarray, "batch new"]
    mask: Bool[np.ndarray, "batch new"]


class Stream(Iterator[Chunk]):
    """An iterator over the tokens that a model draws; call ``stream`` to make one."""

    def __init__(
        self,
        model: Transformer,
        prompt: Int[np.ndarray, "batch seq"],
        mask: Bool[np.ndarray, "batch seq"],
        key: PRNGKeyArray,
        plan: Plan,
        chunk: int,
    ):
        self.plan, self.chunk = plan, chunk
        self._model, self._prompt, self._mask = model, prompt, mask
        model = ready(model)
        table, repeated, self._carry = _begin(model, prompt, mask, key, plan)
        self._constants = Constants(model, table, repeated, key)
        self._drawn = 1  # prefill draws the first token
        self._given = 0
        self._cut = False

    def __next__(self) -> Chunk:
        new = self.plan.config.max_new_tokens
        until = min(self._given + self.chunk, new)
        self._draw(until)
        carry = self._carry
        tokens, failed, num_new, finished = jax.device_get(
            (carry.tokens, carry.failed, carry.num_new, carry.finished)
        )
        refuse_failures(failed, self._model, self.plan.config, self.plan.processors)
        if finished.all():
            until = min(until, int(num_new.max()))
        if until <= self._given:
            raise StopIteration
        columns = np.arange(self._given, until)
        self._given = until
        return Chunk(tokens[:, self._prompt.shape[1] + columns], columns[None] < num_new[:, None])

    def prompts(self) -> list[list[int]]:
        """The prompt of each row, without padding."""
        rows = [ids[real].tolist() for ids, real in zip(self._prompt, self._mask, strict=True)]
        return [row for row in rows for _ in range(self.plan.config.num_return_sequences)]

    def stop(self, row: int, length: int) -> None:
        """End a row whose answer is its first ``length`` tokens; the other rows continue."""
        carry = self._carry
        self._carry = carry._replace(
            finished=carry.finished.at[row].set(True), num_new=carry.num_new.at[row].set(length)
        )
        self._cut = True

    def generated(self) -> Generated:
        """Return what was drawn so far, in the form of ``effscale.generation.generate``."""
        out = gathered(self._constants, self._carry)
        # The next chunk reuses the arrays of the carry.
        return _cut(out, self.plan.config) if self._cut else jax.tree.map(jnp.copy, out)

    def _draw(self, until: int) -> None:
        length = self._prompt.shape[1]
        for end in stages(length, self.plan.config.max_new_tokens):
            goal = min(until, end - length)
            if goal > self._drawn:
                carry = self._carry._replace(cache=grow_cache(self._carry.cache, end))
                self._carry = _advance(self._constants, carry, np.int32(goal), self.plan)
                self._drawn = goal


def stream(
    model: Transformer,
    prompt: Any,
    config: SamplingConfig | None = None,
    *,
    attention_mask: Any = None,
    key: PRNGKeyArray | None = None,
    chunk: int = 8,
    processors: Iterable[LogitsProcessor] = (),
    log_probs: bool = False,
    logits: bool = False,
    scores: bool = False,
) -> Stream:
    """Continue each row of ``prompt`` and yield the new tokens as they are drawn.

    The tokens are those of ``effscale.generation.generate`` with the same key, for any ``chunk``. One program is compiled that
    draws up to ``chunk`` tokens; between its calls, the cache stays on the devices.

    Args:
        model: A causal model with a head named ``lm``.
        prompt: Token ids of shape ``(batch, seq)``, padded on the left.
        config: Length, filters and stop tokens.
        attention_mask: ``(batch, seq)``, nonzero at real tokens; None: all are real.
        key: Key for sampling; optional if greedy.
        chunk: Number of tokens of each row to yield at a time.
        processors: Custom functions ``(logits, history) -> logits``; see ``effscale.generation.decode``.
        log_probs: Whether ``stream(...).generated()`` includes the log-probabilities of the new tokens.
        logits: Whether it includes the model's logits.
        scores: Whether it includes the scores that each token was drawn from.

    Returns:
        An iterator over ``Chunk``, which ends when every row has ended. Its method ``stop(row, length)`` ends a row early,
        and ``generated()`` returns everything drawn so far.

    Raises:
        ValueError: As ``effscale.generation.generate``; unusable logits raise it when their chunk is requested.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> tiny = gpt2(num_layers=2, d_model=16, num_heads=2, vocab_size=50, max_length=32)
        >>> model = Transformer(tiny, rngs=nnx.Rngs(0))
        >>> greedy = SamplingConfig(max_new_tokens=5, temperature=0.0)
        >>> [new.tokens.shape for new in stream(model, [[3, 1, 4]], greedy, chunk=2)]
        [(1, 2), (1, 2), (1, 1)]
    """
    config = SamplingConfig() if config is None else config
    if not is_integer(chunk) or chunk < 1:
        raise ValueError(f"chunk must be an integer of at least 1, got {chunk!r}")
    tokens = checked_prompt(model, prompt, config)
    mask = checked_mask(attention_mask, tokens)
    plan = Plan(
        config=config,
        processors=checked_processors(processors),
        log_probs=log_probs,
        logits=logits,
        scores=scores,
    )
    return Stream(model, tokens, mask, key_for(config, checked_key(key)), plan, chunk)


@jax.jit(static_argnames="plan")
def _begin(
    model: Transformer,
    prompt: Int[Array, "batch seq"],
    mask: Bool[Array, "batch seq"],
    key: PRNGKeyArray,
    plan: Plan,
) -> tuple[Any, Bool[Array, "rows seq"], Carry]:
    # The model is left out, because a compiled function would return a copy of it.
    constants, carry = begin(model, prompt, mask, key, plan)
    return constants.table, constants.mask, carry


def _cut(out: Generated, config: SamplingConfig) -> Generated:
    """Remove what was drawn after the end of rows that were stopped."""
    length = out.tokens.shape[1] - config.max_new_tokens
    new = out.mask[:, length:]
    answers = jnp.where(new, out.tokens[:, length:], config.pad_token_id)
    kept = lambda a: (
        None if a is None else jnp.where(jnp.expand_dims(new, range(2, a.ndim)), a, 0.0)
    )
    return Generated(
        tokens=jnp.concatenate([out.tokens[:, :length], answers], 1),
        mask=out.mask,
        num_new=out.num_new,
        failed=out.failed,
        log_probs=kept(out.log_probs),
        logits=kept(out.logits),
        scores=kept(out.scores),
    )
