"""Take layers out of a model, put them back, and split or merge groups of layers.

Each function returns a new model with a matching config, which you can train, save and decode like any other; the
original is not changed. Layers are numbered from 0 through the whole model. Leaves may be arrays, shapes
(``jax.ShapeDtypeStruct``), or the parts of a LoRA pair or a packed weight: all have a leading layer dimension. Without
dropout, grouping does not affect what a model computes. With dropout, keys depend on the group, so other elements are
dropped.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from effscale.models.block import Block, BlockGroup
from effscale.models.config import BlockConfig, Group
from effscale.models.transformer import Transformer


class _Layer(NamedTuple):
    """A layer: row ``index`` of a stack, used as block ``block`` of ``width`` in ``repetition`` of ``group``."""

    config: BlockConfig
    stack: Block
    index: int
    group: int
    repetition: int
    block: int
    width: int


_Unit = tuple[_Layer, ...]
"""The blocks of one repetition of a group."""


def take_layers(model: Transformer, layers: Sequence[int]) -> Transformer:
    """Return a model with only these layers, in this order; a layer may be repeated.

    Wu et al. initialize a student this way ("light layer reduction").

    Args:
        model: Any model of the library.
        layers: Numbers of the layers.

    Returns:
        A model with ``len(layers)`` layers, stacked as before. Everything except the layers is shared.

    Raises:
        ValueError: A layer does not exist, or ``layers`` is empty.

    References:
        Wu et al., "Extreme Compression for Pre-trained Transformers Made Simple and Efficient" (2022), section 4.
            https://arxiv.org/abs/2206.01859

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2, take_layers
        >>> config = gpt2(num_layers=6, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> student = take_layers(Transformer(config, rngs=nnx.Rngs(0)), [1, 3, 5])
        >>> student.config.num_layers
        3
    """
    everything = _layers_of(model)
    _check_numbers(layers, len(everything))
    return _assemble(model, _runs([everything[number] for number in layers]))


def replace_layers(model: Transformer, layers: Sequence[int], source: Transformer) -> Transformer:
    """Replace some layers of a model with those of another; the inverse of ``take_layers``.

    Args:
        model: Any model of the library.
        layers: For each layer of ``source``, the number of the layer that it replaces.
        source: A model with ``len(layers)`` layers of the same width. Only its layers are read.

    Returns:
        The model. A layer that differs from its neighbors, in its config or in the types of its weights (as a packed
        layer does), becomes a separate group.

    Raises:
        ValueError: A layer does not exist or is named twice, or ``source`` has a different number or width of layers, or
            other positions.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2, replace_layers, take_layers
        >>> config = gpt2(num_layers=6, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = Transformer(config, rngs=nnx.Rngs(0))
        >>> same = replace_layers(model, [1, 3], take_layers(model, [1, 3]))
    """
    everything, new = _layers_of(model), _layers_of(source)
    _check_numbers(layers, len(everything))
    if len(set(layers)) < len(layers):
        raise ValueError(f"layers must be distinct, got {list(layers)}")
    if len(new) != len(layers):
        raise ValueError(
            f"layers must have one entry for each of the {len(new)} layers of source, got {list(layers)}"
        )
    for name in ("d_model", "positions"):
        ours, theirs = getattr(model.config, name), getattr(source.config, name)
        if ours != theirs:
            raise ValueError(f"source must have the model's {name}={ours}, got {theirs}")
    for number, layer in zip(layers, new, strict=True):
        everything[number] = everything[number]._replace(
            config=layer.config, stack=layer.stack, index=layer.index
        )
    return _assemble(model, _runs(everything))


def split_groups(model: Transformer, at: Iterable[int]) -> Transformer:
    """Split the groups of a model, so that a group begins at each number in ``at``.

    A separate group has separate parameters: you can train only these, quantize them to a different number of bits, or
    keep them in another dtype.

    Args:
        model: Any model of the library.
        at: Numbers of layers. A pair of alternating blocks is split if a number falls inside it.

    Raises:
        ValueError: A layer does not exist.

    Example:
        >>> from flax import nnx
        >>> from effscale.models import Transformer, gpt2, merge_groups, split_groups
        >>> config = gpt2(num_layers=6, d_model=16, num_heads=2, vocab_size=50, max_length=8)
        >>> model = split_groups(Transformer(config, rngs=nnx.Rngs(0)), [2, 3])  # layers 0 and 1; 2; 3 to 5
        >>> [group.repeat for group in model.config.groups]
        [2, 1, 3]
        >>> [group.repeat for group in merge_groups(model).config.groups]
        [6]
    """
    layers, begins = _layers_of(model), sorted(set(at))
    if begins:
        _check_numbers(begins, len(layers), "at")
    return _assemble(model, _runs(layers, begins))


def merge_groups(model: Transformer) -> Transformer:
    """Merge neighboring groups into one scan if their layers have the same configs, shapes and dtypes."""
    return _assemble(model, _runs(_layers_of(model), across=True))


def unroll(model: Transformer) -> Transformer:
    """Return the model with every layer in a separate group: it takes longer to compile, but avoids a loop around small steps.

    Token-by-token decoding gains from it, because the weights and cache of a layer are then separate arrays. A pair of
    alternating blocks stays together.
    """
    layers = _layers_of(model)
    return _assemble(
        model, _runs(layers, [i for i, layer in enumerate(layers) if layer.block == 0])
    )


def for_decoding(model: Transformer) -> Transformer:
    """Return an unrolled model whose feed-forwards use their decoding form, if they have a method ``for_decoding``.

    Use it only for a loop over tokens: such a model cannot be saved, trained or split.
    """
    offers = lambda node: isinstance(node, nnx.Module) and hasattr(node, "for_decoding")
    return jax.tree.map(
        lambda node: node.for_decoding() if offers(node) else node, model, is_leaf=offers
    )


def _layers_of(model: Transformer) -> list[_Layer]:
    return [
        _Layer(config, stack, repetition, number, repetition, block, len(group.blocks))
        for number, (group, stacked) in enumerate(
            zip(model.config.groups, model.groups, strict=True)
        )
        for repetition in range(group.repeat)
        for block, (config, stack) in enumerate(zip(group.blocks, stacked.blocks, strict=True))
    ]


def _check_numbers(layers: Sequence[int], count: int, name: str = "layers") -> None:
    if not len(layers):
        raise ValueError(f"{name} must name at least one layer, got []")
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(
            f"{name} must be between 0 and {count - 1}, got {list(layers)}, which names {outside}"
        )


def _runs(
    layers: Sequence[_Layer], begins: Sequence[int] = (), across: bool = False
) -> list[list[_Unit]]:
    """Split layers into runs of identical units from the same group or, with ``across``, from any group."""
    runs: list[list[_Unit]] = []
    start = 0
    while start < len(layers):
        unit = _unit_at(layers, start, begins)
        joins = runs and start not in begins and _alike(runs[-1][-1], unit)
        if joins and (across or runs[-1][-1][0].group == unit[0].group):
            runs[-1].append(unit)
        else:
            runs.append([unit])
        start += len(unit)
    return runs


def _unit_at(layers: Sequence[_Layer], start: int, begins: Sequence[int]) -> _Unit:
    """Return the repetition of a group that begins here or, if only a part of it is left, its first layer."""
    first = layers[start]
    unit = tuple(layers[start : start + first.width])
    whole = [(layer.group, layer.repetition, layer.block) for layer in unit] == [
        (first.group, first.repetition, block) for block in range(first.width)
    ]
    inner = range(start + 1, start + first.width)
    return unit if whole and not any(number in begins for number in inner) else (first,)


def _alike(one: _Unit, other: _Unit) -> bool:
    """Return whether two units can be stored in one stack."""
    if [layer.config for layer in one] != [layer.config for layer in other]:
        return False
    kind = lambda tree: (
        jax.tree.structure(tree),
        [(leaf.shape[1:], leaf.dtype) for leaf in jax.tree.leaves(tree)],
    )
    return all(
        a.stack is b.stack or kind(a.stack) == kind(b.stack)
        for a, b in zip(one, other, strict=True)
    )


def _assemble(model: Transformer, runs: list[list[_Unit]]) -> Transformer:
    """Build a model with these groups that shares everything else."""
    groups, configs = [], []
    for run in runs:
        template: BlockGroup = jax.tree.map(lambda leaf: leaf, model.groups[0])
        template.blocks = nnx.List([_stack(layers) for layers in zip(*run, strict=True)])
        template.repeat = len(run)
        groups.append(template)
        configs.append(Group(blocks=tuple(layer.config for layer in run[0]), repeat=len(run)))
    new: Transformer = jax.tree.map(lambda leaf: leaf, model)
    new.groups = nnx.List(groups)
    new.config = dataclasses.replace(model.config, groups=tuple(configs))
    return new


def _stack(layers: Sequence[_Layer]) -> Block:
    """Combine layers from identical stacks into one stack."""
    stacks: dict[int, Block] = {id(layer.stack): layer.stack for layer in layers}
    depth = lambda stack: jax.tree.leaves(stack)[0].shape[0]
    starts = dict(zip(stacks, np.cumsum([0, *map(depth, stacks.values())]).tolist(), strict=False))
    rows = [starts[id(layer.stack)] + layer.index for layer in layers]
    return jax.tree.map(lambda *leaves: _rows(leaves, rows), *stacks.values())


def _rows(leaves: tuple[Any, ...], rows: list[int]) -> Any:
    """Select rows of the concatenated leaves; a leaf of which all rows are selected is returned itself."""
    first, count = leaves[0], sum(leaf.shape[0] for leaf in leaves)
    if len(leaves) == 1 and rows == list(range(count)):
        return first
    if isinstance(first, jax.ShapeDtypeStruct):
        return first.update(shape=(len(rows), *first.shape[1:]))
    whole = first if len(leaves) == 1 else jnp.concatenate(leaves)
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return jnp.asarray(whole[rows[0] : rows[0] + len(rows)])
    return jnp.asarray(whole[np.array(rows)])
