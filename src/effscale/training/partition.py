"""Names of leaves, and splitting a tree into what is trained and what is not.

A leaf's name is its path in dots, ``groups.0.attention.query.kernel``; the ``value`` that an ``nnx.Variable`` puts
between itself and its content is left out. Where a weight is itself a tree (a LoRA pair, a packed tensor) its
fields follow: ``...query.kernel.a``.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from effscale.models.name_patterns import name_search

Trainable = str | Callable[[str], bool] | None
"""Which leaves are trained: a regular expression searched in the name, a predicate on the name, or None for all."""


class NamedLeaf(NamedTuple):
    """A leaf with its name, and the name and logical axes of the ``nnx.Variable`` that holds it."""

    name: str
    leaf: Any
    variable: str
    axes: tuple[str | None, ...] | None

    @property
    def stacked(self) -> int:
        """How many of the leading logical axes stack separate tensors: ``layers``, and ``experts`` before others."""
        axes = self.axes or ()
        layers = int(axes[:1] == ("layers",))
        return layers + (axes[layers : layers + 1] == ("experts",) and len(axes) > layers + 1)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _walk(tree: Any) -> Iterator[NamedLeaf]:
    keystr = jax.tree_util.keystr
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_variable):
        name = keystr(path, simple=True, separator=".")
        if not _is_variable(node):
            yield NamedLeaf(name, node, name, None)
            continue
        axes = node.get_metadata().get("axes")
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
            # A Variable has one child, its value, whose key says nothing.
            yield NamedLeaf(
                _join(name, keystr(inner[1:], simple=True, separator=".")), leaf, name, axes
            )


def named_leaves(tree: Any) -> list[NamedLeaf]:
    """Return the leaves of a tree in the order of ``jax.tree.leaves``, with names and logical axes.

    Args:
        tree: Any pytree; ``nnx`` modules may sit anywhere in it.

    Returns:
        One ``NamedLeaf`` a leaf.

    >>> [leaf.name for leaf in named_leaves({"linear": nnx.Linear(2, 3, rngs=nnx.Rngs(0))})]
    ['linear.bias', 'linear.kernel']
    """
    return list(_walk(tree))


def map_named(function: Callable[[NamedLeaf], Any], tree: Any) -> Any:
    """Return the tree with each leaf replaced by ``function(named_leaf)``."""
    return jax.tree.unflatten(jax.tree.structure(tree), [function(leaf) for leaf in _walk(tree)])


def _is_inexact(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.inexact)


def _fixed(tree: Any) -> list[bool]:
    """Of each leaf, whether it is a part of a weight that cannot be trained; see `effscale.models.Weight`."""
    is_fixed = lambda node: getattr(node, "fixed_weight", False) is True
    return [
        is_fixed(node)
        for node in jax.tree.leaves(tree, is_leaf=is_fixed)
        for _ in jax.tree.leaves(node)
    ]


def trainable_mask(tree: Any, trainable: Trainable = None) -> Any:
    """Return a tree of bools: True where a leaf is trained.

    A leaf is trained if it is of a floating (or complex) type and ``trainable`` accepts its name. Integers, PRNG keys
    and what belongs to a packed weight, its scales included, never are.

    Args:
        tree: The model.
        trainable: A regular expression (``re.search``), a predicate on the name, or None for everything.

    Raises:
        ValueError: Nothing at all would be trained, or nothing by one of the pattern's alternatives (``head`` of
            ``"embed|head"``).
    """
    leaves = named_leaves(tree)
    can_be = [
        _is_inexact(leaf.leaf) and not fixed
        for leaf, fixed in zip(leaves, _fixed(tree), strict=True)
    ]
    if isinstance(trainable, str):
        names = [leaf.name for leaf, can in zip(leaves, can_be, strict=True) if can]
        accept = name_search(trainable, names, option="trainable")
    else:
        accept = trainable or (lambda name: True)
    mask = [bool(can and accept(leaf.name)) for leaf, can in zip(leaves, can_be, strict=True)]
    if not any(mask):
        names = ", ".join(leaf.name for leaf in leaves[:8])
        raise ValueError(
            f"trainable={trainable!r} leaves nothing to train; names are like: {names or '(the tree has no leaves)'}"
        )
    return jax.tree.unflatten(jax.tree.structure(tree), mask)


def partition(tree: Any, trainable: Trainable = None) -> tuple[Any, Any]:
    """Split a tree into (trained, frozen): two trees of the same classes with None in each other's places.

    None is an empty subtree to JAX, so gradients, optimizer states and weight decay exist for the trained part only.

    >>> trained, frozen = partition({"kernel": jnp.ones(2), "packed": jnp.zeros(2, jnp.int8)})
    >>> trained["packed"], frozen["kernel"]
    (None, None)
    """
    mask = trainable_mask(tree, trainable)
    pick = lambda wanted: jax.tree.map(
        lambda keep, leaf: leaf if keep == wanted else None, mask, tree
    )
    return pick(True), pick(False)


def combine(first: Any, second: Any) -> Any:
    """Return the inverse of ``partition``: each None of ``first`` filled from ``second``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda node: node is None
    )


def decay_mask(params: Any, *, include: str | None = None, exclude: str | None = None) -> Any:
    """Return a tree of bools: True where weight decay applies, which is on matrices and not on biases or norm scales.

    The number of dimensions does not tell them apart, as a bias of a stacked group is a matrix. So a leaf decays if
    its Variable's ``axes`` metadata names at least two axes after those that stack layers and experts; without that
    metadata, if the last part of the Variable's name is ``kernel`` or ``embedding``.

    Args:
        params: The trained part of a model.
        include: Regular expression; leaves whose name it finds decay, whatever the rule says.
        exclude: Regular expression; leaves whose name it finds do not. It wins over ``include``.

    >>> mask = decay_mask(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    >>> mask.kernel.get_value(), mask.bias.get_value()
    (True, False)
    """

    def decays(leaf: NamedLeaf) -> bool:
        if exclude is not None and re.search(exclude, leaf.name):
            return False
        if include is not None and re.search(include, leaf.name):
            return True
        if leaf.axes is not None:
            return len(leaf.axes) - leaf.stacked >= 2
        return leaf.variable.rpartition(".")[2] in ("kernel", "embedding")

    return map_named(decays, params)
