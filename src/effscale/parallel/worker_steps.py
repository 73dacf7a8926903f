"""Run a step separately on each worker along a mesh axis.

A technique that controls what is sent over the network needs the gradient of each worker, but the compiler would return the
sum over all workers. So its step runs in a ``jax.shard_map`` over one mesh axis, the workers' axis; the compiler handles all
other axes.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from effscale.parallel.shared_values import settled
from effscale.parallel.workers import (
    as_local,
    differs,
    is_per_worker,
    sent_bytes,
    worker_params,
)

Step = TypeVar("Step", bound=Callable[..., Any])


_AXIS: contextvars.ContextVar[str | None] = contextvars.ContextVar("workers_axis", default=None)


def tracing_axis() -> str | None:
    """Return the workers' axis while a step of `per_worker` or `simulate_workers` is being traced, else None.

    A function that was compiled before is not traced again.
    """
    return _AXIS.get()


@contextlib.contextmanager
def _tracing_along(axis_name: str) -> Iterator[None]:
    token = _AXIS.set(axis_name)
    try:
        yield
    finally:
        _AXIS.reset(token)


def per_worker(step: Step, axis_name: str = "data") -> Step:
    """Run a step on each worker along a mesh axis, with its own rows of the batch and its own gradient.

    The last positional argument of the step is the batch: its arrays (except scalars) are divided by their first
    dimension. All other arguments, including keyword arguments such as ``frozen``, and the result are the same on all
    workers, except for the contents of a ``PerWorker``.

    Each worker gets copies of the arguments. A step that changes them in place, as ``nnx.Optimizer.update`` does, must return
    what it changed.

    Args:
        step: ``step(*state, batch, **shared) -> tree``.
        axis_name: The workers' axis in the current mesh (``jax.set_mesh``). The compiler divides the work over the other
            axes as usual.

    Returns:
        A function with the step's arguments and result, for ``jax.jit``.

    Raises:
        ValueError: While tracing: the mesh has no such axis; the rows cannot be divided; the state has another number of
            workers; a result outside of a ``PerWorker`` differs between workers; or an argument is changed in place and
            not returned.

    Example:
        >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
        >>> step = per_worker(lambda scale, batch: jax.lax.pmean(scale * batch.sum(), "data"))
        >>> with jax.set_mesh(mesh):
        ...     print(jax.jit(step)(2.0, jnp.ones(4)))
        8.0
    """

    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or axis_name not in mesh.shape:
            raise ValueError(
                f"per_worker needs a mesh with the axis {axis_name!r}, but the axes of the current mesh are "
                f"{tuple(mesh.shape) if not mesh.empty else 'none'}. Call the step inside jax.set_mesh(mesh)"
            )
        *positional, batch = args
        state = (positional, kwargs)
        _check_workers(state, batch, axis_name, mesh.shape[axis_name])
        parts: list[_Parts] = []

        def one(state: Any, batch: Any) -> Any:
            state = _map_per_worker(lambda x: x[0], state, axis_name)
            positional, kwargs = state
            with _tracing_along(axis_name):
                return refusing_lost_changes(step, "per_worker")(*positional, batch, **kwargs)

        def body(state: Any, batch: Any) -> tuple[list[Any], list[Any]]:
            out = settled(one, axis_name)(state, batch)
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
    """Run ``per_worker`` on one device: the workers are a ``jax.vmap``, with the same collectives.

    Args:
        step: As for ``per_worker``.
        num_workers: Number of workers; the rows of a batch are divided among them.
        axis_name: The name of the axis inside the step.

    Returns:
        A function with the step's arguments and result.

    Raises:
        ValueError: As for ``per_worker``.

    Example:
        >>> step = simulate_workers(lambda scale, batch: jax.lax.pmean(scale * batch.sum(), "data"), 4)
        >>> print(step(2.0, jnp.ones(8)))
        4.0
    """

    @functools.wraps(step)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        *positional, batch = args
        state = (positional, kwargs)
        _check_workers(state, batch, axis_name, num_workers)
        parts: list[_Parts] = []

        def body(state: Any, batch: Any) -> tuple[list[Any], list[Any]]:
            positional, kwargs = state
            with _tracing_along(axis_name):
                out = refusing_lost_changes(step, "simulate_workers")(*positional, batch, **kwargs)
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
            # vmap detects only after the step that a result differs, and not which one.
            if "out_axes is None" not in str(error):
                raise
            raise ValueError(
                f"a result of the step differs between the workers along {axis_name!r}. Take its mean, "
                f"jax.lax.pmean(x, {axis_name!r}), or return it in a PerWorker"
            ) from error
        return parts[-1].merge(shared, own)

    return wrapped  # type: ignore[return-value]


class WholeBatch:
    """Where a training step takes its gradient, how it reduces what it computed, and what it reports: on the whole batch.

    The compiler divides the batch over devices itself, so there is nothing to reduce.
    """

    @property
    def workers(self) -> int:
        """The number of gradients that the optimizer averages."""
        return 1

    def key(self, key: Any) -> Any:
        """Return the key of the step's randomness."""
        return key

    def params(self, params: Any, opt_state: Any) -> Any:
        """Return the parameters at which the gradient is taken."""
        del opt_state
        return params

    def local(self, tree: Any) -> Any:
        """Return values that all workers share, as the loss reads them."""
        return tree

    def total(self, tree: Any) -> Any:
        """Return the sum over workers."""
        return tree

    def norm(self, norm: Any) -> Any:
        """Return the norm of the gradient, from the norm of its part."""
        return norm

    def update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """Return the optimizer's update, checked."""
        return update

    @property
    def everywhere(self) -> Callable[[jax.Array], jax.Array] | None:
        """A function that returns whether a condition holds on all workers; None if there is only one."""
        return None

    def report(self, opt_state: Any, made: jax.Array) -> dict[str, Any]:
        """Return the metrics of the reduction."""
        del opt_state, made
        return {}


class WorkerAxis(WholeBatch):
    """The same on one of the workers along a mesh axis, within `per_worker`, for an optimizer that averages over them.

    Args:
        axis_name: The workers' axis.
    """

    def __init__(self, axis_name: str):
        self.axis_name = axis_name

    @property
    def workers(self) -> int:
        """Return the number of workers."""
        return jax.lax.axis_size(self.axis_name)

    def key(self, key: Any) -> Any:
        """Return a key of this worker, so that dropout differs."""
        return jax.random.fold_in(key, jax.lax.axis_index(self.axis_name))

    def params(self, params: Any, opt_state: Any) -> Any:
        """Return `worker_params`."""
        return self.local(worker_params(params, opt_state))

    def local(self, tree: Any) -> Any:
        """Type the tree as local, so that its gradient is the worker's own."""
        return as_local(tree, self.axis_name)

    def total(self, tree: Any) -> Any:
        """Return the sum over workers."""
        total = lambda x: jax.lax.psum(as_local(jnp.asarray(x), self.axis_name), self.axis_name)
        return jax.tree.map(total, tree)

    def norm(self, norm: Any) -> Any:
        """Return the root mean square of the workers' norms, times their number, as gradients are scaled by it."""
        return jnp.sqrt(self.total(jnp.square(norm)) * self.workers)

    def update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        """Refuse updates that differ between workers."""

        def checked(gradients: Any, opt_state: Any, params: Any) -> Any:
            updates, opt_state = settled(update, self.axis_name)(gradients, opt_state, params)
            if any(differs(u, self.axis_name) for u in jax.tree.leaves(updates)):
                raise ValueError(
                    f"the optimizer's updates differ between the workers along {self.axis_name!r}, as it does not average. Use an optimizer "
                    "of effscale.optim with these workers, or put effscale.optim.mean_over_workers before it."
                )
            return updates, opt_state

        return checked

    @property
    def everywhere(self) -> Callable[[jax.Array], jax.Array]:
        """A function that returns whether a condition holds on all workers."""
        return lambda holds: self.total((~holds).astype(jnp.int32)) == 0

    def report(self, opt_state: Any, made: jax.Array) -> dict[str, Any]:
        """Return the bytes that each device sent for the update."""
        # A skipped step has the state of the previous step.
        return {"sent_bytes": jnp.where(made, sent_bytes(opt_state), 0.0)}


def _divided(x: Any, parts: int) -> Any:
    return jnp.reshape(x, (parts, x.shape[0] // parts, *x.shape[1:])) if jnp.ndim(x) else x


def _check_workers(state: Any, batch: Any, axis_name: str, num_workers: int) -> None:
    """Raise a ``ValueError`` if rows cannot be divided among the workers or a state has another number of workers."""
    for x in jax.tree.leaves(batch):
        if jnp.ndim(x) and x.shape[0] % num_workers:
            raise ValueError(
                f"the rows of a batch must be a multiple of the {num_workers} workers, got {x.shape[0]}"
            )
    nodes = jax.tree.leaves(state, is_leaf=lambda node: _mine(node, axis_name))
    for x in jax.tree.leaves([node for node in nodes if _mine(node, axis_name)]):
        if jnp.shape(x)[:1] != (num_workers,):
            held = f"of {x.shape[0]} workers" if jnp.ndim(x) else "without a dimension for workers"
            raise ValueError(
                f"the state is one {held}, but the axis {axis_name!r} has {num_workers}. Convert it with "
                f"effscale.parallel.resize_workers(state, {num_workers}), or initialize it for this axis"
            )


def _mine(node: Any, axis_name: str) -> bool:
    return is_per_worker(node) and node.axis_name == axis_name


def _map_per_worker(function: Callable[[Any], Any], tree: Any, axis_name: str) -> Any:
    def visit(node: Any) -> Any:
        return jax.tree.map(function, node) if _mine(node, axis_name) else node

    return jax.tree.map(visit, tree, is_leaf=lambda node: _mine(node, axis_name))


def _by_kind(tree: Any, axis_name: str, own: Any, shared: Any) -> Any:
    """Return the tree with ``own`` for each array in a ``PerWorker`` of the axis, and ``shared`` for each other array."""

    def visit(node: Any) -> list[Any]:
        if _mine(node, axis_name):
            return [own] * len(jax.tree.leaves(node))
        return [shared]

    nodes = jax.tree.leaves(tree, is_leaf=lambda node: _mine(node, axis_name))
    kinds = [kind for node in nodes for kind in visit(node)]
    return jax.tree.unflatten(jax.tree.structure(tree), kinds)


class _Parts(NamedTuple):
    """How to merge a tree from the arrays that all workers share and those that belong to each worker."""

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
                f"the step's result{jax.tree_util.keystr(path)} differs between the workers along {axis_name!r}. Take "
                f"its mean, jax.lax.pmean(x, {axis_name!r}), or return it in a PerWorker"
            )


def refusing_lost_changes(step: Callable[..., Any], runner: str) -> Callable[..., Any]:
    """Make a step raise if it replaces arrays of its arguments in place and does not return them.

    ``nnx.Optimizer.update`` and ``nnx.BatchNorm`` make such changes. Inside ``jax.shard_map`` or ``jax.vmap``, the arguments are
    copies, so a step that relies on changing them would silently do nothing.

    Args:
        step: A function of trees, such as ``nnx`` modules.
        runner: The function that runs the step, for the message.

    Raises:
        ValueError: While tracing: a change would be lost.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree_util.tree_leaves_with_path
        before = dict([*leaves(args), *leaves(kwargs)])
        out = step(*args, **kwargs)
        kept = {id(x) for x in [*before.values(), *jax.tree.leaves(out)]}
        for path, x in [*leaves(args), *leaves(kwargs)]:
            if path in before and id(x) not in kept:
                raise ValueError(
                    f"the step changed its argument{jax.tree_util.keystr(path)} in place, and the change would be lost: "
                    f"{runner} passes copies to the step. Return what it changes, such as the nnx module and its optimizer, and "
                    "continue with what is returned: `model, optimizer, loss = step(model, optimizer, batch)`"
                )
        return out

    return run
