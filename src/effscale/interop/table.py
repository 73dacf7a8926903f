"""One table a family: each tensor's name and layout there and here, read in both directions.

A ``Rule`` is a row. Its layout is an einops pattern from their tensor to ours; exchanged around the arrow it leads
back. The axes with a size that the shapes do not tell (heads, the patch) take it from the model's config; see ``sizes``.
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
    """A tensor of theirs and the parameter of ours that holds it, or several that it holds fused.

    Attributes:
        theirs: Its name in the file, without the prefix of the trunk; ``{}`` stands for the number of the layer, and a second
            one for the number of the expert, where each expert has a tensor of its own and ours are stacked.
        ours: Path of the parameter; in a layer, below the block. Several where theirs is fused: the layout's right side
            then begins with their axis ``n``.
        layout: An einops pattern from theirs to ours; None: the same.
    """

    theirs: str
    ours: str | tuple[str, ...]
    layout: str | None = None

    @property
    def parts(self) -> tuple[str, ...]:
        """Our paths, as a tuple of one or several."""
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
        """Our arrays, one for each of ``ours``, from their tensor."""
        if self.layout is None:
            return (tensor,)
        array = rearrange(tensor, self.layout, **self._used(axes))
        return (array,) if isinstance(self.ours, str) else tuple(array)

    def to_theirs(self, arrays: Sequence[Any], axes: Mapping[str, int]) -> Any:
        """Their tensor from our arrays, in the order of ``ours``."""
        if self.layout is None:
            return arrays[0]
        left, right = self.layout.split("->")
        one = arrays[0] if isinstance(self.ours, str) else list(arrays)
        return rearrange(one, f"{right} -> {left}", **self._used(axes))

    def their_shape(self, shapes: Sequence[Sequence[int]], axes: Mapping[str, int]) -> tuple:
        """Shape of their tensor, from the shapes of ours."""
        ours = [jax.ShapeDtypeStruct(tuple(shape), np.float32) for shape in shapes]
        return jax.eval_shape(lambda *arrays: self.to_theirs(arrays, axes), *ours).shape

    def _used(self, axes: Mapping[str, int]) -> dict[str, int]:
        names = set(re.findall(r"[a-z]+", self.layout or ""))
        every = {**axes, "n": len(self.parts)}
        return {name: size for name, size in every.items() if name in names}


def sizes(config: TransformerConfig) -> dict[str, int]:
    """Axes that a pattern may name: query heads ``h``, key heads ``g``, pairs ``t``; a patch's ``p``, ``q``, ``c``."""
    attention = config.blocks[0].attention
    axes = {"h": attention.num_heads, "g": attention.kv_heads, "t": 2}
    if isinstance(config.inputs, PatchInputs):
        patch = config.inputs.patch_size
        axes |= {"p": patch, "q": patch, "c": config.inputs.channels}
    return axes


def linear(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """``torch.nn.Linear``: its weight is ``(out, in)``."""
    return (
        Rule(f"{theirs}.weight", f"{ours}.kernel", "o i -> i o"),
        Rule(f"{theirs}.bias", f"{ours}.bias"),
    )


def conv1d(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """GPT-2's ``Conv1D``: a linear layer whose weight is ``(in, out)``."""
    return Rule(f"{theirs}.weight", f"{ours}.kernel"), Rule(f"{theirs}.bias", f"{ours}.bias")


def norm(theirs: str, ours: str) -> tuple[Rule, Rule]:
    """A norm's factor and summand."""
    return Rule(f"{theirs}.weight", f"{ours}.scale"), Rule(f"{theirs}.bias", f"{ours}.bias")


def embedding(theirs: str, ours: str) -> tuple[Rule]:
    """A table of vectors."""
    return (Rule(f"{theirs}.weight", f"{ours}.embedding"),)


def fused_by_head(theirs: str) -> tuple[Rule, Rule]:
    """Query, key and value of each head one after another: rows ``[heads, 3, head_dim]`` (BLOOM, NeoX)."""
    kernels, biases = _leaves("kernel"), _leaves("bias")
    return (
        Rule(f"{theirs}.weight", kernels, "(h n d) i -> n i (h d)"),
        Rule(f"{theirs}.bias", biases, "(h n d) -> n (h d)"),
    )


def fused_conv1d(theirs: str) -> tuple[Rule, Rule]:
    """All queries, then all keys, then all values, in the columns of a ``Conv1D`` (GPT-2)."""
    kernels, biases = _leaves("kernel"), _leaves("bias")
    return (
        Rule(f"{theirs}.weight", kernels, "i (n o) -> n i o"),
        Rule(f"{theirs}.bias", biases, "(n o) -> n o"),
    )


def rows(*groups: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rows of a table, from groups of them."""
    return tuple(rule for group in groups for rule in group)


def _leaves(name: str) -> tuple[str, ...]:
    return tuple(f"{module}.{name}" for module in QUERY_KEY_VALUE)
