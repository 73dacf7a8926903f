"""The named items of a state: the parts that a checkpoint keeps side by side."""

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from effscale.training.errors import CheckpointError

ARRAYS = "arrays"
"""The item of those fields of a state that are single arrays, such as counters and keys."""
_TAKEN = ("run", "iterator")  # what a checkpoint holds beside the state


@runtime_checkable
class HasItems(Protocol):
    """A state that says itself what its items are, as `TrainState` does.

    Any other pytree has one item for each field, under the field's name.
    """

    def to_items(self) -> Mapping[str, Any]:
        """Return the items by name. Together they hold all arrays of the state, each once."""

    def with_items(self, items: Mapping[str, Any]) -> Any:
        """Return the state with its arrays replaced by those of ``items``; the inverse of ``to_items``."""


def items_of(state: Any) -> dict[str, Any]:
    """Return the items of a state.

    A field (or key) that is a tree is an item, one that is a single array belongs to the item ``arrays``, and one that has
    items of its own adds them as ``field.item``. Fields without arrays are left out.

    Args:
        state: Any pytree, or its abstract form.

    Raises:
        CheckpointError: A name occurs twice, is reserved, or cannot be that of a folder.

    >>> import jax.numpy as jnp
    >>> sorted(items_of({"actor": {"w": jnp.ones(2)}, "critic": {"w": jnp.ones(2)}, "ema": None, "step": jnp.int32(3)}))
    ['actor', 'arrays', 'critic']
    """
    found: list[tuple[str, Any]] = []
    arrays: dict[str, Any] = {}
    if isinstance(state, HasItems):
        found += state.to_items().items()
    else:
        for name, part in _parts(state):
            if isinstance(part, HasItems):
                found += [(f"{name}.{item}", tree) for item, tree in part.to_items().items()]
            elif _is_array(part):
                arrays[name] = part
            elif jax.tree.leaves(part):
                found.append((name, part))
    if arrays:
        found.append((ARRAYS, arrays))
    items = dict(found)
    for name in items:
        if name in _TAKEN or not re.fullmatch(r"[\w.-]+", name):
            raise CheckpointError(
                f"a part of the state cannot be saved under the name {name!r}; use letters, digits and _, and none of "
                f"{', '.join(_TAKEN)}"
            )
    if len(items) < len(found):
        raise CheckpointError(
            f"two parts of the state would be saved under one name ({', '.join(sorted(name for name, _ in found))}); rename one"
        )
    return items


def state_of(state: Any, items: Mapping[str, Any]) -> Any:
    """Return the state with its arrays replaced by those of its items.

    Args:
        state: A state of the wanted structure; only its structure is used.
        items: As from `items_of`.
    """
    if isinstance(state, HasItems):
        return state.with_items(items)

    def restored(name: str, part: Any) -> Any:
        if isinstance(part, HasItems):
            own = {
                item.removeprefix(f"{name}."): tree
                for item, tree in items.items()
                if item.startswith(f"{name}.")
            }
            return part.with_items(own)
        if _is_array(part):
            return items[ARRAYS][name]
        return items[name] if jax.tree.leaves(part) else part

    structure = jax.tree.structure(state, is_leaf=lambda node: node is not state)
    return jax.tree.unflatten(structure, [restored(*named) for named in _parts(state)])


def _parts(state: Any) -> list[tuple[str, Any]]:
    """Return the fields of a pytree with their names, those that are None included."""
    below = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: node is not state)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), part) for path, part in below]


def _is_array(part: Any) -> bool:
    return jax.tree_util.all_leaves([part])
