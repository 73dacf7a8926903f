"""Assignment of a file's tensors to parameters, for a whole model."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax import nnx

from effscale.interop.table import Rule
from effscale.interop.tensors import TensorInfo
from effscale.models import TransformerConfig


@dataclasses.dataclass(frozen=True)
class Slot:
    """A tensor of a file and the parameters that it fills.

    Attributes:
        name: Its canonical name, with the numbers of its layer and expert.
        rule: The row of the table.
        leaves: Paths of the parameters that it fills.
        index: Its position in the stacked layers, and the expert of the layer; empty outside the layers.
        layer: The number of its layer in the model; None outside the layers.
    """

    name: str
    rule: Rule
    leaves: tuple[str, ...]
    index: tuple[int, ...]
    layer: int | None


def parameters(model: nnx.Module) -> dict[str, nnx.Variable]:
    """Return a model's parameters by their dotted paths."""
    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): variable for path, variable in flat}


def values_of(model: nnx.Module) -> dict[str, Any]:
    """Return the values of a model's parameters by their dotted paths."""
    return {path: variable.get_value() for path, variable in parameters(model).items()}


def blocks(config: TransformerConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the path of the block and the position in the stack for each layer."""
    for g, group in enumerate(config.groups):
        for index in range(group.repeat):
            for b in range(len(group.blocks)):
                yield f"groups.{g}.blocks.{b}", (index,)


def plan(rules: Iterable[Rule], config: TransformerConfig, leaves: Mapping[str, Any]) -> list[Slot]:
    """Return the slots of a model, in the order of the table; rows whose parameters the model lacks are left out.

    Raises:
        ValueError: The table has no row for a parameter.
    """
    slots: list[Slot] = []
    for rule in rules:
        places = blocks(config) if rule.in_layer else [("", ())]
        for layer, (block, index) in enumerate(places):
            paths = tuple(f"{block}.{part}" if block else part for part in rule.parts)
            if not all(path in leaves for path in paths):
                continue
            if rule.in_expert:
                experts = leaves[paths[0]].get_value().shape[1]
                numbers = [(expert,) for expert in range(experts)]
            else:
                numbers = [()]
            for number in numbers:
                name = rule.theirs.format(layer, *number)
                place = layer if rule.in_layer else None
                slots.append(Slot(name, rule, paths, (*index, *number), place))
    left = set(leaves) - {leaf for slot in slots for leaf in slot.leaves}
    if left:
        raise ValueError(f"the family's table has no place for the parameters {sorted(left)}")
    return slots


def form_changes(slots: Iterable[Slot], infos: Mapping[str, TensorInfo]) -> list[int]:
    """Return the layers that cannot be stacked with the previous layer, because a tensor has another form."""
    last: dict[tuple[Rule, tuple[int, ...]], Any] = {}
    changes = set()
    for slot in slots:
        if slot.layer is not None:
            key, form = (slot.rule, slot.index[1:]), infos[slot.name].form
            if last.setdefault(key, form) != form:
                changes.add(slot.layer)
            last[key] = form
    return sorted(changes)


def their_shapes(
    slots: Sequence[Slot], leaves: Mapping[str, Any], axes: Mapping[str, int]
) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor by name, from the shapes of the parameters."""
    known: dict[Any, tuple[int, ...]] = {}  # all layers have the same shapes
    shapes: dict[str, tuple[int, ...]] = {}
    for slot in slots:
        stacked = len(slot.index)
        ours = tuple(tuple(leaves[leaf].get_value().shape[stacked:]) for leaf in slot.leaves)
        if (slot.rule, ours) not in known:
            known[slot.rule, ours] = slot.rule.their_shape(ours, axes)
        shapes[slot.name] = known[slot.rule, ours]
    return shapes
