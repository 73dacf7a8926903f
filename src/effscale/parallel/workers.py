"""What differs between the workers along a mesh axis, and what their arrays' types say about it.

What is the same on all workers is an ordinary array; what differs sits in a ``PerWorker``. ``effscale.parallel.worker_steps``
runs steps on such trees.
"""

import abc
import dataclasses
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from kernels_pallas.manual_axes import vary

Node = TypeVar("Node")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerWorker:
    """A tree whose arrays differ between the workers along an axis.

    In a state between steps its arrays have a leading dimension, the workers, that is divided over the axis. Within
    ``per_worker`` (or ``simulate_workers``) each worker sees its own part, without that dimension.
    """

    value: Any
    axis_name: str = dataclasses.field(metadata={"static": True})


class SendsBytes(abc.ABC):
    """A node of an optimizer's state that counts what its update sent.

    Register a state of your own with ``SendsBytes.register``, which also decorates a NamedTuple; ``sent_bytes`` then counts it.

    Attributes:
        sent: float32, bytes that each worker's device sent in the last update.
    """

    sent: jax.Array


class MovesParams(abc.ABC):
    """A node of an optimizer's state that lets workers go their own ways for some steps.

    Register a state of your own with ``MovesParams.register``; ``worker_params`` then asks it where the worker stands.
    """

    @abc.abstractmethod
    def local_params(self, params: Any) -> Any:
        """The parameters where a worker stands, from those that all share."""


def is_per_worker(node: object) -> bool:
    """Whether a node of a tree is a ``PerWorker``; for ``is_leaf=``."""
    return isinstance(node, PerWorker)


def bound_axis_size(axis_name: str) -> int | None:
    """Workers along a bound axis; None where the axis is not bound."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        return None


def is_manual(axis_name: str) -> bool:
    """Whether code runs in a ``jax.shard_map`` over the axis, and not in a ``jax.vmap``."""
    return axis_name in jax.sharding.get_abstract_mesh().manual_axes


def has_types(axis_name: str) -> bool:
    """Whether types say what differs between workers: not in ``jax.vmap``, ``jax.pmap`` and ``jax.shard_map(check_vma=False)``."""
    return is_manual(axis_name) and axis_name in _varying(jax.lax.axis_index(axis_name))


def differs(x: Any, axis_name: str) -> bool:
    """Whether the type of an array says that it differs between workers; never where there are no types (``has_types``)."""
    return is_manual(axis_name) and axis_name in _varying(x)


def _varying(x: Any) -> frozenset[str]:
    return jax.typeof(x).manual_axis_type.varying


def as_local(tree: Any, axis_name: str) -> Any:
    """The tree typed as each worker's own, so that its gradient is each worker's own and not the sum over all."""
    return vary(tree, (axis_name,)) if is_manual(axis_name) else tree


def gather(x: jax.Array, axis_name: str) -> jax.Array:
    """The arrays of all workers, stacked; of a type that says that all workers hold the same."""
    if is_manual(axis_name):
        return jax.lax.all_gather(x, axis_name, to="invarying")
    return jax.lax.all_gather(x, axis_name)


def worker_params(params: Any, opt_state: Any) -> Any:
    """The parameters at which a worker takes its gradient, within ``per_worker``.

    They are typed as the worker's own, so that ``jax.grad`` gives the worker's own gradient. Where the optimizer lets
    workers go their own ways for some steps (0/1 Adam), they are the worker's own in value, too: a node of the
    optimizer's state that is a ``MovesParams`` says where. The parameters themselves stay the same
    on all workers. Without any ``PerWorker`` in the state, as on one worker, they are returned as they are.

    Args:
        params: The parameters, as the optimizer knows them. Of an ``nnx`` module: ``nnx.state(model, nnx.Param)``, or what
            ``nnx.split`` gives.
        opt_state: The optimizer's state; also that of an ``nnx.Optimizer``.

    Returns:
        Parameters to differentiate at, in a tree like ``params``.

    Raises:
        ValueError: ``params`` holds running statistics or random streams, whose changes would be lost with this copy; or it
            has another structure than the parameters that the optimizer was initialised with.

    Example:
        >>> worker_params({"w": jnp.ones(2)}, None)["w"].tolist()  # one worker, whose state holds no PerWorker
        [1.0, 1.0]
    """
    variables = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    for variable in variables:
        if isinstance(variable, nnx.BatchStat | nnx.RngState):
            raise ValueError(
                f"params holds a {type(variable).__name__}, and its changes would be lost with the copy that worker_params "
                "returns: give it the parameters alone, graph, params, rest = nnx.split(model, nnx.Param, ...)"
            )
    structure, opt_state = jax.tree.structure(params), nnx.as_pure(opt_state)
    params = nnx.as_pure(params)
    for state in _nodes(opt_state, MovesParams):
        try:
            params = state.local_params(params)
        except ValueError as error:
            raise ValueError(
                "params has another structure than the parameters that the optimizer was initialised with. Those of an "
                "nnx module in an nnx.Optimizer are nnx.state(model, nnx.Param)"
            ) from error
    for axis_name in _axes(opt_state):
        params = as_local(params, axis_name)
    return jax.tree.unflatten(structure, jax.tree.leaves(params))


def sent_bytes(opt_state: Any) -> jax.Array:
    """Bytes that each device sent in the last update: the sum of ``sent`` over its ``SendsBytes`` (float32).

    A skipped update leaves the state as it was, so this is of the update before it; the metric of
    ``make_train_step(axis_name=)`` is zero then.

    Example:
        >>> print(sent_bytes(None))
        0.0
    """
    sent = [state.sent for state in _nodes(opt_state, SendsBytes)]
    return sum(sent, start=jnp.zeros((), jnp.float32))


def _nodes(tree: Any, kind: type[Node]) -> list[Node]:
    """The nodes of a tree that are of this kind."""
    found = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, kind))
    return [node for node in found if isinstance(node, kind)]


def _axes(tree: Any) -> set[str]:
    return {node.axis_name for node in _nodes(tree, PerWorker)}
