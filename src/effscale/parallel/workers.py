"""Steps that each worker of a mesh axis takes by itself, and the state that differs between workers.

A technique that decides what crosses the network sees the gradient of each worker, where the compiler would hand it the
sum over all. So its step runs in a `jax.shard_map` over one mesh axis, the workers' axis; all other axes stay the
compiler's. What is the same on all workers is an ordinary array; what differs sits in a `PerWorker`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from kernels_pallas.manual_axes import vary

Step = TypeVar("Step", bound=Callable[..., Any])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PerWorker:
    """A tree whose arrays differ between the workers along an axis.

    In a state between steps its arrays have a leading dimension, the workers, that is divided over the axis. Within
    `per_worker` (or `simulate_workers`) each worker sees its own part, without that dimension.
    """

    value: Any
    axis_name: str = dataclasses.field(metadata={"static": True})


def is_per_worker(node: object) -> bool:
    """Whether a node of a tree is a `PerWorker`; for ``is_leaf=``."""
    return isinstance(node, PerWorker)


def bound_axis_size(axis_name: str) -> int | None:
    """Workers along a bound axis; None where the axis is not bound."""
    try:
        return jax.lax.axis_size(axis_name)
    except NameError:
        return None


def is_manual(axis_name: str) -> bool:
    """Whether code runs in a `jax.shard_map` over the axis, and not in a `jax.vmap`."""
    return axis_name in jax.sharding.get_abstract_mesh().manual_axes


def differs(x: Any, axis_name: str) -> bool:
    """Whether the type of an array says that it differs between workers; never under `jax.vmap`, which has no such types."""
    return axis_name in jax.typeof(x).manual_axis_type.varying if is_manual(axis_name) else False


def as_local(tree: Any, axis_name: str) -> Any:
    """The tree typed as each worker's own, so that its gradient is each worker's own and not the sum over all."""
    return vary(tree, (axis_name,)) if is_manual(axis_name) else tree


def gather(x: jax.Array, axis_name: str) -> jax.Array:
    """The arrays of all workers, stacked; of a type that says that all workers hold the same."""
    if is_manual(axis_name):
        return jax.lax.all_gather(x, axis_name, to="invarying")
    return jax.lax.all_gather(x, axis_name)


def worker_params(params: Any, opt_state: Any) -> Any:
    """The parameters at which a worker takes its gradient, within `per_worker`.

    They are typed as the worker's own, so that `jax.grad` gives the worker's own gradient. Where the optimizer lets
    workers go their own ways for some steps (0/1 Adam), they are the worker's own in value, too: a node of the
    optimizer's state that has a method ``local_params(params)`` moves them. The parameters themselves stay the same
    on all workers. Without any `PerWorker` in the state, as on one worker, they are returned as they are.

    Args:
        params: The parameters, as the optimizer knows them.
        opt_state: The optimizer's state.

    Returns:
        Parameters to differentiate at.

    Example:
        >>> worker_params({"w": jnp.ones(2)}, None)["w"].tolist()  # one worker, whose state holds no PerWorker
        [1.0, 1.0]
    """
    states = jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "local_params"))
    for state in states:
        if hasattr(state, "local_params"):
            params = state.local_params(params)
    for axis_name in _axes(opt_state):
        params = as_local(params, axis_name)
    return params


def sent_bytes(opt_state: Any) -> jax.Array:
    """Bytes that each device sent in the last update: the sum of ``sent`` over the states that have it (float32).

    A skipped update leaves the state as it was, so this is of the update before it; the metric of
    ``make_train_step(axis_name=)`` is zero then.

    Example:
        >>> print(sent_bytes(None))
        0.0
    """
    states = jax.tree.leaves(opt_state, is_leaf=lambda node: hasattr(node, "sent"))
    sent = [state.sent for state in states if hasattr(state, "sent")]
    return sum(sent, start=jnp.zeros((), jnp.float32))


def per_worker(step: Step, axis_name: str = "data") -> Step:
    """Run a step on each worker along a mesh axis: its own rows of the batch, its own gradient.

    The last argument of the step is the batch: its arrays are divided by their first dimension (scalars are not).
    All other arguments, and the result, are the same on all workers but for what sits in a `PerWorker`.

    Args:
        step: ``step(*state, batch) -> tree``.
        axis_name: The workers' axis, of the mesh in use (`jax.set_mesh`). Over its other axes the compiler divides the
            work as it does without.

    Returns:
        A function with the step's arguments and result, for `jax.jit`.

    Raises:
        ValueError: While tracing: no such axis in the mesh; rows that cannot be divided; or a result that differs between
            workers outside of a `PerWorker`.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> step = per_worker(lambda scale, batch: jax.lax.pmean(scale * batch.sum(), "data"))
        >>> with jax.set_mesh(mesh):
        ...     print(jax.jit(step)(2.0, jnp.ones(4)))
        8.0
    """

    @functools.wraps(step)
    def wrapped(*args: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or axis_name not in mesh.shape:
            raise ValueError(
                f"per_worker needs a mesh with the axis {axis_name!r}, and the one in use has "
                f"{tuple(mesh.shape) if not mesh.empty else 'none'}: call the step within jax.set_mesh(mesh)"
            )
        *state, batch = args
        for x in jax.tree.leaves(batch):
            _check_rows(x, mesh.shape[axis_name])
        parts: list[_Parts] = []

        def body(state: Any, batch: Any) -> tuple[list[Any], list[Any]]:
            out = step(*_map_per_worker(lambda x: x[0], state, axis_name), batch)
            _check_shared(out, axis_name)
            out = _map_per_worker(lambda x: as_local(x, axis_name)[None], out, axis_name)
            parts.append(_Parts.of(out, axis_name))
            return parts[-1].split(out)

        rows = jax.tree.map(lambda x: P(axis_name) if jnp.ndim(x) else P(), batch)
        run = jax.shard_map(
            body,
            in_specs=(_by_kind(state, axis_name, P(axis_name), P()), rows),
            out_specs=(P(), P(axis_name)),
            axis_names={axis_name},
        )
        shared, own = run(state, batch)
        return parts[-1].merge(shared, own)

    return wrapped  # type: ignore[return-value]


def simulate_workers(step: Step, num_workers: int, axis_name: str = "data") -> Step:
    """`per_worker` on one device: the workers are a `jax.vmap`, with the same collectives.

    Args:
        step: As for `per_worker`.
        num_workers: Workers; the rows of a batch are divided among them.
        axis_name: The name by which the step knows the axis.

    Returns:
        A function with the step's arguments and result.

    Raises:
        ValueError: The rows cannot be divided; or a result outside of a `PerWorker` differs between workers.

    Example:
        >>> step = simulate_workers(lambda scale, batch: jax.lax.pmean(scale * batch.sum(), "data"), 4)
        >>> print(step(2.0, jnp.ones(8)))
        4.0
    """

    @functools.wraps(step)
    def wrapped(*args: Any) -> Any:
        *state, batch = args
        parts: list[_Parts] = []

        def body(state: Any, batch: Any) -> tuple[list[Any], list[Any]]:
            out = step(*state, batch)
            parts.append(_Parts.of(out, axis_name))
            return parts[-1].split(out)

        run = jax.vmap(
            body,
            in_axes=(
                _by_kind(state, axis_name, 0, None),
                jax.tree.map(lambda x: 0 if jnp.ndim(x) else None, batch),
            ),
            out_axes=(None, 0),
            axis_name=axis_name,
            axis_size=num_workers,
        )
        batch = jax.tree.map(lambda x: _divided(x, num_workers), batch)
        try:
            shared, own = run(state, batch)
        except ValueError as error:
            # vmap knows only after the step that a result differs, and not which.
            if "out_axes is None" not in str(error):
                raise
            raise ValueError(
                f"a result of the step differs between the workers along {axis_name!r}: take its mean, "
                f"jax.lax.pmean(x, {axis_name!r}), or return it in a PerWorker"
            ) from error
        return parts[-1].merge(shared, own)

    return wrapped  # type: ignore[return-value]


def _divided(x: Any, parts: int) -> Any:
    if not jnp.ndim(x):
        return x
    _check_rows(x, parts)
    return jnp.reshape(x, (parts, x.shape[0] // parts, *x.shape[1:]))


def _check_rows(x: Any, parts: int) -> None:
    if jnp.ndim(x) and x.shape[0] % parts:
        raise ValueError(f"a batch of {x.shape[0]} rows cannot be divided among {parts} workers")


def _axes(tree: Any) -> set[str]:
    nodes = jax.tree.leaves(tree, is_leaf=is_per_worker)
    return {node.axis_name for node in nodes if is_per_worker(node)}


def _mine(node: Any, axis_name: str) -> bool:
    return is_per_worker(node) and node.axis_name == axis_name


def _map_per_worker(function: Callable[[Any], Any], tree: Any, axis_name: str) -> Any:
    def visit(node: Any) -> Any:
        return jax.tree.map(function, node) if _mine(node, axis_name) else node

    return jax.tree.map(visit, tree, is_leaf=lambda node: _mine(node, axis_name))


def _by_kind(tree: Any, axis_name: str, own: Any, shared: Any) -> Any:
    """The tree with ``own`` for each array in a `PerWorker` of the axis, and ``shared`` for each other."""

    def visit(node: Any) -> list[Any]:
        if _mine(node, axis_name):
            return [own] * len(jax.tree.leaves(node))
        return [shared]

    nodes = jax.tree.leaves(tree, is_leaf=lambda node: _mine(node, axis_name))
    kinds = [kind for node in nodes for kind in visit(node)]
    return jax.tree.unflatten(jax.tree.structure(tree), kinds)


class _Parts(NamedTuple):
    """How to put a tree together from what all workers share and what is each one's own."""

    structure: Any
    own: list[bool]

    @classmethod
    def of(cls, tree: Any, axis_name: str) -> "_Parts":
        own = jax.tree.leaves(_by_kind(tree, axis_name, True, False))
        return cls(jax.tree.structure(tree), own)

    def split(self, tree: Any) -> tuple[list[Any], list[Any]]:
        pairs = list(zip(jax.tree.leaves(tree), self.own, strict=True))
        return [x for x, own in pairs if not own], [x for x, own in pairs if own]

    def merge(self, shared: list[Any], own: list[Any]) -> Any:
        take_shared, take_own = iter(shared), iter(own)
        leaves = [next(take_own if mine else take_shared) for mine in self.own]
        return jax.tree.unflatten(self.structure, leaves)


def _check_shared(tree: Any, axis_name: str) -> None:
    kinds = jax.tree.leaves(_by_kind(tree, axis_name, True, False))
    for (path, x), own in zip(jax.tree_util.tree_leaves_with_path(tree), kinds, strict=True):
        if not own and differs(x, axis_name):
            raise ValueError(
                f"the step's result{jax.tree_util.keystr(path)} differs between the workers along {axis_name!r}: take "
                f"its mean, jax.lax.pmean(x, {axis_name!r}), or return it in a PerWorker"
            )
