"""Statistics of the inputs of a model's dense layers, for quantizers that use them."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from effscale.models import Transformer
from effscale.options import is_finite

GIVEN = ("attention_mask", "positions", "segment_ids", "type_ids")
"""Keys that a batch may have in addition to ``input_ids``."""

READERS = {
    "attention_in": ("attention.query", "attention.key", "attention.value"),
    "attention_mixed": ("attention.out",),
    "feed_forward_in": ("feed_forward.gate", "feed_forward.up"),
    "feed_forward_inner": ("feed_forward.down",),
}
"""Capture points of a layer, and the dense layers that read the value there."""


class InputRange(NamedTuple):
    """The smallest and the largest value that a dense layer reads."""

    low: Float[Array, ""]
    high: Float[Array, ""]


def captured(model: Transformer, batch: Mapping[str, Any], **options: Any) -> tuple[Any, ...]:
    """Return what ``model.encode(..., capture=...)`` captures for a batch with ``input_ids`` and any of ``GIVEN``."""
    given = {name: batch[name] for name in GIVEN if name in batch}
    return model.encode(batch["input_ids"], **given, **options).captured


def input_grams(
    model: Transformer, batches: Iterable[Mapping[str, Any]], *, normalize: bool = False
) -> dict[str, Float[Array, "d_in d_in"]]:
    """Compute the Gram matrices of the inputs of every dense layer, for ``gptq`` and ``quantize_model(grams=)``.

    Each matrix takes the square of the layer's input width in memory, in float32.

    Args:
        model: A model of this library.
        batches: ``input_ids`` of shape ``(batch, seq)``, and optionally ``attention_mask``, ``positions``,
            ``segment_ids`` and ``type_ids``. GPTQ's paper uses 128 rows of 2,048 tokens. Padding does not count.
        normalize: Divide each token's inputs by their root mean square, so that all tokens have equal weight. GPTQ's
            paper does not. In a few layers of some models, the inputs of the first token are so large that they
            outweigh all others, and GPTQ then rounds these layers for that token at the cost of the rest.

    Returns:
        The matrices by weight name, as in a ``Rule``: ``layers.3.attention.query.kernel``. Layers that read the same
        input share a matrix.

    Raises:
        ValueError: ``batches`` is empty.
    """

    def gram(x: Array, real: Array | None) -> Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        if normalize:
            squares = jnp.mean(jnp.square(rows), -1, keepdims=True)
            rows = rows * jax.lax.rsqrt(jnp.where(squares == 0, 1.0, squares))
        if real is not None:
            rows = jnp.where(real, rows, 0.0)
        return jnp.matmul(rows.T, rows, precision="highest")

    return dict(_over_batches(model, batches, gram, jnp.add))


def input_ranges(
    model: Transformer, batches: Iterable[Mapping[str, Any]], *, momentum: float = 0.95
) -> dict[str, InputRange]:
    """Compute the ranges of the inputs of every dense layer, for ``quantize_model(..., ranges=)``: static calibration.

    The first batch sets a range, and each further batch moves it: ``momentum * old + (1 - momentum) * new``, as in DeepSpeed.

    Args:
        model: A model of this library.
        batches: As for ``input_grams``.
        momentum: Fraction of the old range that is kept at each batch.

    Returns:
        The ranges by weight name, as in a ``Rule``.

    Raises:
        ValueError: ``batches`` is empty, or ``momentum`` is out of range.
    """
    if not (is_finite(momentum) and 0 <= momentum < 1):
        raise ValueError(f"momentum must be in [0, 1), got {momentum!r}. 0.95 is a common value")

    def extremes(x: Array, real: Array | None) -> Array:
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        low = rows if real is None else jnp.where(real, rows, jnp.inf)
        high = rows if real is None else jnp.where(real, rows, -jnp.inf)
        return jnp.stack([jnp.min(low), jnp.max(high)])

    moved = lambda old, new: momentum * old + (1 - momentum) * new
    found = _over_batches(model, batches, extremes, moved)
    return {name: InputRange(low=ends[0], high=ends[1]) for name, ends in found}


def _over_batches(
    model: Transformer, batches: Iterable[Mapping[str, Any]], look: Any, combine: Any
) -> Iterator[tuple[str, Array]]:
    """Return what ``look`` computes from each dense layer's input, combined over the batches, by layer name."""
    points = [point for point in READERS if point in model.config.points]

    @jax.jit
    def seen(model: Transformer, batch: Mapping[str, Any]) -> Any:
        mask = batch.get("attention_mask")
        real = None if mask is None else mask.reshape(-1, 1) != 0
        capture = dict.fromkeys(points, lambda x: look(x, real))
        return captured(model, batch, capture=capture)

    total: Any = None
    for batch in batches:
        found = seen(model, dict(batch))
        total = found if total is None else jax.tree.map(combine, total, found)
    if total is None:
        raise ValueError("batches must not be empty")
    paths = {".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model))}
    first = 0
    for index, (group, blocks) in enumerate(zip(model.config.groups, total, strict=True)):
        for repetition in range(group.repeat):
            for number, block in enumerate(blocks):
                for point, stacked in block.items():
                    entry = stacked[repetition]
                    for reader in READERS[point]:
                        if f"groups.{index}.blocks.{number}.{reader}.kernel" in paths:
                            yield f"layers.{first + number}.{reader}.kernel", entry
            first += len(group.blocks)
