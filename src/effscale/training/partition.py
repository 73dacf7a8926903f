"""Names of leaves, and splitting a tree into trained and frozen parts.

The name of a leaf is its path in dots, ``groups.0.attention.query.kernel``, without the ``value`` that an ``nnx.Variable`` adds
between itself and its content. If a weight is itself a tree (a LoRA pair, a packed weight), its
fields follow: ``...query.kernel.a``.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from effscale.models.name_patterns import name_search
from effscale.parallel.workers import is_variable

Trainable = str | Callable[[str], bool] | None
"""The leaves to train: a regular expression searched in the name, a predicate on the name, or None for all."""


class NamedLeaf(NamedTuple):
    """A leaf with its name, and the name and logical axes of the ``nnx.Variable`` that holds it."""

    name: str
    leaf: Any
    variable: str
    axes: tuple[str | None, ...] | None

    @property
    def stacked(self) -> int:
        """The number of leading logical axes that stack separate tensors: ``layers``, and ``experts`` in front of others."""
        axes = self.axes or ()
        layers = int(axes[:1] == ("layers",))
        return layers + (axes[layers : layers + 1] == ("experts",) and len(axes) > layers + 1)


def _join(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _walk(tree: Any) -> Iterator[NamedLeaf]:
    keystr = jax.tree_util.keystr
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_variable):
        name = keystr(path, simple=True, separator=".")
        if not is_variable(node):
            yield NamedLeaf(name, node, name, None)
            continue
        axes = node.get_metadata().get("axes")
        for inner, leaf in jax.tree_util.tree_leaves_with_path(node):
            # A Variable has one child, its value, whose key is of no interest.
            yield NamedLeaf(
                _join(name, keystr(inner[1:], simple=True, separator=".")), leaf, name, axes
            )


def named_leaves(tree: Any) -> list[NamedLeaf]:
    """Return the leaves of a tree in the order of ``jax.tree.leaves``, with names and logical axes.

    Args:
        tree: Any pytree; it may contain ``nnx`` modules anywhere.

    Returns:
        One ``NamedLeaf`` per leaf.

    >>> from flax import nnx
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
    """Return, for each leaf, whether it is a part of a weight that cannot be trained; see ``effscale.models.Weight``."""
    is_fixed = lambda node: getattr(node, "fixed_weight", False) is True
    return [
        is_fixed(node)
        for node in jax.tree.leaves(tree, is_leaf=is_fixed)
        for _ in jax.tree.leaves(node)
    ]


def trainable_mask(tree: Any, trainable: Trainable = None) -> Any:
    """Return a tree of bools: True where a leaf is trained.

    A leaf is trained if it has a floating-point (or complex) type and ``trainable`` accepts its name. Integers, PRNG keys
    and all parts of a packed weight, including its scales, are never trained.

    Args:
        tree: The model.
        trainable: A regular expression (``re.search``), a predicate on the name, or None for everything.

    Raises:
        ValueError: Nothing would be trained, or one of the alternatives of the pattern (``head`` of
            ``"embed|head"``) matches nothing.
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
            f"trainable must match at least one trainable leaf, got {trainable!r}. The names look like: {names or '(the tree has no leaves)'}."
        )
    return jax.tree.unflatten(jax.tree.structure(tree), mask)


def partition(tree: Any, trainable: Trainable = None) -> tuple[Any, Any]:
    """Split a tree into (trained, frozen): two trees of the same classes, each with None in place of the leaves of the other.

    To JAX, None is an empty subtree, so gradients, optimizer states and weight decay exist only for the trained part.

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
    """Merge two partial trees, the inverse of ``partition``: each None of ``first`` is filled from ``second``."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda node: node is None
    )


def decay_mask(params: Any, *, include: str | None = None, exclude: str | None = None) -> Any:
    """Return a tree of bools: True where weight decay applies, on matrices but not on biases or norm scales.

    The number of dimensions does not distinguish them, as the bias of a stacked group is a matrix. So a leaf decays if
    the ``axes`` metadata of its Variable names at least two axes after those that stack layers and experts. Without this
    metadata, a leaf decays if the last part of the Variable's name is ``kernel`` or ``embedding``.

    Args:
        params: The trained part of a model.
        include: A regular expression; leaves whose name it matches decay, regardless of the rule.
        exclude: A regular expression; leaves whose name it matches do not decay. It takes precedence over ``include``.

    >>> from flax import nnx
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
