"""The table that maps logical axis names to mesh axes, and constraints of arrays by it."""

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, PartitionSpec
from jaxtyping import Array, Shaped

from effscale.parallel.mesh import AXES

MeshAxes = str | tuple[str, ...] | None


def _normal(name: str, axes: MeshAxes) -> tuple[str, ...]:
    normal = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    if len(set(normal)) != len(normal) or not all(isinstance(axis, str) for axis in normal):
        raise ValueError(
            f"the rule for {name!r} must be a mesh axis, a tuple of different ones, or None, got {axes!r}"
        )
    return normal


def _near(name: str, choices: Sequence[str] | Mapping[str, object]) -> str:
    near = difflib.get_close_matches(name, list(choices), n=3)
    return f" (did you mean {' or '.join(map(repr, near))}?)" if near else ""


class Rules(Mapping[str, tuple[str, ...]]):
    """An immutable, hashable table from logical axis names to the mesh axes that divide them.

    A value is the name of a mesh axis, a tuple of names (the first divides first), or None for a dimension
    that is not divided. Combine tables with ``|``; the right one takes precedence.

    >>> (Rules({"embed": "fsdp", "mlp": "tensor"}) | {"mlp": None})["mlp"]
    ()
    """

    def __init__(self, rules: Mapping[str, MeshAxes]):
        self._rules = {name: _normal(name, axes) for name, axes in rules.items()}

    def __getitem__(self, name: str) -> tuple[str, ...]:
        return self._rules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._rules)

    def __len__(self) -> int:
        return len(self._rules)

    def __hash__(self) -> int:
        return hash(frozenset(self._rules.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Rules) and self._rules == other._rules

    def __or__(self, other: Mapping[str, MeshAxes]) -> "Rules":
        return Rules({**self._rules, **other})

    def __repr__(self) -> str:
        return f"Rules({self._rules})"

    def lookup(self, name: str | None) -> tuple[str, ...]:
        """Return the mesh axes for a logical name; none for None.

        Raises:
            ValueError: The table does not have the name.
        """
        if name is None:
            return ()
        if name not in self._rules:
            raise ValueError(
                f"no rule for the logical axis {name!r}{_near(name, self._rules)}. Add one with "
                f"use_rules(DEFAULT_RULES | {{{name!r}: None}})"
            )
        return self._rules[name]


DEFAULT_RULES = Rules(
    {
        # Parameters.
        "vocab": "tensor",
        "embed": "fsdp",
        "heads": "tensor",
        "kv_heads": "tensor",
        "mlp": "tensor",
        "experts": "expert",
        "layers": None,
        "positions": None,
        # Activations.
        "batch": ("data", "fsdp", "expert"),
        "seq": None,
        "embed_act": None,
        "heads_act": "tensor",
        "mlp_act": "tensor",
        "vocab_act": "tensor",
    }
)
"""Data parallelism over data, fsdp and expert; parameters sharded over fsdp; Megatron's tensor parallelism over tensor."""

# A user context is part of the key of jit's caches, unlike a ContextVar: a function that was traced under one table is
# traced again under another.
_context = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def use_rules(rules: Rules) -> Iterator[Rules]:
    """Use ``rules`` as the table of this thread inside the ``with`` block.

    A new thread starts with ``DEFAULT_RULES``, just as it starts without a mesh.

    >>> with use_rules(DEFAULT_RULES | {"seq": "tensor"}):
    ...     current_rules()["seq"]
    ('tensor',)
    """
    with _context(None if rules == DEFAULT_RULES else rules):
        yield rules


def current_rules() -> Rules:
    """Return the current table: that of the innermost ``use_rules``, otherwise ``DEFAULT_RULES``."""
    return DEFAULT_RULES if _context.value is None else _context.value


def logical_spec(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: Mesh | AbstractMesh,
    rules: Rules | None = None,
) -> PartitionSpec:
    """Return the partition spec of an array whose dimensions have logical names.

    Dimensions are assigned from the left. A mesh axis is used only if it divides what is left of the
    dimension, at most once in the whole spec, and never if its size is one or it is Manual.

    Args:
        axes: One logical name or None per dimension. If there are fewer names than dimensions, they are aligned to the
            right, and the dimensions before them (such as stacked layers) are not divided.
        shape: Shape of the array.
        mesh: The mesh.
        rules: The table; by default the current one.

    Returns:
        A spec with one entry for every dimension.

    Raises:
        ValueError: There are more names than dimensions, a name has no rule, or a rule names an unknown mesh axis.

    >>> mesh = AbstractMesh((2, 2, 1, 2), AXES)
    >>> tuple(logical_spec(("embed", "mlp"), (12, 8, 32), mesh))
    (None, 'fsdp', 'tensor')
    """
    manual = {
        a for a, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Manual
    }
    sizes = {axis: size for axis, size in mesh.shape.items() if axis not in manual}
    return spec_over(axes, shape, sizes, mesh.axis_names, rules)


def spec_over(
    axes: Sequence[str | None],
    shape: Sequence[int],
    sizes: Mapping[str, int],
    known: Sequence[str],
    rules: Rules | None = None,
) -> PartitionSpec:
    """Compute ``logical_spec`` on part of a mesh: ``sizes`` of the axes to use, and ``known``, the names of all its axes."""
    if len(axes) > len(shape):
        raise ValueError(
            f"axes must have at most one name for each dimension of the shape {tuple(shape)}, got {tuple(axes)}"
        )
    rules = current_rules() if rules is None else rules
    used: set[str] = set()
    entries: list[MeshAxes] = []
    for name, size in zip((None,) * (len(shape) - len(axes)) + tuple(axes), shape, strict=True):
        chosen: list[str] = []
        for axis in rules.lookup(name):
            if axis not in known and axis not in AXES:
                raise ValueError(
                    f"the rule {name!r} -> {rules[name or '']} names {axis!r}, which is not an axis of the mesh "
                    f"{tuple(known)}{_near(axis, known)}"
                )
            ways = sizes.get(axis, 1)
            if ways > 1 and axis not in used and size % ways == 0:
                chosen.append(axis)
                used.add(axis)
                size //= ways
        entries.append(None if not chosen else chosen[0] if len(chosen) == 1 else tuple(chosen))
    return PartitionSpec(*entries)


def constrain(x: Shaped[Array, "*shape"], *names: str | None) -> Shaped[Array, "*shape"]:
    """Constrain the sharding of an activation by the logical names of its dimensions.

    This returns ``x`` itself if no mesh is set (``jax.set_mesh``) or the mesh has one device. Inside ``jax.shard_map``, only
    the axes that are still automatic apply, so a model runs unchanged under a technique that handles ``data`` manually.

    Args:
        x: The array.
        *names: One logical name per dimension; None (or a name whose rule is None) for a dimension that is not sharded.

    Returns:
        ``x``, constrained.

    Raises:
        ValueError: The number of names differs from the number of dimensions, or a name has no rule.

    >>> import jax.numpy as jnp
    >>> constrain(jnp.ones((8, 16)), "batch", "mlp_act").shape
    (8, 16)
    """
    if len(names) != x.ndim:
        raise ValueError(
            f"names must have one entry for each dimension of an array of shape {x.shape}, got {len(names)}: {names}"
        )
    rules = current_rules()
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        for name in names:
            rules.lookup(name)  # a misspelled name is an error on one device, too
        return x
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    sizes = {axis: size for axis, size in mesh.shape.items() if types[axis] == AxisType.Auto}
    spec = spec_over(names, x.shape, sizes, mesh.axis_names, rules)
    if all(size == 1 for size in sizes.values()):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def auto_batch_axes(rows: int) -> tuple[str, ...]:
    """Return the mesh axes that divide ``rows`` rows of a batch and that the compiler still partitions.

    They are the axes to use for an operation that a technique or kernel runs in ``jax.shard_map``.

    Args:
        rows: Number of rows of the global batch.

    Returns:
        Names of axes, outermost first; empty without a mesh, or if the axes do not divide ``rows``.

    >>> auto_batch_axes(8)
    ()
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return ()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    axes = tuple(
        axis
        for axis in current_rules().lookup("batch")
        if mesh.shape.get(axis, 1) > 1 and types[axis] == AxisType.Auto
    )
    return axes if rows % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()
