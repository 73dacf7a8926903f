"""One table per family that maps each tensor's name and layout between the files and effscale, in both directions.

A ``Rule`` is a row. Its layout is an einops pattern from the file's tensor to effscale's array; with its sides swapped, it
is the inverse. Axis sizes that the shapes do not determine (heads, the patch) come from the model's config; see ``sizes``.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from einops import rearrange

from effscale.models import PatchInputs, TransformerConfig

QUERY_KEY_VALUE = tuple(f"attention.{name}" for name in ("query", "key", "value"))


@dataclasses.dataclass(frozen=True)
class Rule:
    """A tensor of a file and the parameter, or several fused parameters, that it fills.

    Attributes:
        theirs: Its name in the file, without the prefix of the trunk. ``{}`` stands for the number of the layer, and a second
            one for the number of the expert, if each expert has a separate tensor and effscale stacks them.
        ours: Path of the parameter; in a layer, below the block. Several paths if the tensor is fused: the layout's right side
            then begins with the axis ``n`` over them.
        layout: An einops pattern from the file's layout to effscale's; None: the same layout.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """The paths in effscale, as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def in_layer(self) -> bool:
        """Whether there is one for each layer."""
        return "{}" in self.theirs

    @property
    def in_expert(self) -> bool:
        """Whether there is one for each expert of each layer."""
        return self.theirs.count("{}") == 2

    def to_ours(self, tensor: Any, axes: Mapping[str, int]) -> tuple[Any, ...]:
        """Convert a file's tensor to effscale's arrays, one for each of ``ours``."""
        if self.layout is None:
            return (tensor,)
        array = rearrange(tensor, self.layout, **self._used(axes))
        return (array,) if isinstance(self.ours, str) else tuple(array)

    def to_theirs(self, arrays: Sequence[Any], axes: Mapping[str, int]) -> Any:
        """Convert effscale's arrays, in the order of ``ours``, to the file's tensor."""
        if self.layout is None:
            return arrays[0]
        left, right = self.layout.split("->")
        one = arrays[0] if isinstance(self.ours, str) else list(arrays)
        return rearrange(one, f"{right} -> {left}", **self._used(axes))

    def their_shape(self, shapes: Sequence[Sequence[int]], axes: Mapping[str, int]) -> tuple:
        """Return the shape of the file's tensor, from the shapes of effscale's arrays."""
        ours = [jax.ShapeDtypeStruct(tuple(shape), np.float32) for shape in shapes]
        return jax.eval_shape(lambda *arrays: self.to_theirs(arrays, axes), *ours).shape

    def _used(self, axes: Mapping[str, int]) -> dict[str, int]:
        names = set(re.findall(r"[a-z]+", self.layout or ""))
        every = {**axes, "n": len(self.parts)}
        return {name: size for name, size in every.items() if name in names}


def sizes(config: TransformerConfig) -> dict[str, int]:
    """Return the sizes of the axes in patterns: query heads ``h``, key heads ``g``, pairs ``t``; a patch's ``p``, ``q``, ``c``."""
    attention = config.blocks[0].attention
    axes = {"h": attention.num_heads, "g": attention.kv_heads, "t": 2}
    if isinstance(config.inputs, PatchInputs):
        patch = config.inputs.patch_size
        axes |= {"p": patch, "q": patch, "c": config.inputs.channels}
    return axes


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Return the rows of a ``torch.nn.Linear``, whose weight is ``(out, in)``."""
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", "o i -> i o"),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


def matrix(theirs: str, ours: str) -> tuple[Rule]:
    """Return the row of a ``torch.nn.Linear`` without a bias."""
    return linear(theirs, ours)[:1]


def projections(theirs: str, *names: str) -> tuple[Rule, ...]:
    """Return the rows of an attention's query, key, value and output, with these names in a module."""
    parts = ("query", "key", "value", "out")
    each = zip(names, parts, strict=True)
    return rows(*(linear(f"{theirs}.{name}", f"attention.{part}") for name, part in each))


def conv1d(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Return the rows of GPT-2's ``Conv1D``, a linear layer whose weight is ``(in, out)``."""
    return Rule(f"{theirs}.weight", f"{ours}.kernel"), Rule(f"{theirs}.bias", f"{ours}.bias")


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """Return the rows of a norm's scale and bias."""
    return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")


def embedding(theirs: str, ours: str) -> tuple[Rule]:
    """Return the row of a table of vectors."""
    return (Rule(f"{theirs}.weight", f"{ours}.embedding"),)


def fused_by_head(theirs: str) -> tuple[Rule, Rule]:
    """Return the rows of fused query, key and value, head by head: rows ``[heads, 3, head_dim]`` (BLOOM, NeoX)."""
    kernels, biases = _leaves("kernel"), _leaves("bias")
    return (
        Rule(f"{theirs}.weight", kernels, "(h n d) i -> n i (h d)"),
        Rule(f"{theirs}.bias", biases, "(h n d) -> n (h d)"),
    )


def fused_conv1d(theirs: str) -> tuple[Rule, Rule]:
    """Return the rows of all queries, then all keys, then all values, in the columns of a ``Conv1D`` (GPT-2)."""
    kernels, biases = _leaves("kernel"), _leaves("bias")
    return (
        Rule(f"{theirs}.weight", kernels, "i (n o) -> n i o"),
        Rule(f"{theirs}.bias", biases, "(n o) -> n o"),
    )


def rows(*groups: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Concatenate groups of rows into a table."""
    return tuple(rule for group in groups for rule in group)


def _leaves(name: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for module in QUERY_KEY_VALUE)
