"""Layers in an order of one's own, as groups that are scanned."""

from collections.abc import Sequence

from effscale.models.config import BlockConfig, Group

MAX_WIDTH = 8
"""Blocks of a group at most: a pattern that is longer is cut into shorter groups."""


def group_layers(layers: Sequence[BlockConfig]) -> tuple[Group, ...]:
    """Groups of layers in this order: a stretch of like layers is one group, and so is one in which layers take turns.

    Compile time then grows with the number of different stretches and not with that of the layers.

    Args:
        layers: The block of each layer.

    Example:
        >>> import dataclasses
        >>> from effscale.models import group_layers, llama
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
    """Width and number of repetitions of the pattern that holds for longest from here on."""
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
