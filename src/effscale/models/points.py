"""Named points within a layer.

The backward pass can keep the value at a point instead of recomputing it (``TransformerConfig.remat``), and the model can
return it (``Transformer.encode(capture=...)``). A custom feed-forward may add points: its config lists them in an
attribute ``points``, and its module marks each with ``jax.ad_checkpoint.checkpoint_name`` and reports it through
``effscale.models.Context.captured``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Array

POINTS = (
    "layer_in",  # the residual stream before the layer
    "attention_in",  # the input of the query, key and value projections
    "query",  # after its norm, rotation and scaling, by head
    "key",
    "value",
    "attention_mixed",  # the input of the output projection
    "attention_out",
    "feed_forward_in",
    "feed_forward_out",
    "layer_out",  # the residual stream after the layer
)

SCORES = "attention_scores"
"""Can only be captured: a program holds the whole scores only if they are asked for."""

Capture = str | Sequence[str] | Mapping[str, Callable[[Array], Any]]
"""Names of the points to capture, or for each name a function of its value, such as the range."""


def check_points(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raise a ValueError that lists the known points if one of ``names`` is not among them."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{where}: {', '.join(map(repr, unknown))} is not a point of this model's layers. "
            f"Use {', '.join(map(repr, known))}"
        )


def captures(
    capture: Capture, known: Sequence[str]
) -> tuple[tuple[str, Callable[[Array], Any] | None], ...]:
    """Return each name with the function to apply there, or None; the result is hashable, as static metadata must be."""
    names = (capture,) if isinstance(capture, str) else tuple(capture)
    check_points(names, (*known, SCORES), f"capture={capture!r}")
    return tuple((name, capture[name] if isinstance(capture, Mapping) else None) for name in names)
