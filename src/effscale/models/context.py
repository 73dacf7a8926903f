"""What each layer needs to know about the batch: token positions and which tokens may attend to which.

It is built once per call and shared by all layers. A technique that runs layers on fewer tokens builds another one from
the positions, mask and segments of the tokens it keeps.
"""

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from effscale.models.positions import Angles, Positions, Rotary, rotary_angles


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # JAX also builds it from shapes and placeholders
class Context:
    """Positions and masks of the queries (``seq``) and of the keys they may attend to (``keys``).

    ``rows`` is the batch size, or 1 if all rows are the same. Without a cache, the keys are the queries' own tokens; with a
    cache, they are its slots, and ``start`` is the slot of the first query. ``valid`` applies to the queries and is None if
    no mask was passed. ``capture`` holds the points that the caller of the model asked for.
    """

    positions: Int[Array, "rows seq"]
    key_positions: Int[Array, "rows keys"]
    valid: Bool[Array, "batch seq"] | None
    key_valid: Bool[Array, "batch keys"] | None
    segments: Int[Array, "batch seq"] | None
    key_segments: Int[Array, "batch keys"] | None
    start: Int[Array, ""]
    angles: Angles | None
    causal: bool = dataclasses.field(metadata={"static": True})
    cached: bool = dataclasses.field(metadata={"static": True})
    capture: tuple[tuple[str, Callable[[Array], Any] | None], ...] = dataclasses.field(
        default=(), metadata={"static": True}
    )

    @property
    def real(self) -> Bool[Array, "batch seq"] | None:
        """Which queries are real tokens, as routing needs to know; None: all of them.

        Padding is what the mask excludes and, in packed rows, segment 0, as ``effscale.data`` packs them.
        """
        if self.segments is None:
            return self.valid
        packed = self.segments != 0
        return packed if self.valid is None else packed & self.valid

    def captured(self, **points: Array | Callable[[], Array]) -> dict[str, Any]:
        """Return those of the arrays that the caller asked for, for a module's report.

        Args:
            points: The value at each point; a function without arguments is called only if its point was asked for.
        """
        found = {}
        for name, function in self.capture:
            if name in points:
                value = points[name]
                value = value() if callable(value) else value
                found[name] = value if function is None else function(value)
        return found

    def allowed(
        self, first: int, last: int, keys: int, window: int | None = None
    ) -> Bool[Array, "rows 1 queries keys"] | None:
        """Return which of the first ``keys`` keys the queries ``first`` to ``last`` may attend to; None means all.

        With a ``window``, these are the query's own token and the ``window - 1`` positions before it.
        """
        masks = []
        if self.causal:
            slots = self.start + jnp.arange(first, last)
            masks.append((slots[:, None] >= jnp.arange(keys)[None])[None, None])
        if self.key_valid is not None:
            masks.append(self.key_valid[:, None, None, :keys])
        if self.segments is not None and self.key_segments is not None:
            masks.append(
                self.segments[:, None, first:last, None] == self.key_segments[:, None, None, :keys]
            )
        if window is not None:
            own, of_keys = self.positions[:, None, first:last, None], self.key_positions
            masks.append(own - of_keys[:, None, None, :keys] < window)
        if not masks:
            return None
        mask = masks[0]
        for other in masks[1:]:
            mask = mask & other
        return mask


def positions_of(attention_mask: Bool[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Return positions that count only real tokens: ``cumsum(mask) - 1``, and 0 at leading padding.

    Example:
        >>> import jax.numpy as jnp
        >>> positions_of(jnp.array([[False, True, True]])).tolist()
        [[0, 0, 1]]
    """
    return jnp.maximum(jnp.cumsum(attention_mask.astype(jnp.int32), axis=1) - 1, 0)


def positions_within(segments: Int[Array, "batch seq"]) -> Int[Array, "batch seq"]:
    """Return positions that count from 0 in each run of equal numbers, as packed rows need.

    Example:
        >>> import jax.numpy as jnp
        >>> positions_within(jnp.array([[1, 1, 2, 2, 2]])).tolist()
        [[0, 1, 0, 1, 2]]
    """
    index = jnp.broadcast_to(jnp.arange(segments.shape[1])[None], segments.shape)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def build_context(
    seq: int,
    *,
    kind: Positions,
    head_dim: int,
    causal: bool,
    valid: Bool[Array, "batch seq"] | None = None,
    positions: Int[Array, "rows seq"] | None = None,
    segments: Int[Array, "batch seq"] | None = None,
) -> Context:
    """Build the context of ``seq`` tokens that attend only to each other.

    Args:
        seq: Sequence length.
        kind: The model's position encoding.
        head_dim: Width of a head, for rotary angles.
        causal: Whether a token attends only to itself and earlier tokens.
        valid: True at real tokens, False at padding.
        positions: Position of each token; by default counted from 0 in each segment, over ``valid``, or over the whole row.
        segments: Segment number of each token; tokens attend only to tokens of the same segment.

    Returns:
        The context.
    """
    if positions is None and segments is not None:
        positions = positions_within(segments)
    elif positions is None:
        positions = positions_of(valid) if valid is not None else jnp.arange(seq)[None]
    return Context(
        positions=positions,
        key_positions=positions,
        valid=valid,
        key_valid=valid,
        segments=segments,
        key_segments=segments,
        start=jnp.zeros((), jnp.int32),
        angles=angles_of(kind, positions, head_dim),
        causal=causal,
        cached=False,
    )


def angles_of(kind: Positions, positions: Int[Array, "rows seq"], head_dim: int) -> Angles | None:
    """Return the rotary angles of the positions, or None if the model has no rotary positions."""
    if not isinstance(kind, Rotary):
        return None
    dim = head_dim if kind.dim is None else kind.dim
    return rotary_angles(positions, dim, kind.base, kind.scaling)
