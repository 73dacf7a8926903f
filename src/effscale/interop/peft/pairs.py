"""LoRA pairs of single layers: stacked for effscale, and joined for modules that hold several weights."""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from effscale.interop.peft.modules import Module


@dataclasses.dataclass(frozen=True)
class Pair:
    """A pair of one layer.

    Attributes:
        name: The module that it comes from, or goes to.
        a: Matrix of shape ``(in, rank)``.
        b: Matrices of shape ``(rank, out)``, one for each weight that the module holds.
        scale: Its scale.
    """

    name: str
    a: np.ndarray
    b: tuple[np.ndarray, ...]
    scale: float


def stack(
    pairs: Mapping[tuple[int, ...], Pair], shape: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, float]:
    """Stack the pairs of a weight's layers to one A, B and scale.

    Args:
        pairs: The pairs by their place in the stack: the numbers of the layer and of the expert; empty without a stack.
        shape: Shape of the weight.

    Raises:
        ValueError: The scales cannot be unified without rounding.
    """
    scale = _common_scale(pairs.values())
    dtype = _widest(array.dtype for pair in pairs.values() for array in (pair.a, *pair.b))
    rank = max(pair.a.shape[1] for pair in pairs.values())
    *layers, d_in, d_out = shape
    a, b = np.zeros((*layers, d_in, rank), dtype), np.zeros((*layers, rank, d_out), dtype)
    for index, pair in pairs.items():
        own = pair.a.shape[1]
        a[index][:, :own] = pair.a
        b[index][:own] = _rescaled(pair, scale)
    return a, b, scale


def join(
    module: Module, held: Mapping[str, tuple[np.ndarray, np.ndarray, float]], widths: Mapping
) -> Pair | None:
    """Join the pairs of all weights that a transformers module holds.

    Weights with the same A share it. Different A's are placed side by side, and each weight's B has zeros for those of the
    others, so the product is the same.

    Args:
        module: The module.
        held: A, B and scale of effscale's weights that have a pair.
        widths: Output widths of all weights.

    Returns:
        The pair without components that are zero; None if nothing is left.

    Raises:
        ValueError: The scales cannot be unified without rounding.
    """
    layer = module.slot.index
    parts: dict[str, Pair] = {}
    for leaf in module.slot.leaves:
        if leaf in held:
            a, b, scale = held[leaf]
            parts[leaf] = Pair(f"{module.name} ({leaf})", a[layer], (b[layer],), scale)
    if not parts:
        return None
    scale = _common_scale(parts.values())
    dtype = _widest(array.dtype for part in parts.values() for array in (part.a, *part.b))
    distinct: list[np.ndarray] = []
    starts: dict[str, int] = {}
    for leaf, part in parts.items():
        same = [i for i, a in enumerate(distinct) if np.array_equal(a, part.a)]
        if not same:
            distinct.append(part.a)
        before = distinct[: same[0]] if same else distinct[:-1]
        starts[leaf] = sum(a.shape[1] for a in before)
    a = np.concatenate([a.astype(dtype) for a in distinct], axis=1)
    blocks = []
    for leaf in module.slot.leaves:
        block = np.zeros((a.shape[1], widths[leaf]), dtype)
        if leaf in parts:
            b = _rescaled(parts[leaf], scale)
            block[starts[leaf] : starts[leaf] + len(b)] = b
        blocks.append(block)
    used = (a != 0).any(0) | np.any([(block != 0).any(1) for block in blocks], axis=0)
    if not used.any():
        return None
    return Pair(module.name, a[:, used], tuple(block[used] for block in blocks), scale)


def _common_scale(pairs: Iterable[Pair]) -> float:
    """Return the smallest of the scales: converting to it makes B larger, so nothing underflows."""
    return min((pair.scale for pair in pairs), key=abs)


def _rescaled(pair: Pair, scale: float) -> np.ndarray:
    """Return the pair's B for another scale, if that needs no rounding."""
    (b,) = pair.b
    if pair.scale == scale:
        return b
    ratio = pair.scale / scale if scale else math.nan
    if abs(math.frexp(ratio)[0]) == 0.5 and ratio * scale == pair.scale:
        with np.errstate(over="ignore"):
            exact = b.astype(np.float64) * ratio
            scaled = exact.astype(b.dtype)
        if np.array_equal(scaled.astype(np.float64), exact, equal_nan=True):
            return scaled
    raise ValueError(
        f"{pair.name} has the scale {pair.scale}, but others that share its weight have {scale}. The ratio is not a power of "
        "two (or is too large), so unifying them would need rounding"
    )


def _widest(dtypes: Iterable[np.dtype]) -> np.dtype:
    found = set(dtypes)
    return found.pop() if len(found) == 1 else np.dtype("float32")
