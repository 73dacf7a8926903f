"""Places within a layer that have a name.

The backward pass can keep what stands there instead of computing it again (``TransformerConfig.remat``), and a caller
can have it handed out (``Transformer.encode(capture=...)``). A feed-forward of one's own may bring further points: its
config names them in an attribute ``points``, and its module marks each with ``jax.ad_checkpoint.checkpoint_name`` and
reports it through ``effscale.models.Context.captured``.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jaxtyping import Array

POINTS = (
    "layer_in",  # the residual stream before the layer
    "attention_in",  # what the query, key and value projections read
    "query",  # after its norm, rotation and scaling, by head
    "key",
    "value",
    "attention_mixed",  # what the output projection reads
    "attention_out",
    "feed_forward_in",
    "feed_forward_out",
    "layer_out",  # the residual stream after the layer
)

SCORES = "attention_scores"
"""Only to be captured: no program that was not asked for the scores holds them whole."""

Capture = str | Sequence[str] | Mapping[str, Callable[[Array], Any]]
"""Names of points, to have what stands there; or for each name a function of it, such as its range."""


def check_points(names: Iterable[str], known: Sequence[str], where: str) -> None:
    """Raises a ValueError that lists the known points unless each of ``names`` is one."""
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{where}: {', '.join(map(repr, unknown))} is no point of this model's layers; "
            f"the points are {', '.join(map(repr, known))}"
        )


def captures(
    capture: Capture, known: Sequence[str]
) -> tuple[tuple[str, Callable[[Array], Any] | None], ...]:
    """Each name asked for with the function to be applied there, or None; hashable, as static metadata must be."""
    names = (capture,) if isinstance(capture, str) else tuple(capture)
    check_points(names, (*known, SCORES), f"capture={capture!r}")
    return tuple((name, capture[name] if isinstance(capture, Mapping) else None) for name in names)
