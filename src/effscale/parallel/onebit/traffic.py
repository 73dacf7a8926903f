"""What crosses the network: read from a compiled program, and by formula."""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp

from effscale.parallel.onebit.exchange import Scales
from effscale.parallel.onebit.layout import tensor_layouts

_KINDS = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"
_LINE = re.compile(rf"= (?P<result>.*?) (?P<kind>{_KINDS})(?P<start>-start)?\((?P<rest>.*)$")
_ARRAY = re.compile(r"\b(?P<dtype>pred|[a-z]+[0-9]+[a-z0-9]*)\[(?P<dims>[0-9,]*)\]")
_BRANCH = re.compile(r"branch_([0-9]+)_fun")
_BITS = re.compile(r"[0-9]+")


@dataclasses.dataclass(frozen=True)
class Collective:
    """A collective of a compiled program, as each device takes part in it.

    Attributes:
        kind: all-reduce, all-gather, all-to-all, reduce-scatter or collective-permute.
        dtypes: Of its arrays, as XLA names them.
        size: Bytes of the whole: of what is reduced, gathered, or exchanged.
        devices: Devices that take part together.
        branches: Where it stands in nested ``lax.cond`` and ``lax.switch``: the number of the branch of each, outermost first.
    """

    kind: str
    dtypes: frozenset[str]
    size: int
    devices: int
    branches: tuple[int, ...]

    @property
    def sent(self) -> float:
        """Bytes that each device sends, where reductions go around a ring and the rest directly to its goal."""
        share = (self.devices - 1) / self.devices
        if self.kind == "all-reduce":
            return 2 * share * self.size
        return float(self.size) if self.kind == "collective-permute" else share * self.size


def collectives(program: str) -> list[Collective]:
    """The collectives of a compiled program that involve more than one device.

    One in a loop (micro-batches, a scan over layers) is told once. Between TPU slices XLA sends by the host, which is not told.

    Args:
        program: ``jax.jit(f).lower(...).compile().as_text()``.

    Example:
        >>> text = "%r = f32[8]{0} all-reduce(%x), replica_groups={{0,1},{2,3}}, to_apply=%sum"
        >>> collectives(text)[0].sent  # half of 32 bytes there, half back
        32.0
    """
    found = []
    for line in program.splitlines():
        match = _LINE.search(line)
        if match is None:
            continue
        devices = _devices(match["rest"], program)
        arrays = [(m["dtype"], m["dims"]) for m in _ARRAY.finditer(match["result"])]
        if match["start"] and match["kind"] == "collective-permute":
            arrays = arrays[1:2]  # operand, result, two counters
        elif match["start"] and match["kind"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]  # operands come first, then results
        size = sum(_size(dtype, dims) for dtype, dims in arrays)
        if match["kind"] == "reduce-scatter":
            size *= devices
        name = re.search(r'op_name="([^"]*)"', line)
        branches = tuple(int(n) for n in _BRANCH.findall(name[1])) if name else ()
        if devices > 1:
            dtypes = frozenset(dtype for dtype, _ in arrays)
            found.append(Collective(match["kind"], dtypes, size, devices, branches))
    return found


def _size(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.search(dtype)[0])  # type: ignore[index]
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _devices(rest: str, program: str) -> int:
    if match := re.search(r"replica_groups=\{\{([0-9,]*)\}", rest):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=\[[0-9]+,([0-9]+)\]", rest):
        return int(match[1])
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", rest):
        sizes = dict(re.findall(r"'(\w+)'=([0-9]+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    if "source_target_pairs=" in rest:
        return 2
    count = re.search(r"num_partitions=([0-9]+)", program)
    return int(count[1]) if count else 1


def mean_bytes(tree: Any, num_workers: int, *, specs: Any = None) -> float:
    """Bytes that a device sends for the uncompressed mean of a tree over workers, around a ring.

    Args:
        tree: Arrays, or what has a shape and a dtype.
        num_workers: Workers; one sends nothing.
        specs: See `effscale.parallel.compressed_mean`.

    >>> mean_bytes(jnp.zeros(1000), 4)
    6000.0
    """
    layouts = tensor_layouts(tree, num_workers, specs)
    sizes = [
        layout.size * jnp.dtype(x.dtype).itemsize
        for layout, x in zip(layouts, jax.tree.leaves(tree), strict=True)
    ]
    return 2 * (num_workers - 1) / num_workers * sum(sizes)


def compressed_mean_bytes(
    tree: Any, num_workers: int, *, scales: Scales = "tensor", specs: Any = None
) -> float:
    r"""Bytes that a device sends in one `compressed_mean`.

    With :math:`B` bytes of a server's part of all tensors and S scales of four bytes, :math:`2 (W - 1) (B + 4 S)`: about
    1/32 of what float32 takes.

    Args:
        tree: Arrays, or what has a shape and a dtype.
        num_workers: Workers; one sends nothing.
        scales: See `effscale.parallel.compressed_mean`.
        specs: See `effscale.parallel.compressed_mean`.

    >>> compressed_mean_bytes(jnp.zeros(1000), 4)  # 32 bytes of signs for each server, and a scale
    216.0
    """
    layouts = tensor_layouts(tree, num_workers, specs)
    groups: dict[frozenset[str], int] = {}
    for layout in layouts:
        groups[frozenset(layout.axes)] = groups.get(frozenset(layout.axes), 0) + 1
    numbers = len(groups) if scales == "tree" else len(layouts)
    return 2.0 * (num_workers - 1) * (sum(layout.bytes for layout in layouts) + 4 * numbers)
