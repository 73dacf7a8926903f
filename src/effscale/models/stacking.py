"""Layers taken out of a model and put back, and groups of layers split and merged.

Each function returns a new model whose config follows, so that it trains, saves and decodes as any other; the original
is untouched. Layers count from 0 through the whole model. Leaves may be arrays, shapes (``jax.ShapeDtypeStruct``), and
the parts of a LoRA pair or a packed weight: all have their layers in front. Without dropout a model computes the same
however its layers are grouped; with dropout, keys go by group, so other elements are dropped.
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
    """A layer: row ``index`` of a stack, and where it stands: block ``block`` of ``width`` in ``group``'s ``repetition``."""

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
    """The model with these layers alone, in this order; one may come twice.

    Args:
        model: Any model of the library.
        layers: Numbers of layers.

    Returns:
        A model of ``len(layers)`` layers, stacked as before. Everything but the layers is shared.

    Raises:
        ValueError: There is no such layer, or none is given.

    Source: "light layer reduction" of Wu et al., "Extreme Compression for Pre-trained Transformers Made Simple and
        Efficient", 2022, section 4, initializes a student so.

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
    """The model with the layers of another at some places: the inverse of ``take_layers``.

    Args:
        model: Any model of the library.
        layers: For each layer of ``source`` the number of the one whose place it takes.
        source: A model of ``len(layers)`` layers, as wide. Only its layers are read.

    Returns:
        The model. A layer that differs in kind from its neighbours (in its config, or in the types of its weights, as a
        packed one does) becomes a group of its own.

    Raises:
        ValueError: There is no such layer, one is named twice, or ``source`` has another number or width of layers, or other
            positions.

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
        raise ValueError(f"layers={list(layers)} names a layer twice")
    if len(new) != len(layers):
        raise ValueError(f"layers={list(layers)}: source has {len(new)} layers, not {len(layers)}")
    for name in ("d_model", "positions"):
        ours, theirs = getattr(model.config, name), getattr(source.config, name)
        if ours != theirs:
            raise ValueError(f"source has {name}={theirs} and the model {name}={ours}")
    for number, layer in zip(layers, new, strict=True):
        everything[number] = everything[number]._replace(
            config=layer.config, stack=layer.stack, index=layer.index
        )
    return _assemble(model, _runs(everything))


def split_groups(model: Transformer, at: Iterable[int]) -> Transformer:
    """The model with its groups split, so that each number in ``at`` begins a group.

    A group of its own has parameters of its own: it can be trained alone, quantized to other bits, or left in another type.

    Args:
        model: Any model of the library.
        at: Numbers of layers. A pair of blocks that is scanned in turns is split as well where a number falls between.

    Raises:
        ValueError: There is no such layer.

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
    """The model with neighbouring groups merged into one scan where their layers are alike in config, shapes and types."""
    return _assemble(model, _runs(_layers_of(model), across=True))


def unroll(model: Transformer) -> Transformer:
    """The same model with every layer a group of its own: longer to compile, and no loop around small steps.

    Decoding token by token gains from it, since weights and cache of a layer are then arrays of their own. A pair of
    blocks that is scanned in turns stays together.
    """
    layers = _layers_of(model)
    return _assemble(
        model, _runs(layers, [i for i, layer in enumerate(layers) if layer.block == 0])
    )


def for_decoding(model: Transformer) -> Transformer:
    """An unrolled model whose feed-forwards have the form that they decode in, where they offer one by a method ``for_decoding``.

    It is for a loop over tokens alone: such a model is not saved, trained or taken apart.
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
        raise ValueError(f"{name}=[]: name at least one layer")
    if outside := [layer for layer in layers if not 0 <= layer < count]:
        raise ValueError(
            f"{name}={list(layers)} names {outside}; the model has layers 0 to {count - 1}"
        )


def _runs(
    layers: Sequence[_Layer], begins: Sequence[int] = (), across: bool = False
) -> list[list[_Unit]]:
    """Layers in groups-to-be: units that are alike and come from one group, or, ``across`` groups, from any."""
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
    """The repetition of a group that begins here, or, where only a part of it is left, its first layer."""
    first = layers[start]
    unit = tuple(layers[start : start + first.width])
    whole = [(layer.group, layer.repetition, layer.block) for layer in unit] == [
        (first.group, first.repetition, block) for block in range(first.width)
    ]
    inner = range(start + 1, start + first.width)
    return unit if whole and not any(number in begins for number in inner) else (first,)


def _alike(one: _Unit, other: _Unit) -> bool:
    """Whether two units can lie in one stack."""
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
    """A model of these groups, all else shared."""
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
    """Layers of alike stacks as one stack."""
    stacks: dict[int, Block] = {id(layer.stack): layer.stack for layer in layers}
    depth = lambda stack: jax.tree.leaves(stack)[0].shape[0]
    starts = dict(zip(stacks, np.cumsum([0, *map(depth, stacks.values())]).tolist(), strict=False))
    rows = [starts[id(layer.stack)] + layer.index for layer in layers]
    return jax.tree.map(lambda *leaves: _rows(leaves, rows), *stacks.values())


def _rows(leaves: tuple[Any, ...], rows: list[int]) -> Any:
    """These rows of leaves that lie one behind the other; a leaf of which all are wanted is itself."""
    first, count = leaves[0], sum(leaf.shape[0] for leaf in leaves)
    if len(leaves) == 1 and rows == list(range(count)):
        return first
    if isinstance(first, jax.ShapeDtypeStruct):
        return first.update(shape=(len(rows), *first.shape[1:]))
    whole = first if len(leaves) == 1 else jnp.concatenate(leaves)
    if rows == list(range(rows[0], rows[0] + len(rows))):
        return jnp.asarray(whole[rows[0] : rows[0] + len(rows)])
    return jnp.asarray(whole[np.array(rows)])
