"""Run layers on a subset of the tokens."""

import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from effscale.ltd.layers import dropping_layers
from effscale.ltd.tokens import put_tokens, sample_kept, take_context, take_tokens
from effscale.models import Context, TransformerConfig, run_group
from effscale.models.block import BlockGroup
from effscale.models.transformer import RunGroup


def token_dropping(
    config: TransformerConfig,
    *,
    kept: int,
    key: PRNGKeyArray,
    layers: tuple[int, ...] | None = None,
) -> RunGroup:
    r"""Return a ``run_group`` function that runs each layer of a model on ``kept`` random tokens.

    A layer $f$ with kept positions $K$, drawn independently for each layer and row, maps the stream $h$ to

    $$h'_K = f(h_K), \qquad h'_i = h_i \quad (i \notin K).$$

    Kept tokens attend only to one another, with the mask and the positions that they have in the whole row. No
    token is special: the class token may be dropped, and padding is kept as often as real tokens. The gradient is that of
    the formula. If a row has at most ``kept`` tokens, the model runs as usual. The reports of feed-forwards, and captured
    values, must have a shape that does not depend on the number of tokens.

    Args:
        config: The config of the model.
        kept: The number of tokens of a row that each dropping layer keeps.
        key: The key that decides which tokens are kept. It may be the same as the key of dropout.
        layers: The numbers of the layers that drop tokens, counted from 0; None means all except the first and the last.

    Returns:
        A value for ``run_group`` of ``effscale.models.Transformer.encode``.

    Raises:
        ValueError: ``kept`` is below 1; as for ``dropping_layers``; or, when run, there is a cache: tokens can be dropped
            only in training.

    References:
        Yao et al., "Random-LTD" (2022), section 3.1 and algorithm 1. https://arxiv.org/abs/2211.11586

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2
        >>> config = gpt2(num_layers=4, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model, key = Transformer(config, rngs=nnx.Rngs(0)), jax.random.key(0)
        >>> dropping = token_dropping(config, kept=3, key=key)
        >>> model.encode(jnp.zeros((1, 8), jnp.int32), run_group=dropping).hidden.shape
        (1, 8, 16)
    """
    if kept < 1:
        raise ValueError(f"kept must be at least 1, got {kept}")
    chosen = dropping_layers(config, layers)
    ends = list(itertools.accumulate(len(g.blocks) * g.repeat for g in config.groups))
    layers_of = [range(start, stop) for start, stop in itertools.pairwise([0, *ends])]

    def run(
        index: int, group: BlockGroup, x: Array, context: Context, cache: Any, group_key: Any
    ) -> tuple[Array, Any, Any]:
        if cache is not None:
            raise ValueError("tokens cannot be dropped with a cache, which contains every token")
        batch, length = x.shape[:2]
        if kept >= length:
            return run_group(index, group, x, context, cache, group_key)

        def run_block(block, x, cache, block_key, at):
            if at is None:
                return block(x, context, cache, block_key)
            y, _, report = block(take_tokens(x, at), take_context(context, at), None, block_key)
            return put_tokens(x, at, y), None, report

        numbers, width = layers_of[index], len(group.blocks)
        reports = []
        for start, stop in _stretches([number in chosen for number in numbers], width):
            here = [tuple(numbers[start * width + i : stop * width : width]) for i in range(width)]
            inputs = tuple(
                sample_kept(key, same, batch, length, kept) if same[0] in chosen else None
                for same in here
            )
            x, _, report = group.run(
                run_block, x, key=group_key, start=start, stop=stop, inputs=inputs
            )
            reports.append(report)
        return x, None, jax.tree.map(lambda *r: jnp.concatenate(r), *reports)

    return run


def _stretches(drops: list[bool], width: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of each run of repetitions whose ``width`` blocks drop tokens in the same way."""
    patterns = [tuple(drops[i : i + width]) for i in range(0, len(drops), width)]
    stop = 0
    for _, alike in itertools.groupby(patterns):
        start, stop = stop, stop + len(list(alike))
        yield start, stop
