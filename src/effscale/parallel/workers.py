"""Values that differ between the workers along a mesh axis, and what the types of arrays record about it.

Values that are the same on all workers are ordinary arrays; values that differ are wrapped in a ``PerWorker``.
``effscale.parallel.worker_steps`` runs steps on such trees.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas.manual_axes import vary

Node = TypeVar("Node")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerWorker:
    """A tree whose arrays differ between the workers along an axis.

    In a state between steps, its arrays have a leading workers dimension, which is divided over the axis. Inside
    ``per_worker`` (or ``simulate_workers``), each worker sees its own part, without that dimension.
    """

    value: Any
    axis_name: str = dataclasses.field(metadata={"static": True})

    def resized_like(self, wanted: "PerWorker") -> "PerWorker":
        """Return what the workers of another run keep, from what these keep between steps; see `resize_workers`."""
        (number,) = {x.shape[0] for x in jax.tree.leaves(wanted)}
        return resize_workers(self, number)


class SendsBytes(abc.ABC):
    """A node of an optimizer's state that counts the bytes its update sent.

    Register a custom state with ``SendsBytes.register``, which also decorates a NamedTuple; ``sent_bytes`` then counts it.

    Attributes:
        sent: float32, bytes that each worker's device sent in the last update.
    """

    sent: jax.Array


class MovesParams(abc.ABC):
    """A node of an optimizer's state that lets the parameters of workers diverge for some steps.

    Register a custom state with ``MovesParams.register``; ``worker_params`` then asks it for the worker's parameters.
    """

    @abc.abstractmethod
    def local_params(self, params: Any) -> Any:
        """Return the parameters of a worker, from those that all workers share."""


def is_per_worker(node: object) -> bool:
    """Return whether a node of a tree is a ``PerWorker``; for ``is_leaf=``."""
    return isinstance(node, PerWorker)


def is_variable(node: object) -> bool:
    """Return whether a node is an ``nnx.Variable``."""
    from flax import nnx  # slow to import, and importing an optimizer needs none of it

    return isinstance(node, nnx.Variable)


def bound_axis_size(axis_name: str) -> int | None:
    """Return the number of workers along a bound axis, or None if the axis is not bound."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        return None


def is_manual(axis_name: str) -> bool:
    """Return whether code runs in a ``jax.shard_map`` over the axis rather than a ``jax.vmap``."""
    return axis_name in jax.sharding.get_abstract_mesh().manual_axes


def has_types(axis_name: str) -> bool:
    """Return whether types record what differs between workers: not in ``jax.vmap``, ``jax.pmap`` and ``jax.shard_map(check_vma=False)``."""
    return is_manual(axis_name) and axis_name in _varying(jax.lax.axis_index(axis_name))


def differs(x: Any, axis_name: str) -> bool:
    """Return whether the type of an array marks it as different between workers; always false without such types (``has_types``)."""
    return is_manual(axis_name) and axis_name in _varying(x)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def as_local(tree: Any, axis_name: str) -> Any:
    """Type the tree as local to each worker, so that its gradient is the worker's own instead of the sum over all."""
    return vary(tree, (axis_name,)) if is_manual(axis_name) else tree


def gather(x: jax.Array, axis_name: str) -> jax.Array:
    """Stack the arrays of all workers, typed as the same on all workers."""
    if is_manual(axis_name):
        return jax.lax.all_gather(x, axis_name, to="invarying")
    return jax.lax.all_gather(x, axis_name)


@runtime_checkable
class Resizable(Protocol):
    """A part of a `PerWorker` that says itself what becomes of it if the number of workers changes."""

    def resized(self, num_workers: int) -> Any:
        """Return the part for another number of workers; its arrays are those of all workers, stacked."""
        ...


def resize_workers(tree: Any, num_workers: int) -> Any:
    """Return the tree with the contents of each ``PerWorker`` converted to another number of workers.

    The mean over workers is preserved: each new worker gets the mean of the old workers' arrays. A part that is `Resizable`,
    such as the errors of the 1-bit mean, is converted by its own rule. With the same number of workers, the tree is
    returned unchanged.

    Args:
        tree: A state between steps: the arrays of a ``PerWorker`` have the workers as their first dimension.
        num_workers: The new number of workers. A single worker sends nothing, so it never uses the pending error.

    Raises:
        ValueError: ``num_workers`` is less than 1.

    Example:
        >>> resize_workers(PerWorker(jnp.array([[1.0], [3.0]]), "data"), 3).value.tolist()
        [[2.0], [2.0], [2.0]]
    """
    if num_workers < 1:
        raise ValueError(f"num_workers must be at least 1, got {num_workers}")
    has_rule = lambda node: isinstance(node, Resizable)

    def part(node: Any) -> Any:
        return node.resized(num_workers) if has_rule(node) else share_mean(node, num_workers)

    def visit(node: Any) -> Any:
        if not is_per_worker(node) or {x.shape[0] for x in jax.tree.leaves(node)} <= {num_workers}:
            return node
        return PerWorker(jax.tree.map(part, node.value, is_leaf=has_rule), node.axis_name)

    return jax.tree.map(visit, tree, is_leaf=is_per_worker)


def share_mean(x: Any, num_workers: int) -> jax.Array:
    """Give each of ``num_workers`` new workers the mean of the old workers' arrays, which are stacked."""
    mean = jnp.mean(x, axis=0, keepdims=True)
    return jnp.broadcast_to(mean, (num_workers, *x.shape[1:]))


def worker_params(params: Any, opt_state: Any) -> Any:
    """Return the parameters at which a worker takes its gradient, inside ``per_worker``.

    They are typed as local to the worker, so ``jax.grad`` returns the worker's own gradient. If the optimizer lets the
    workers diverge for some steps (0/1 Adam), their values are the worker's own, too; they come from the part of the
    optimizer's state whose class is registered with ``MovesParams``. ``params`` itself stays the same on all workers. If the state has no ``PerWorker``, as with
    one worker, ``params`` is returned unchanged.

    Args:
        params: The parameters that the optimizer was initialized with. For an ``nnx`` module, ``nnx.state(model, nnx.Param)``
            or the parameters from ``nnx.split``.
        opt_state: The optimizer's state, or that of an ``nnx.Optimizer``.

    Returns:
        Parameters to differentiate at, in a tree like ``params``.

    Raises:
        ValueError: ``params`` contains running statistics or random streams, whose changes would be lost with this copy; or
            its structure differs from that of the parameters that the optimizer was initialized with.

    Example:
        >>> worker_params({"w": jnp.ones(2)}, None)["w"].tolist()  # one worker, whose state holds no PerWorker
        [1.0, 1.0]
    """
    from flax import nnx

    variables = jax.tree.leaves(params, is_leaf=is_variable)
    for variable in variables:
        if isinstance(variable, nnx.BatchStat | nnx.RngState):
            raise ValueError(
                f"params contains a {type(variable).__name__}, whose changes would be lost with the copy that worker_params "
                "returns. Pass only the parameters: graph, params, rest = nnx.split(model, nnx.Param, ...)"
            )
    structure, opt_state = jax.tree.structure(params), nnx.as_pure(opt_state)
    params = nnx.as_pure(params)
    for state in _nodes(opt_state, MovesParams):
        try:
            params = state.local_params(params)
        except ValueError as error:
            raise ValueError(
                "params must have the structure of the parameters that the optimizer was initialized with. For an "
                "nnx module in an nnx.Optimizer, pass nnx.state(model, nnx.Param)"
            ) from error
    for axis_name in _axes(opt_state):
        params = as_local(params, axis_name)
    return jax.tree.unflatten(structure, jax.tree.leaves(params))


def sent_bytes(opt_state: Any) -> jax.Array:
    """Return the bytes that each device sent in the last update: the sum of ``sent`` over its ``SendsBytes`` (float32).

    A skipped update leaves the state unchanged, so this refers to the update before it; the metric of
    ``make_train_step(axis_name=)`` is zero then.

    Example:
        >>> print(sent_bytes(None))
        0.0
    """
    sent = [state.sent for state in _nodes(opt_state, SendsBytes)]
    return sum(sent, start=jnp.zeros((), jnp.float32))


def _nodes(tree: Any, kind: type[Node]) -> list[Node]:
    """Return the nodes of a tree that are of this kind."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def _axes(tree: Any) -> set[str]:
    return {node.axis_name for node in _nodes(tree, PerWorker)}


def worker_specs(tree: Any) -> Any:
    """Return the ``in_specs`` and ``out_specs`` of a state: the workers' axis for arrays in a ``PerWorker``, ``P()`` for all others.

    They name only the workers' axis, for a ``jax.shard_map`` that is manual over it (``axis_names={axis_name}``). For the
    placement on all axes of a mesh, for ``jax.device_put`` and ``jax.jit``, use ``effscale.parallel.shardings``.

    Args:
        tree: A state between steps, or its shapes.

    Example:
        >>> import jax.numpy as jnp
        >>> specs = worker_specs({"mu": jnp.ones(3), "error": PerWorker(jnp.ones((2, 3)), "data")})
        >>> specs["mu"] == P(), specs["error"].value == P("data")
        (True, True)
    """

    def visit(node: Any) -> Any:
        spec = P(node.axis_name) if is_per_worker(node) else P()
        return jax.tree.map(lambda _: spec, node)

    return jax.tree.map(visit, tree, is_leaf=is_per_worker)


def unstack_workers(tree: Any) -> Any:
    """Return a state as a worker sees it: each ``PerWorker`` without its leading dimension. Call it first in a ``jax.shard_map``.

    Args:
        tree: The state as ``worker_specs`` passes it in: the leading dimension of a ``PerWorker`` has size 1.

    Example:
        >>> import jax.numpy as jnp
        >>> unstack_workers(PerWorker(jnp.ones((1, 3)), "data")).value.shape
        (3,)
    """
    return _map_per_worker(lambda x, axis_name: x[0], tree)


def stack_workers(tree: Any) -> Any:
    """Invert ``unstack_workers``. Call it last in the body of a ``jax.shard_map``.

    Example:
        >>> import jax.numpy as jnp
        >>> stack_workers(PerWorker(jnp.ones(3), "data")).value.shape
        (1, 3)
    """
    return _map_per_worker(lambda x, axis_name: as_local(x, axis_name)[None], tree)


def _map_per_worker(function: Callable[[Any, str], Any], tree: Any) -> Any:
    def visit(node: Any) -> Any:
        if not is_per_worker(node):
            return node
        value = jax.tree.map(lambda x: function(x, node.axis_name), node.value)
        return PerWorker(value, node.axis_name)

    return jax.tree.map(visit, tree, is_leaf=is_per_worker)
