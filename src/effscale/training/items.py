"""The named items of a state, which a checkpoint saves separately."""

import re
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax

from effscale.training.errors import CheckpointError

ARRAYS = "arrays"
"""The item for the fields of a state that are single arrays, such as counters and keys."""
_TAKEN = ("run", "iterator")  # what a checkpoint contains in addition to the state


@runtime_checkable
class HasItems(Protocol):
    """A state that defines its items itself, like `TrainState`.

    Any other pytree has one item per field, under the name of the field.
    """

    def to_items(self) -> Mapping[str, Any]:
        """Return the items by name. Together they contain all arrays of the state, each once."""

    def with_items(self, items: Mapping[str, Any]) -> Any:
        """Return the state with its arrays replaced by those of ``items``; the inverse of ``to_items``."""


def items_of(state: Any) -> dict[str, Any]:
    """Return the items of a state.

    A field (or key) that is a tree becomes an item; a field that is a single array belongs to the item ``arrays``; and a field
    that defines its items adds them as ``field.item``. Fields without arrays are left out.

    Args:
        state: Any pytree, or its abstract form.

    Raises:
        CheckpointError: A name occurs twice, is reserved, or is not a valid folder name.

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
                f"a part of the state cannot be saved under the name {name!r}. Use letters, digits and _, but not "
                f"{' or '.join(_TAKEN)}."
            )
    if len(items) < len(found):
        raise CheckpointError(
            f"two parts of the state would be saved under the same name ({', '.join(sorted(name for name, _ in found))}). Rename one of them."
        )
    return items


def state_of(state: Any, items: Mapping[str, Any]) -> Any:
    """Return the state with its arrays replaced by those of its items.

    Args:
        state: A state with the expected structure; only its structure is used.
        items: The items, as `items_of` returns them.
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
    """Return the fields of a pytree with their names, including those that are None."""
    below = jax.tree_util.tree_leaves_with_path(state, is_leaf=lambda node: node is not state)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), part) for path, part in below]


def _is_array(part: Any) -> bool:
    return jax.tree_util.all_leaves([part])
