"""The modules of a model that PEFT can adapt: their names in transformers, and the layouts of a pair in PEFT and in effscale.

Both come from the families: their tables have the names in files, together with the names in memory, which adapters use.
"""

import dataclasses

import numpy as np
from einops import rearrange

from effscale.interop.describe import describe
from effscale.interop.families.family import Family
from effscale.interop.plan import Slot, parameters, plan, their_shapes
from effscale.interop.table import sizes
from effscale.models import LearnedPositions, LMHead, Transformer

START = "base_model.model."
"""Prefix of the names in an adapter's file."""


@dataclasses.dataclass(frozen=True, eq=False)
class Module:
    """A transformers module with a weight matrix, and the corresponding weights in effscale.

    Attributes:
        name: Its path in transformers' model, in memory.
        slot: The place of its weight.
        shape: Shape of its weight in PyTorch.
        axes: Sizes that the table's layouts need.
    """

    name: str
    slot: Slot
    shape: tuple[int, ...]
    axes: dict[str, int]

    @property
    def is_embedding(self) -> bool:
        """Whether it is an embedding."""
        return self.slot.rule.parts[0].endswith(".embedding")

    @property
    def is_conv1d(self) -> bool:
        """Whether it is GPT-2's ``Conv1D``, whose weight is ``(in, out)``."""
        return self._in_first and not self.is_embedding

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of A and B in an adapter's file."""
        if len(self.shape) == 4:
            return (rank, *self.shape[1:]), (self.shape[0], rank, 1, 1)
        d_in, d_out = self.shape if self._in_first else self.shape[::-1]
        return (rank, d_in), (d_out, rank)

    def to_ours(self, a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """Convert A and B to effscale's layout: A of ``(in, rank)``, and one B of ``(rank, out)`` per weight."""
        if len(self.shape) == 4:
            return self.slot.rule.to_ours(a, self.axes)[0], (b[:, :, 0, 0].T,)
        # B is a weight in this layout, with the rank as its inputs.
        return a.T, self.slot.rule.to_ours(b.T if self._in_first else b, self.axes)

    def to_theirs(self, a: np.ndarray, b: tuple[np.ndarray, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Convert A and B to PEFT's layout."""
        if len(self.shape) == 4:
            return self.slot.rule.to_theirs([a], self.axes), rearrange(b[0], "r o -> o r 1 1")
        joined = self.slot.rule.to_theirs(b, self.axes)
        return a.T, joined.T if self._in_first else joined

    @property
    def _in_first(self) -> bool:
        layout = self.slot.rule.layout
        return layout is None or layout.startswith("i ")


@dataclasses.dataclass(frozen=True)
class Modules:
    """The parts of a model that PEFT can adapt.

    Attributes:
        family: The model's family.
        adaptable: The modules, in the order of the table.
        twins: If the head is the transposed embedding: the head's name in memory, and the embedding.
        tensors: The places of all tensors of the model, by their names in memory.
        shapes: Their shapes, by the names of their places.
        axes: Sizes that the table's layouts need.
    """

    family: Family
    adaptable: tuple[Module, ...]
    twins: dict[str, Module]
    tensors: dict[str, Slot]
    shapes: dict[str, tuple[int, ...]]
    axes: dict[str, int]

    @property
    def names(self) -> set[str]:
        """The names in memory of all modules that have tensors."""
        return {tensor.rpartition(".")[0] for tensor in self.tensors}

    def canonical(self, name: str) -> str:
        """Return a module's name in the family's table, from any of its known names."""
        return self.family.canonical(f"{name}.weight").removesuffix(".weight")

    def slot_of(self, tensor: str) -> Slot | None:
        """Return the place of a tensor, by any of its names."""
        places = {self.family.canonical(name): slot for name, slot in self.tensors.items()}
        return places.get(self.family.canonical(tensor))


def modules_of(model: Transformer) -> Modules:
    """Return the parts of a model that PEFT can adapt.

    Raises:
        ValueError: No family has such a model.
    """
    family, _ = describe(model.config)
    leaves, axes = parameters(model), sizes(model.config)
    positions = model.config.positions
    # PEFT looks up positions without OPT's offset, so such an adapter cannot work.
    shifted = isinstance(positions, LearnedPositions) and positions.offset > 0
    found: list[Module] = []
    tensors: dict[str, Slot] = {}
    slots = plan(family.rules, model.config, leaves)
    shapes = their_shapes(slots, leaves, axes)
    for slot in slots:
        tensor = family.memory_name(family.stored_name(slot, model.config.heads))
        tensors[tensor] = slot
        name, _, kind = tensor.rpartition(".")
        matrix = all(leaf.endswith((".kernel", ".embedding")) for leaf in slot.leaves)
        if kind != "weight" or not matrix or (shifted and "embed.positions" in slot.leaves[0]):
            continue
        # In transformers, all experts are one array in memory, and the router is not a linear layer.
        if slot.rule.in_expert or ".router." in slot.leaves[0]:
            continue
        found.append(Module(name, slot, shapes[slot.name], axes))
    twins: dict[str, Module] = {}
    if any(isinstance(head, LMHead) and head.tied for head in model.config.heads):
        by_slot = {slot.name: slot for slot in tensors.values()}
        modules = {module.slot.name: module for module in found}
        for repeat, original in family.tied.items():
            if original not in by_slot or repeat in by_slot:
                continue
            name = family.memory_name(repeat)
            tensors[name] = by_slot[original]
            if original in modules:
                twins[name.removesuffix(".weight")] = modules[original]
    return Modules(family, tuple(found), twins, tensors, shapes, axes)


def keys(name: str, *, embedding: bool) -> tuple[str, str]:
    """Return the names of A and B in an adapter's file for the module with this name."""
    start = f"{START}{name}.lora_"
    if embedding:
        return f"{start}embedding_A", f"{start}embedding_B"
    return f"{start}A.weight", f"{start}B.weight"
