"""Grouping of layers in any order into groups that are scanned."""

from collections.abc import Sequence

from effscale.models.config import BlockConfig, Group

MAX_WIDTH = 8
"""Maximum number of blocks per group; a longer pattern is split into shorter groups."""


def group_layers(layers: Sequence[BlockConfig]) -> tuple[Group, ...]:
    """Group layers in the given order: a run of identical layers becomes one group, and so does a repeating pattern.

    Compile time then grows with the number of different runs instead of the number of layers.

    Args:
        layers: The block of each layer.

    Example:
        >>> import dataclasses
        >>> from effscale.models import llama
        >>> from effscale.models.grouping import group_layers
        >>> (full,) = llama(num_layers=1, d_model=16, num_heads=2, d_ff=32).layers
        >>> local = dataclasses.replace(full, attention=dataclasses.replace(full.attention, window=4))
        >>> [(len(group.blocks), group.repeat) for group in group_layers([full, full, *[local, full] * 6])]
        [(1, 2), (2, 6)]
    """
    groups: list[Group] = []
    start = 0
    while start < len(layers):
        width, repeat = _stretch(layers, start)
        groups.append(Group(blocks=tuple(layers[start : start + width]), repeat=repeat))
        start += width * repeat
    return tuple(groups)


def _stretch(layers: Sequence[BlockConfig], start: int) -> tuple[int, int]:
    """Return the width and the number of repetitions of the pattern that holds longest from ``start``."""
    best = (1, 1)
    left = len(layers) - start
    for width in range(1, min(MAX_WIDTH, left // 2) + 1):
        repeat = 1
        while (repeat + 1) * width <= left and all(
            layers[start + repeat * width + i] == layers[start + i] for i in range(width)
        ):
            repeat += 1
        if repeat > 1 and width * repeat > best[0] * best[1]:
            best = (width, repeat)
    return best
