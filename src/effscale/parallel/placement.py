"""Placement of the arrays of a tree and the rows of a batch: on a mesh, in host memory, or on devices that need not exist."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from effscale.parallel.rules import Rules, current_rules, logical_spec
from effscale.parallel.workers import PerWorker, is_variable

Tree = TypeVar("Tree")


def shardings(tree: Tree, mesh: Mesh | AbstractMesh) -> Tree:
    """Return the sharding of every array in a tree of modules, optimizer states and bare arrays, by the current rules.

    - An ``nnx.Variable`` with the metadata ``axes`` (a tuple of logical names, aligned to the right) is divided by the rules;
      every other array is replicated.
    - Optimizer states keep the metadata, so their moments are placed like the parameters. A statistic with fewer dimensions
      than ``axes`` has names (a factored second moment) is replicated.
    - A value that is itself a pytree (a LoRA pair, a quantized tensor) provides ``partition(axes)``, which returns a tree of
      axes with its structure; without that method, ``axes`` applies to each of its arrays.
    - The arrays in a ``PerWorker`` are divided over its axis first, and then by the rules.

    Args:
        tree: Arrays or ``jax.ShapeDtypeStruct``, such as ``jax.eval_shape`` returns.
        mesh: The mesh.

    Returns:
        The same tree with a ``NamedSharding`` in place of every array, for ``in_shardings`` or ``out_shardings`` of
        ``jax.jit``. ``jax.jit(init, out_shardings=shardings(jax.eval_shape(init), mesh))()`` creates parameters that
        are sharded from the start.

    Raises:
        ValueError: A name has no rule, or a ``partition`` does not match its weight.
    """
    rules = current_rules()
    found: list[NamedSharding] = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_unit):
        try:
            found += [NamedSharding(mesh, spec) for spec in _specs(node, mesh, rules)]
        except ValueError as error:
            raise ValueError(f"{jax.tree_util.keystr(path)}: {error}") from error
    return jax.tree.unflatten(jax.tree.structure(tree), found)


def shard(tree: Tree, mesh: Mesh) -> Tree:
    """Place a tree of arrays on a mesh as ``shardings`` specifies, from any current layout.

    With several processes, each must hold the same values of every array that is not yet a global array.
    """
    places = shardings(tree, mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, places)
    return jax.tree.map(_place_of_many, tree, places)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding of an array whose first dimension is the batch."""
    axes = _batch_axes(mesh)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


class BatchShard(NamedTuple):
    """The part of a global batch that this process loads: part ``index`` of ``count`` equal parts."""

    index: int
    count: int


def batch_shard(mesh: Mesh) -> BatchShard:
    """Return which part of every global batch this process must load.

    Processes that hold the same rows (if a ``tensor`` axis spans them) get the same index. Shard a data pipeline by this
    index instead of ``jax.process_index``.

    Raises:
        ValueError: The rows of two processes overlap without being the same.
    """
    sharding = batch_sharding(mesh)
    ways = _batch_ways(mesh)
    rows: dict[int, set[int]] = {}
    for device, (index, *_) in sharding.devices_indices_map((ways,)).items():
        rows.setdefault(device.process_index, set()).add(index.start or 0)
    parts = sorted({tuple(sorted(starts)) for starts in rows.values()})
    if len(set(itertools.chain(*parts))) != sum(map(len, parts)) or len(set(map(len, parts))) > 1:
        raise ValueError(
            f"the mesh {dict(mesh.shape)} gives the processes overlapping or unequal parts of the batch: {parts}. "
            "Arrange the devices so that every process has whole rows of devices along data, fsdp and expert"
        )
    mine = rows.get(jax.process_index())
    if mine is None:
        raise ValueError(
            f"process {jax.process_index()} has no device in the mesh {dict(mesh.shape)}"
        )
    return BatchShard(parts.index(tuple(sorted(mine))), len(parts))


def shard_batch(batch: PyTree, mesh: Mesh) -> PyTree:
    """Make global arrays of the rows that this process has loaded.

    Args:
        batch: A tree of NumPy arrays whose first dimension is the batch: the rows of ``batch_shard``. With one
            process, this is the whole batch. Scalars are replicated.
        mesh: The mesh.

    Returns:
        The same tree of ``jax.Array``, divided as ``batch_sharding`` specifies.

    Raises:
        ValueError: Arrays have different numbers of rows, or the mesh cannot divide the rows.
    """
    count = batch_shard(mesh).count
    leaves = jax.tree_util.tree_leaves_with_path(batch)
    rows = {jax.tree_util.keystr(path): np.shape(x)[0] for path, x in leaves if np.ndim(x)}
    if len(set(rows.values())) > 1:
        raise ValueError(f"the arrays of a batch must have the same number of rows, got {rows}")
    ways = _batch_ways(mesh)
    for local in set(rows.values()):
        if local * count % ways:
            raise ValueError(
                f"a global batch of {local * count} rows cannot be divided over {ways} devices "
                f"({_product(mesh)}). Make the batch size a multiple of {ways}, or the mesh smaller along "
                "these axes"
            )
    divided, whole = batch_sharding(mesh), NamedSharding(mesh, PartitionSpec())

    def place(x):
        sharding = divided if np.ndim(x) else whole
        if jax.process_count() == 1:
            return jax.device_put(x, sharding)
        x = np.asarray(x)
        shape = (x.shape[0] * count, *x.shape[1:]) if x.ndim else x.shape
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(place, batch)


def gathered(array: Any) -> np.ndarray:
    """Return an array on the host; one that spans several processes is gathered in each of them."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _place_of_many(x: Any, sharding: NamedSharding) -> jax.Array:
    """Place an array of one process, because ``jax.device_put`` refuses most of them if the sharding spans several processes."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        return jax.jit(lambda x: x, out_shardings=sharding)(x)
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))
        data = _place_of_many(jax.random.key_data(x), inner)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    host = host.astype(jax.dtypes.canonicalize_dtype(host.dtype))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def _is_unit(node: object) -> bool:
    """Return whether a node is divided as a whole: one that defines how, or a variable."""
    return isinstance(node, PerWorker) or is_variable(node) or hasattr(node, "partition_specs")


def _is_axes(node: object) -> bool:
    # A weight may be a NamedTuple, so only a plain tuple of names is a leaf.
    return node is None or (
        type(node) is tuple and all(name is None or isinstance(name, str) for name in node)
    )


def _specs(node: Any, mesh: Mesh | AbstractMesh, rules: Rules) -> list[PartitionSpec]:
    """Return the specs of the arrays of one unit: a variable with everything in its value, or a bare array."""
    if isinstance(node, PerWorker):
        inner = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), node.value)
        parts = jax.tree.leaves(inner, is_leaf=_is_unit)
        specs = [spec for part in parts for spec in _specs(part, mesh, rules)]
        return [PartitionSpec(node.axis_name, *spec) for spec in specs]
    axes, value = (
        (node.get_metadata("axes", None), node.get_value()) if is_variable(node) else (None, node)
    )
    knows_specs = lambda part: hasattr(part, "partition_specs")
    parts = jax.tree.leaves(value, is_leaf=knows_specs)
    if any(map(knows_specs, parts)):
        return [
            spec
            for part in parts
            for spec in (part.partition_specs() if knows_specs(part) else [PartitionSpec()])
        ]
    arrays = jax.tree.leaves(value)
    partition = getattr(value, "partition", None)
    if axes is None:
        each = [None] * len(arrays)
    elif callable(partition):
        each = _names_of_arrays(value, partition(axes))
        if each is None:
            raise ValueError(
                f"{type(value).__name__}.partition({axes}) returned {partition(axes)} for {len(arrays)} arrays. It must return a "
                "tree with the structure of the weight and a tuple of logical names (or None) for every array"
            )
    else:
        each = [axes] * len(arrays)
    return [
        _spec(names, np.shape(array), mesh, rules)
        for names, array in zip(each, arrays, strict=True)
    ]


def _names_of_arrays(weight: object, partition: object) -> list[Any] | None:
    """Return the names that ``partition`` has for each array of a weight, or None if its tree does not match the weight."""
    # None represents an optional array that a weight does not have, such as a frozen one in an optimizer's moments.
    parts, structure = jax.tree.flatten(weight, is_leaf=lambda part: part is None)
    try:
        names = structure.flatten_up_to(partition)
    except ValueError:  # another class with the same number of parts
        names = jax.tree.leaves(partition, is_leaf=_is_axes)
    if len(names) != len(parts):
        return None
    names = [name for name, part in zip(names, parts, strict=True) if part is not None]
    return names if all(map(_is_axes, names)) else None


def _spec(
    names: tuple[str | None, ...] | None,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    rules: Rules,
) -> PartitionSpec:
    if names is None or len(names) > len(shape):
        return PartitionSpec(*[None] * len(shape))
    return logical_spec(names, shape, mesh, rules)


def _batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    return tuple(axis for axis in current_rules().lookup("batch") if mesh.shape.get(axis, 1) > 1)


def _batch_ways(mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[axis] for axis in _batch_axes(mesh))


def _product(mesh: Mesh) -> str:
    return " x ".join(f"{axis} {mesh.shape[axis]}" for axis in _batch_axes(mesh))


def lower_step(
    step: Callable[..., Any],
    create: Callable[[], Any],
    batch: Any,
    mesh: jax.sharding.Mesh,
    shape_batch: Callable[[Any], Any] = lambda batch: batch,
    frozen: Callable[[], Any] | None = None,
) -> jax.stages.Lowered:
    """Lower a donated step for a mesh.

    Args:
        step: A function from state and batch to state and metrics.
        create: Creates the state.
        batch: Types of a batch's arrays, a tree; they are sharded by rows.
        mesh: The mesh.
        shape_batch: Applies a stage of a technique to the batch.
        frozen: Creates the ``frozen`` argument of the step; None passes nothing.
    """
    with jax.set_mesh(mesh):
        given = {} if frozen is None else {"frozen": placed(jax.eval_shape(frozen), mesh)}
        state = jax.eval_shape(create)
        jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings(state, mesh), None))
        rows = placed_rows(batch, mesh)
        return jitted.lower(placed(state, mesh), shape_batch(rows), **given)


def placed(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return types of a tree's arrays with the shardings of the current rules."""
    return jax.tree.map(_with_sharding, types, shardings(types, mesh))


def placed_rows(types: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return types of a batch's arrays, sharded by rows."""
    return jax.tree.map(lambda x: _with_sharding(x, batch_sharding(mesh)), types)


def _with_sharding(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


HOST = "pinned_host"


def to_host_memory(tree: Tree) -> Tree:
    """Move the arrays of a tree to the memory of their devices' hosts, with the same sharding.

    Use it for models that are needed only now and then, such as the reference and the reward model of reinforcement
    learning. On a CPU, where both memories are the same, it works but saves nothing.

    Args:
        tree: Any pytree; NumPy arrays are moved to the host of the default device.

    Example:
        >>> import jax.numpy as jnp
        >>> to_host_memory(jnp.ones(2)).sharding.memory_kind
        'pinned_host'
    """
    return jax.tree.map(lambda x: _move(x, HOST), tree)


def on_devices(tree: Tree) -> Tree:
    """Copy the arrays of a tree that are in host memory to the devices; the others are returned unchanged.

    Example:
        >>> import jax.numpy as jnp
        >>> waiting = to_host_memory(jnp.ones(2))
        >>> on_devices(waiting).sharding.memory_kind != 'pinned_host'
        True
    """
    waits = lambda x: isinstance(x, jax.Array) and x.sharding.memory_kind == HOST
    default = lambda x: next(iter(x.sharding.device_set)).default_memory().kind
    return jax.tree.map(lambda x: _move(x, default(x)) if waits(x) else x, tree)


def _move(x: Any, kind: str) -> Any:
    array = jax.numpy.asarray(x)
    return jax.device_put(array, array.sharding.with_memory_kind(kind))
